"""What grows with the cluster: files are read once a node, and ranks agree at a constant cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_npu import schema
from qwen3_npu.data.train import token_index
from qwen3_npu.data.train.index_cache import IndexCache
from qwen3_npu.data.train.token_file import IndexedWriter
from qwen3_npu.data.train.token_index import read_index
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import read_hf_config
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


def test_one_process_of_a_node_reads_config_and_checks_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other seven neither read config.json nor any number of the index, which they map."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reads: list[Path] = []
    read_small, check = schema.read_small, token_index._check_lengths

    def counted(path: Path, *limit: int) -> bytes:
        reads.append(path)
        return read_small(path, *limit)

    def checked(path: Path, *args: Any, **more: Any) -> bool:
        reads.append(path)
        return check(path, *args, **more)

    monkeypatch.setattr(schema, "read_small", counted)
    monkeypatch.setattr(token_index, "_check_lengths", checked)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "name": "\u5343\u95ee"}')
    assert [read_hf_config(tmp_path) for _ in range(8)] == [{"model_type": "qwen3", "name": "\u5343\u95ee"}] * 8
    writer = IndexedWriter(tmp_path / "data")
    writer.add(np.array([1, 2, 3, 4]), np.array([3, 1]))
    writer.close()
    found = [read_index(tmp_path / "data.idx", 16) for _ in range(8)]
    assert all(index.lengths.tolist() == [3, 1] and index.in_order for index in found)
    assert reads == [tmp_path / "config.json", tmp_path / "data.idx"]
    with pytest.raises(UsageError, match="does not belong to"):
        read_index(tmp_path / "data.idx", 20)


def test_one_process_of_a_node_opens_the_headers_of_an_index_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy wrote the files, and the numbers, dtypes and shapes that all eight map are numpy's."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = [np.arange(12).reshape(3, 4), np.asfortranarray(np.eye(3, dtype=np.float32)), np.arange(5, dtype=np.uint16)]
    reads: list[object] = []
    read_magic = np.lib.format.read_magic
    monkeypatch.setattr(np.lib.format, "read_magic", lambda file: reads.append(file) or read_magic(file))
    for _ in range(8):
        found = IndexCache(tmp_path / "cache", "order", ("a", "b", "c")).arrays(lambda: made)
        for array, expected in zip(found, made, strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
    assert len(reads) == len(made)


# Where ranks must hear of each other: answers, scores of a reference model, comparisons; nodes with --save-per-node;
# whose state is damaged, once it is.
MAY_GATHER = {"inference/diagnose.py", "inference/runner.py", "training/reference_cache.py", "trace/world.py"}
MAY_GATHER |= {
    "training/fingerprints/gather.py",
    "parity/gather.py",
    "checkpoint/training/replicate.py",
    "training/spikes/state.py",
}


def test_start_steps_and_saves_send_no_object_of_every_rank_to_every_rank() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\ball_gather_object\(|\"all_gather_object\"", path.read_text())
    }
    assert found <= MAY_GATHER
