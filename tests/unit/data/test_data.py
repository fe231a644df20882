"""Token files, blends, splits and the order of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tiny
from qwen3_npu.data.train.batches import sample_numbers
from qwen3_npu.data.train.token_file import open_indexed
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


def test_missing_prefix(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data-path .*nothing.*not found"):
        open_indexed(tmp_path / "nothing")


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
        from qwen3_npu.data.train.pretrain_dataset import build_splits

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


PARTS = ("order.npy", "samples.npy", "seal.json")


class TestOrder:
    """The sample at a place depends on data, seed and sequence length, not on how many samples a training asks for."""

    def build(self, data_path: list[str], count: int, seed: int = 1) -> list[list[int]]:
        from qwen3_npu.args.training import DataArgs
        from qwen3_npu.data.train.pretrain_dataset import build_splits

        data = DataArgs(data_path=data_path, split="1,0,0")
        splits = build_splits(data, seq_length=16, seed=seed, samples=(count, 0, 0))
        return [splits.train[i]["tokens"].tolist() for i in range(count)]

    @pytest.mark.parametrize("weights", [None, ("", ""), ("0.3", "0.7")], ids=["one file", "files", "weighted files"])
    def test_a_longer_training_begins_with_the_shorter_one(
        self, tmp_path: Path, weights: tuple | None, process: object
    ) -> None:
        prefixes = [str(tiny.write_tokens(tmp_path / name, documents=n, seed=n)) for name, n in (("a", 9), ("b", 14))]
        words = [word for pair in zip(weights or (), prefixes, strict=False) for word in pair if word]
        data_path = words or prefixes[:1]
        longest = self.build(data_path, 400)
        assert longest[:100] != longest[100:200]
        for count in (20, 45, 60, 130, 250):  # parts of an epoch, a little more than one, several
            assert self.build(data_path, count) == longest[:count], count
        assert self.build(data_path, 20, seed=2) != longest[:20]

    def test_epochs(self, tmp_path: Path) -> None:
        """Each has all tokens, in another order; the first is what megatron makes of a single one."""
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        from qwen3_npu.data.train.pretrain_dataset import _Tokenizer

        prefix = str(tiny.write_tokens(tmp_path / "a", documents=9))
        tokens = open_indexed(prefix).tokens
        per_epoch = (len(tokens) - 1) // 16
        flags = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=16,
            blend=([prefix], None),
            split="1,0,0",
            path_to_cache=str(tmp_path / "megatron"),
            tokenizer=_Tokenizer(),
            create_attention_mask=False,
            **flags,
        )
        theirs = BlendedMegatronDatasetBuilder(GPTDataset, [per_epoch, 0, 0], lambda: True, config).build()[0]
        ours = self.build([prefix], (3 * len(tokens) - 1) // 16)
        assert ours[:per_epoch] == [theirs[i]["tokens"].tolist() for i in range(per_epoch)]
        left = 3 * np.bincount(tokens, minlength=256) - np.bincount(np.concatenate(ours), minlength=256)
        assert left.min() >= 0, "no token comes more often than there are epochs"
        assert left.sum() == 3 * len(tokens) - 16 * len(ours) <= 16, "none is left out but at the very end"
        assert ours[:per_epoch] != ours[per_epoch : 2 * per_epoch]

    def test_a_cache_that_is_damaged_is_made_anew_and_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Zeroed or cut by a crash, of other data, half-written: never trained on."""
        from qwen3_npu import log

        prefix = str(tiny.write_tokens(tmp_path / "a", documents=9))
        right = self.build([prefix], 40)
        order, samples, seal = (next((tmp_path / "cache").rglob(f"*-{part}")) for part in PARTS)
        whole = {path: path.read_bytes() for path in (order, samples, seal)}
        log.setup()
        zeros = whole[order][:128] + bytes(len(whole[order]) - 128)
        damage = [(order, zeros), (order, whole[order][:-8]), (samples, whole[order]), (samples, None)]
        damage += [(seal, whole[seal].replace(b"train", b"valid")), (seal, whole[seal][:20])]
        for path, content in damage:
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            assert self.build([prefix], 40) == right
            assert "made again" in capsys.readouterr().out
            assert path.read_bytes() == whole[path]
        seal.unlink()  # killed before the end
        order.write_bytes(zeros)
        assert self.build([prefix], 40) == right
        assert self.build([prefix], 40) == right
        assert not capsys.readouterr().out

    def test_caches_that_cannot_be_written_say_where_else(self, tmp_path: Path) -> None:
        prefix = str(tiny.write_tokens(tmp_path / "a", documents=9))
        (tmp_path / "cache").touch()
        with pytest.raises(UsageError, match=r"index caches in .*cache.*cannot be written: .*give --data-cache-path"):
            self.build([prefix], 40)


def test_blend() -> None:
    from qwen3_npu.data.train.data_path import blend

    assert blend(["a"]) == (["a"], None)
    assert blend(["0.3", "a", "0.7", "b"]) == (["a", "b"], [0.3, 0.7])
    assert blend(["a", "b"]) == (["a", "b"], None)
    for wrong in (["0.3", "a", "b"], ["0", "a", "1", "b"]):
        with pytest.raises(UsageError, match="--data-path"):
            blend(wrong)


def test_what_data_path_does_not_name(tmp_path: Path) -> None:
    from qwen3_npu.args.training import DataArgs
    from qwen3_npu.data.train.data_path import check_data

    tiny.write_tokens(tmp_path / "wiki_text_document")
    (tmp_path / "alpaca.jsonl").touch()
    said = {
        "alpca.jsonl": "not found: .*did you mean alpaca.jsonl",
        "wiki_txt_document": "not found: .*did you mean wiki_text_document",
        "nowhere/x": "not found",
    }
    for word, message in said.items():
        with pytest.raises(UsageError, match=rf"--data-path {tmp_path / word}: {message}"):
            check_data(DataArgs(data_path=[str(tmp_path / word)]), 256, seq_length=8)
    with pytest.raises(UsageError, match=r"for a data set of the Hugging Face Hub give --handler-name"):
        check_data(DataArgs(data_path=["owner/name"]), 256, seq_length=8)
    data = DataArgs(data_path=[str(tmp_path / "wiki_text_document")], stage="sft")
    with pytest.raises(UsageError, match="holds text, and this training reads instruction data: give --stage pt"):
        check_data(data, 256, seq_length=8)
