"""What fine-tuning computes, as a plain loop over documents with transformers and torch."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_npu.parity.measure import largest_difference

# With Adam's usual 1e-8 an update depends on the sign of gradients that are all but 0, which rounding decides.
STEPS, LONGEST, BATCH, LR, EPS = 4, 64, 4, 3e-3, 1e-4
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


def write_some_adapters(base: str, folder: str, **config: Any) -> None:
    """Let peft save an adapter on the embedding, the output layer, and q, k and v of two layers."""
    import peft
    from transformers import AutoModelForCausalLM

    linears = [f"model.layers.{layer}.self_attn.{x}_proj" for layer in (1, 3) for x in "qkv"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["embed_tokens", "lm_head", *linears]
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **config))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, mean=1.0 * ("magnitude" in name), std=0.1)
    for layer in (1, 3):
        attention = model.base_model.model.model.layers[layer].self_attn
        for linear in (attention.k_proj, attention.v_proj):
            linear.lora_A["default"].weight.data.copy_(attention.q_proj.lora_A["default"].weight)
    model.save_pretrained(folder)


def write_restored(base: Path, folder: Path, *, ends: bool, double: bool) -> None:
    """The same model with its linears as bitsandbytes restores them from NF4; `ends`: embedding and head, too;
    `double`: with scales in 8 bits.
    """
    from bitsandbytes import functional
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") or (ends and name.endswith(("embed_tokens.weight", "lm_head.weight"))):
            tensors[name] = functional.dequantize_4bit(*functional.quantize_4bit(tensor, None, None, 64, double, "nf4"))
    save_file(tensors, folder / "model.safetensors")


def plain_loop(
    model: Any, prefix: str, shared: Sequence[Sequence[torch.nn.Parameter]] = (), *, muon: bool = False
) -> dict[str, Any]:
    """Train a transformers model. "first loss again" is what the first batch has at the end.

    Args:
        shared: groups of parameters that are one, so that their gradients are summed.
        muon: by torch.optim.Muon; all that is trained is matrices of the layers.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim == 1]}]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS, weight_decay=0.01)
    if muon:
        options = {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
        optimizer = torch.optim.Muon(trained, lr=LR, weight_decay=0.01, **options)
    losses, norms, gradients = [], [], {}
    batches = documents(prefix)
    for step in batches:
        optimizer.zero_grad()
        flat = [document for sample in step for document in sample]
        tokens = sum(label != -100 for _, labels in flat for label in labels[1:])
        total = 0.0
        for document in flat:
            loss = document_loss(model, document) / tokens
            loss.backward()
            total += loss.item()
        for group in shared:
            together = sum(p.grad for p in group)
            for p in group:
                p.grad = together.clone()
        same = {id(p) for group in shared for p in group[1:]}
        norms.append(sum(p.grad.square().sum() for p in trained if id(p) not in same).sqrt().item())
        losses.append(total)
        if not gradients:
            gradients = {name: p.grad.clone().numpy() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    first = [document for sample in batches[0] for document in sample]
    tokens = sum(label != -100 for _, labels in first for label in labels[1:])
    with torch.no_grad():
        again = sum(document_loss(model, document) for document in first) / tokens
    return {"loss": losses, "grad_norm": norms, "gradients": gradients, "first loss again": float(again)}


def check(got: dict[str, Any], expected: dict[str, Any], gradients: Path, rename: Any = lambda name: name) -> None:
    steps = len(got["loss"])
    assert steps >= 3
    assert got["loss"] == pytest.approx(expected["loss"][:steps], rel=1e-5)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"][:steps], rel=1e-5)
    wanted = unstacked({rename(name): gradient for name, gradient in expected["gradients"].items()})
    assert all(np.abs(gradient).max() > 0 for gradient in wanted.values())
    difference, where = largest_difference(dict(np.load(gradients)), wanted)
    assert difference <= 1e-5, where
