"""What grows with the cluster: files are read once a node, and ranks agree at a constant cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen3_npu.once import once_a_node

PACKAGE = Path(__file__).resolve().parents[3] / "qwen3_npu"


def test_one_process_of_a_node_reads_a_file_and_another_version_of_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path, reads = tmp_path / "data", []

    def compute(file: Path) -> str:
        reads.append(file)
        return file.read_text()

    path.write_text("one")
    assert [once_a_node("text", path, compute) for _ in range(8)] == ["one"] * 8
    assert len(reads) == 1
    path.write_text("another")
    assert once_a_node("text", path, compute) == "another"
    assert once_a_node("other", path, lambda file: "x") == "x", "another question"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert once_a_node("text", path, lambda file: "alone") == "alone"


def test_an_answer_that_was_not_finished_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "data"
    path.write_text("x")
    assert once_a_node("n", path, lambda file: "1234") == "1234"
    (note,) = (file for folder in tmp_path.glob("qwen3_npu-once-*") for file in folder.iterdir())
    note.write_text("12")
    assert once_a_node("n", path, lambda file: "1234") == "1234"


# Where ranks must hear of each other: answers, scores of a reference model, comparisons; nodes with --save-per-node.
MAY_GATHER = {"inference/diagnose.py", "inference/runner.py", "training/reference_cache.py", "trace/world.py"}
MAY_GATHER |= {"training/fingerprints/gather.py", "parity/gather.py", "checkpoint/training/replicate.py"}


def test_start_steps_and_saves_send_no_object_of_every_rank_to_every_rank() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\ball_gather_object\(|\"all_gather_object\"", path.read_text())
    }
    assert found <= MAY_GATHER
