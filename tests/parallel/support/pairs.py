"""Pairs of answers and labelled answers for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qwen3_npu.data.train.preference_dataset import LabelledFiles, PairFiles
from qwen3_npu.data.train.sft_dataset import instruction_splits
from qwen3_npu.data.train.token_file import IndexedWriter, publish

LONGEST, BATCH = 64, 8
NAMES = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
LABELLED = ("input_ids", "labels", "desirable")
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
LabelledAnswer = tuple[list[int], list[int], bool]  # prompt, answer, whether it is desirable


def write_pairs(prefix: Path, *, count: int = 24, vocab: int = 256, seed: int = 3) -> str:
    """Random pairs: the chosen answer counts on from the prompt, the rejected one is noise."""
    rng = np.random.default_rng(seed)
    writers = [IndexedWriter(f"{prefix}_packed_{name}_document") for name in NAMES]
    for _ in range(count):
        start, sizes = int(rng.integers(vocab)), rng.integers(3, 24, 3)
        prompt, good = ([(start + i) % (vocab - 2) + 2 for i in range(size)] for size in sizes[:2])
        bad = (rng.integers(vocab - 2, size=sizes[2]) + 2).tolist()
        for answer, (ids, labels) in ((good, writers[:2]), (bad, writers[2:])):
            row = [*prompt, *answer]
            length = np.array([len(row)], np.int32)
            ids.add(np.array(row, np.int32), length)
            labels.add(np.array([-100] * len(prompt) + answer, np.int32), length)
    publish(writers)
    return str(prefix)


def write_texts(prefix: Path, pairs: list[tuple[str, str, str]], longest: int = 128) -> str:
    """Pairs of texts as bytes: the end of each prompt, the beginning of each answer, and 0 after an answer."""
    writers = [IndexedWriter(f"{prefix}_packed_{name}_document") for name in NAMES]
    for prompt_text, *answers in pairs:
        prompt = list(prompt_text.encode()[-longest // 4 :])
        for text, (ids, labels) in zip(answers, (writers[:2], writers[2:]), strict=True):
            answer = [*text.encode()[: longest - 1], 0]
            length = np.array([len(prompt) + len(answer)], np.int32)
            ids.add(np.array(prompt + answer, np.int32), length)
            labels.add(np.array([-100] * len(prompt) + answer, np.int32), length)
    publish(writers)
    return str(prefix)


def first_step(prefix: str, seed: int = 1234) -> list[Pair]:
    """The pairs of the first step, in the order of the training."""
    train = instruction_splits([PairFiles(prefix)], None, "1,0,0", longest=LONGEST, seed=seed).train
    assert train is not None
    found = []
    for number in range(BATCH):
        pair = train[number]
        prompt = int((pair.chosen.labels == -100).sum())
        ids = pair.chosen.ids.tolist()
        found.append((ids[:prompt], ids[prompt:], pair.rejected.ids.tolist()[prompt:]))
    return found


def write_labelled(prefix: Path, *, count: int = 24, vocab: int = 256, seed: int = 16) -> str:
    """Random answers with labels: those that count on from the prompt are desirable, noise is not."""
    rng = np.random.default_rng(seed)
    writers = [IndexedWriter(f"{prefix}_packed_answer_{name}_document") for name in LABELLED]
    for number in range(count):
        start, sizes, good = int(rng.integers(vocab)), rng.integers(3, 24, 2), number % 3 != 1
        prompt = [(start + i) % (vocab - 2) + 2 for i in range(sizes[0])]
        answer = rng.integers(vocab - 2, size=sizes[1]) + 2
        if good:
            answer = (start + sizes[0] + np.arange(sizes[1])) % (vocab - 2) + 2
        rows = [*prompt, *answer], [*[-100] * len(prompt), *answer], [int(good)]
        for writer, row in zip(writers, rows, strict=True):
            writer.add(np.array(row, np.int32), np.array([len(row)], np.int32))
    publish(writers)
    return str(prefix)


def labelled_step(prefix: str, seed: int = 1234) -> list[LabelledAnswer]:
    """Prompt, answer and label of the samples of the first step, in the order of the training."""
    train = instruction_splits([LabelledFiles(prefix)], None, "1,0,0", longest=LONGEST, seed=seed).train
    assert train is not None
    found = []
    for one in (train[number] for number in range(BATCH)):
        prompt = int((one.answer.labels == -100).sum())
        ids = one.answer.ids.tolist()
        found.append((ids[:prompt], ids[prompt:], one.desirable))
    return found
