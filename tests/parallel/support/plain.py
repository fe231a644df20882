"""What fine-tuning computes, as a plain loop over documents with transformers and torch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

# With Adam's usual 1e-8 an update depends on the sign of gradients that are all but 0, which rounding decides.
STEPS, LONGEST, BATCH, LR, EPS = 4, 64, 8, 3e-3, 1e-4
FLAGS = ["--stage", "sft", "--seq-length", str(LONGEST), "--global-batch-size", str(BATCH), "--lr", str(LR)]
FLAGS += ["--lr-decay-style", "constant", "--clip-grad", "0", "--train-iters", str(STEPS), "--device", "cpu"]
FLAGS += ["--eval-iters", "0", "--split", "1,0,0", "--adam-eps", str(EPS)]
VARIABLE, MICRO2 = ["--no-pad-to-seq-lengths"], ["--micro-batch-size", "2"]

Document = tuple[list[int], list[int]]


def documents(prefix: str) -> list[list[list[Document]]]:
    """The documents (ids, labels) of each sample of each step, in the order of the training."""
    from qwen3_npu.data.train.sft_dataset import instruction_splits, open_instructions

    files = open_instructions([prefix], per_document=False)
    train = instruction_splits(files, None, "1,0,0", longest=LONGEST, seed=1234).train
    steps = []
    for step in range(STEPS):
        samples = []
        for number in range(step * BATCH, (step + 1) * BATCH):
            sample = train[number]
            segments = np.ones(len(sample.ids), int) if sample.segments is None else sample.segments
            boundaries = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
            samples.append(
                [
                    (sample.ids[a:b].tolist(), sample.labels[a:b].tolist())
                    for a, b in itertools.pairwise(boundaries)
                    if segments[a]
                ]
            )
        steps.append(samples)
    return steps


def document_loss(model: Any, document: Document) -> torch.Tensor:
    """Sum of the losses of a document's supervised tokens, run alone."""
    ids, labels = (torch.tensor(column) for column in document)
    logits = model(input_ids=ids[None]).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")


def unstacked(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names as in files, where each expert has its own tensors; transformers 5 stacks them in memory."""
    found = {}
    for name, gradient in gradients.items():
        stem, _, last = name.rpartition(".")
        for number, one in enumerate(gradient if stem.endswith(".experts") else ()):
            parts = zip(("gate_proj", "up_proj"), np.split(one, 2), strict=True)
            for projection, part in parts if last == "gate_up_proj" else [(last, one)]:
                found[f"{stem}.{number}.{projection}.weight"] = part
        if not stem.endswith(".experts"):
            found[name] = gradient
    return found
