"""Token files, blends, splits and the order of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tiny
from qwen3_npu.data.batches import sample_numbers
from qwen3_npu.data.indexed import check_vocabulary, open_indexed
from qwen3_npu.errors import UsageError


def test_megatron_reads_what_is_written(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = str(tiny.write_tokens(tmp_path / "a_text_document", documents=7))
    ours, theirs = open_indexed(prefix), IndexedDataset(prefix)
    assert len(theirs) == len(ours) == 7
    assert theirs.index.dtype is np.int32
    assert np.array_equal(np.concatenate([theirs[i] for i in range(7)]), ours.tokens)
    assert theirs.document_indices.tolist() == list(range(8))


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-9], "not an index": b"x" * len(data), "empty": b""}[how])


@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        ("idx", "truncated", r"\.idx is truncated or damaged"),
        ("idx", "not an index", r"\.idx is not a Megatron index"),
        ("idx", "empty", r"\.idx is not a Megatron index"),
        ("bin", "truncated", r"\.bin is truncated"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, file: str, how: str, message: str) -> None:
    prefix = tiny.write_tokens(tmp_path / "a_text_document")
    damage(prefix.with_name(f"{prefix.name}.{file}"), how)
    with pytest.raises(UsageError, match=message):
        open_indexed(prefix)


def test_missing_prefix_and_wrong_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data-path .*nothing.*not found"):
        open_indexed(tmp_path / "nothing")
    data = open_indexed(tiny.write_tokens(tmp_path / "a_text_document"))
    check_vocabulary(data, 256)
    with pytest.raises(UsageError, match="made with another tokenizer"):
        check_vocabulary(data, 100)


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 2), (1, 4), (4, 2)])
def test_samples_of_a_step_do_not_depend_on_how_they_are_shared(micro: int, ranks: int) -> None:
    seen = [
        list(r)
        for rank in range(ranks)
        for r in sample_numbers(16, global_batch=8, micro_batch=micro, data_parallel=ranks, data_rank=rank)
    ]
    assert sorted(n for r in seen for n in r) == list(range(16, 24))
    assert all(len(r) == micro for r in seen)


class TestSplits:
    """Shares of documents; megatron-core loops for ever over an empty share."""

    def build(self, prefix: Path, split: str, samples: tuple[int, int, int]) -> object:
        from qwen3_npu.args.training import DataArgs
        from qwen3_npu.data.pretrain import build_splits

        data = DataArgs(data_path=[str(prefix)], split=split)
        return build_splits(data, seq_length=16, seed=1, samples=samples)

    def test_a_share_without_documents_is_refused(self, tmp_path: Path) -> None:
        prefix = tiny.write_tokens(tmp_path / "a_text_document", documents=20)
        with pytest.raises(UsageError, match=r"--split 969,30,1 leaves no document of .* for test"):
            self.build(prefix, "969,30,1", (4, 4, 4))
        with pytest.raises(UsageError, match="for validation; give another --split or --eval-iters 0"):
            self.build(prefix, "100,0,0", (4, 4, 0))
        with pytest.raises(UsageError, match="three numbers"):
            self.build(prefix, "a,b", (4, 0, 0))

    def test_a_share_that_is_not_drawn_from_may_be_empty(self, tmp_path: Path) -> None:
        prefix = tiny.write_tokens(tmp_path / "a_text_document", documents=20)
        splits = self.build(prefix, "969,30,1", (4, 0, 0))
        assert splits.valid is None
        assert len(splits.train) >= 4
        sample = splits.train[0]
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()

    def test_caches_of_other_data_are_not_taken(self, tmp_path: Path) -> None:
        prefix = tiny.write_tokens(tmp_path / "a_text_document", documents=40)
        before = self.build(prefix, "1,0,0", (4, 0, 0)).train[0]["tokens"].tolist()
        tiny.write_tokens(prefix, documents=40, seed=5)
        after = self.build(prefix, "1,0,0", (4, 0, 0)).train[0]["tokens"].tolist()
        assert before != after


def test_blend() -> None:
    from qwen3_npu.data.prefixes import blend

    assert blend(["a"]) == (["a"], None)
    assert blend(["0.3", "a", "0.7", "b"]) == (["a", "b"], [0.3, 0.7])
    assert blend(["a", "b"]) == (["a", "b"], None)
    for wrong in (["0.3", "a", "b"], ["0", "a", "1", "b"]):
        with pytest.raises(UsageError, match="--data-path"):
            blend(wrong)
