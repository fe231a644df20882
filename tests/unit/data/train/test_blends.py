"""`--data-path WEIGHT PREFIX WEIGHT PREFIX ..`: the share of each prefix in the order of samples, and the command."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
from qwen3_npu.data.train.data_path import blend
from qwen3_npu.data.train.sft_dataset import instruction_splits, open_instructions
from qwen3_npu.data.train.token_file import IndexedWriter
from qwen3_npu.errors import UsageError

ROOT = Path(__file__).resolve().parents[4]
WEIGHTS = ("0.25", "0.75")
LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two data sets of each kind; those of `a` hold token 5 only, those of `b` token 7."""
    folder = tmp_path_factory.mktemp("blends")
    tiny.write_model(folder / "hf", tiny.arch())
    for name, token, documents in (("a", 5, 40), ("b", 7, 90)):
        outputs = {"text": token, "packed_input_ids": token, "packed_attention_mask": 1, "packed_labels": token}
        for output, value in outputs.items():
            writer = IndexedWriter(folder / f"{name}_{output}_document")
            writer.add(np.full(documents * LENGTH, value), np.full(documents, LENGTH))
            writer.close()
    return folder


def words(folder: Path, end: str) -> list[str]:
    return [word for weight, name in zip(WEIGHTS, "ab", strict=True) for word in (weight, f"{folder / name}{end}")]


def assert_shares(order: list[int]) -> None:
    """At every moment a quarter are of `a`, give or take one; and the order is mixed."""
    for count in range(1, len(order) + 1):
        assert abs(order[:count].count(5) - count / 4) <= 1, (count, order)
    assert set(order) == {5, 7}


def test_pretraining_takes_its_share_of_each_prefix(folder: Path, process: object) -> None:
    from qwen3_npu.args.training import DataArgs
    from qwen3_npu.data.train.pretrain_dataset import build_splits

    def order(data_path: list[str]) -> list[int]:
        data = DataArgs(data_path=data_path, split="1,0,0", data_cache_path=str(folder / "cache"))
        train = build_splits(data, seq_length=LENGTH, seed=1, samples=(40, 0, 0)).train
        return [int(train[n]["tokens"][0]) for n in range(40)]

    first = order(words(folder, "_text_document"))
    assert_shares(first)
    assert order(words(folder, "_text_document")) == first, "from the cache"
    shutil.rmtree(folder / "cache")
    assert order(words(folder, "_text_document")) == first, "without it"


def test_fine_tuning_takes_its_share_of_each_prefix(folder: Path) -> None:
    prefixes, weights = blend(words(folder, ""))
    for _ in range(2):
        files = open_instructions(prefixes, per_document=False)
        train = instruction_splits(files, weights, "1,0,0", longest=LENGTH, seed=1).train
        assert train is not None
        # Behind 40 / 0.25 samples `a` starts its second epoch.
        assert_shares([int(train[n].ids[0]) for n in range(200)])


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    base = ["--device", "cpu", "--train-iters", "2", "--lr", "1e-3", "--seq-length", str(LENGTH), "--eval-iters", "0"]
    base += ["--hf-dir", str(folder / "hf"), "--global-batch-size", "8", "--split", "1,0,0", "--log-interval", "1"]
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *base, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("end", "flags"), [("_text_document", ()), ("", ("--stage", "sft"))])
def test_blends_train(folder: Path, end: str, flags: tuple[str, ...]) -> None:
    result = run(folder, *flags, "--data-path", *words(folder, end))
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"loss:? +([0-9.E+-]+)", result.stdout)]
    # Two tokens only: soon neither surprises, and both are known only if both were met.
    assert len(losses) == 2, result.stdout
    assert losses[1] < losses[0]


BAD = {
    "0 {a} 1 {b}": "weights must be above 0",
    "-1 {a} 1 {b}": "weights must be above 0",
    "nan {a} 1 {b}": "weights must be above 0",
    "inf {a} 1 {b}": "weights must be above 0",
    "0.5 {a} {b}": "give WEIGHT PREFIX pairs",
    "0.5 {a} 0.5": "give WEIGHT PREFIX pairs",
    "o.5 {a} 0.5 {b}": "give WEIGHT PREFIX pairs",
    "0.5 {a} 0.5 {b}x": "not found",
}


def test_bad_blends_are_refused(folder: Path) -> None:
    from qwen3_npu.args.training import DataArgs
    from qwen3_npu.data.train.data_path import check_data

    for stage, end in (("pt", "_text_document"), ("sft", "")):
        names = {name: f"{folder / name}{end}" for name in "ab"}
        for data_path, message in BAD.items():
            with pytest.raises(UsageError, match=f"--data-path .*{message}"):
                check_data(DataArgs(data_path=data_path.format(**names).split(), stage=stage), 256, seq_length=LENGTH)


@pytest.mark.parametrize("data_path", ["nan {a} 1 {b}", "0.5 {a} 0.5 {b}x"])
def test_the_command_refuses_bad_blends(folder: Path, data_path: str) -> None:
    result = run(folder, "--stage", "sft", "--data-path", *data_path.format(a=folder / "a", b=folder / "b").split())
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("pretrain_gpt.py: error: --data-path ")
    assert BAD[data_path] in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
