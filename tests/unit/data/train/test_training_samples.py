"""What training reads: samples, their order, rows with shifted labels and document boundaries, prepared raw data."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lines import write_lines

from qwen3_npu.data.train.order import Blend, Epochs, shuffled
from qwen3_npu.data.train.rows import (
    Padding,
    boundaries_at_eod,
    find_eod,
    instruction_rows,
    padding_multiple,
    positions,
    pretraining_rows,
    segment_boundaries,
)
from qwen3_npu.data.train.sft_dataset import (
    InstructionFiles,
    Kind,
    TokenSample,
    instruction_splits,
    open_instructions,
    split_ranges,
)
from qwen3_npu.data.train.token_file import IndexedWriter, open_indexed
from qwen3_npu.data.train.turns import turns_of
from qwen3_npu.errors import UsageError


def write_samples(prefix: Path, samples: list[tuple[list[int], list[int], list[int]]]) -> str:
    """ids, labels and mask of each sample, as preprocess_data.py writes them."""
    for name, column in zip(("input_ids", "labels", "attention_mask"), zip(*samples, strict=True), strict=True):
        writer = IndexedWriter(f"{prefix}_packed_{name}_document")
        writer.add(np.array([t for row in column for t in row]), np.array([len(row) for row in column]))
        writer.close()
    return str(prefix)


def single(count: int, start: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """Conversations of two given and two learned tokens, each telling its number."""
    return [([start + i, 1, 2, 3], [-100, -100, 2, 3], [1] * 4) for i in range(count)]


NEAT = ([5, 6, 7, 8, 9, 0, 0, 0], [-100, 6, -100, 8, 9, -100, -100, -100], [1, 1, 2, 2, 2, 0, 0, 0])


# ------------------------------------------------------------------------------------------ order


def test_every_epoch_has_every_sample_once_in_another_order() -> None:
    order = Epochs(100, seed=7)
    epochs = [[order[e * 100 + i] for i in range(100)] for e in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Epochs(100, seed=7)[i] for i in range(150, 250)] == epochs[1][50:] + epochs[2][:50]
    assert [Epochs(100, seed=8)[i] for i in range(100)] != epochs[0]
    assert [Epochs(3, 7, shuffle=False)[i] for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_the_order_never_changes() -> None:
    """Numbers of the first release: a resumed training must meet the same samples with any later version."""
    assert shuffled(10, 1234, 0).tolist() == [7, 2, 6, 5, 0, 4, 8, 1, 3, 9]


def test_blends_are_in_proportion_at_every_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    blend = Blend(weights * 8)
    chosen = [blend[n] for n in range(3000)]
    given: Counter[int] = Counter()
    for n, (source, number) in enumerate(chosen, start=1):
        assert number == given[source], "each set in its own order, none left out"
        given[source] += 1
        assert all(abs(given[i] - n * w) <= 1 for i, w in enumerate(weights))
    monkeypatch.setattr("qwen3_npu.data.train.order._BLOCK", 16)
    small = Blend(weights)
    assert [small[n] for n in range(1000)] == chosen[:1000], "blocks do not show"
    assert [small[n] for n in (999, 5, 500)] == [chosen[999], chosen[5], chosen[500]]


def test_samples_of_a_blend(tmp_path: Path) -> None:
    prefixes = [write_samples(tmp_path / "a", single(30)), write_samples(tmp_path / "b", single(10, 100))]
    files = open_instructions(prefixes, per_document=True)
    splits = instruction_splits(files, [3.0, 1.0], "80,20,0", longest=8, seed=1)
    assert splits.train is not None
    assert splits.valid is not None
    assert splits.test is None
    seen = Counter(int(splits.train[n].ids[0]) for n in range(32))
    assert seen == {**dict.fromkeys(range(24), 1), **dict.fromkeys(range(100, 108), 1)}
    assert len(splits.train) == 32
    assert splits.train.locate(0)[0] in prefixes
    assert [int(splits.valid[n].ids[0]) for n in range(4)] == [24, 25, 108, 26], "never shuffled"


def test_split_ranges() -> None:
    assert split_ranges("969,30,1", 1000) == [range(0, 969), range(969, 999), range(999, 1000)]
    assert split_ranges("100", 3) == [range(0, 3), range(3, 3), range(3, 3)]
    for wrong in ("a,b", "0,0,0", "1,2,3,4", "-1,2"):
        with pytest.raises(UsageError, match="--split"):
            split_ranges(wrong, 10)


# -------------------------------------------------------------------------------------- the files


def test_kinds_and_refusals(tmp_path: Path) -> None:
    plain = ([5, 6, 7, 0], [-100, 6, 7, -100], [1] * 4)
    kinds = {
        Kind.SINGLE: single(3),
        Kind.PACK: [plain, plain],
        Kind.NEAT_PACK: [NEAT, NEAT],
    }
    for kind, samples in kinds.items():
        prefix = write_samples(tmp_path / kind.name, samples)
        assert InstructionFiles(prefix).kind is kind
        if kind is Kind.PACK:
            with pytest.raises(UsageError, match="--pack --neat-pack"):
                open_instructions([prefix], per_document=True)
        open_instructions([prefix], per_document=kind is not Kind.PACK)
    write_samples(tmp_path / "x", single(2))
    for end in (".bin", ".idx"):
        (tmp_path / f"x_packed_labels_document{end}").write_bytes(
            (tmp_path / f"PACK_packed_labels_document{end}").read_bytes()
        )
    InstructionFiles(str(tmp_path / "x"))  # the same lengths
    write_samples(tmp_path / "y", single(3))
    for end in (".bin", ".idx"):
        (tmp_path / f"y_packed_labels_document{end}").write_bytes(
            (tmp_path / f"PACK_packed_labels_document{end}").read_bytes()
        )
    with pytest.raises(UsageError, match="does not belong to"):
        InstructionFiles(str(tmp_path / "y"))
    (tmp_path / "y_packed_attention_mask_document.idx").unlink()
    with pytest.raises(UsageError, match="not found"):
        InstructionFiles(str(tmp_path / "y"))


def test_long_conversations_are_cut_turn_by_turn(tmp_path: Path) -> None:
    ids = list(range(40))
    labels = [-100 if i < 20 or 24 <= i < 30 else i for i in ids]
    files = InstructionFiles(write_samples(tmp_path / "a", [(ids, labels, [1] * 40), *single(1)]))
    assert turns_of(np.array(labels)) == [(20, 4), (6, 10)]
    sample = files.sample(0, 30)
    assert sample.ids.tolist() == [*range(20), *range(20, 24), *range(24, 27), *range(30, 33)]
    assert sample.labels.tolist() == [-100] * 20 + [20, 21, 22, 23] + [-100] * 3 + [30, 31, 32]
    assert files.sample(0, 40).ids.tolist() == ids
    assert turns_of(np.array([1, -100])) == [(0, 1), (1, 0)]


# ------------------------------------------------------------------------------------------- rows


def test_labels_are_shifted_and_rows_padded() -> None:
    samples = [
        TokenSample(np.array([5, 6, 7, 8, 9]), np.array([-100, -100, 7, 8, 9]), None),
        TokenSample(np.array([3, 4]), np.array([-100, 4]), None),
    ]
    rows = instruction_rows(samples, Padding(0, None, 4), per_document=False)
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [3, 4, 0, 0, 0, 0, 0, 0]]
    assert rows.labels.tolist() == [[0, 7, 8, 9, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0]]
    assert rows.loss_mask.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert rows.positions[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert rows.cu_seqlens is None
    assert instruction_rows(samples, Padding(0, 16), per_document=False).tokens.shape == (2, 16)
    laid = instruction_rows(samples, Padding(0, None, 4), per_document=True)
    assert laid.tokens.tolist() == [rows.tokens.reshape(-1).tolist()], "one after the other"
    assert laid.labels.tolist() == [rows.labels.reshape(-1).tolist()]
    assert laid.cu_seqlens == (0, 5, 8, 10, 16), "a sample, its padding, and so on"


def test_padding_fits_the_parallel_layout() -> None:
    assert padding_multiple(8, tensor=1, context=1) == 8
    assert padding_multiple(8, tensor=4, context=2) == 16
    assert padding_multiple(1, tensor=3, context=1) == 3


def test_packs_keep_their_borders() -> None:
    pack = TokenSample(*(np.array(part) for part in NEAT))
    rows = instruction_rows([pack, pack], Padding(0, 8), per_document=True)
    assert rows.cu_seqlens == (0, 2, 5, 8, 10, 13, 16), "padding is one document"
    assert rows.tokens.shape == (1, 16)
    assert rows.positions[0, :8].tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    # Token 6 does not predict 7, the first of the next document; 5 predicts 6; 7 predicts 8.
    assert rows.labels[0, :8].tolist() == [6, 0, 8, 9, 0, 0, 0, 0]
    assert rows.loss_mask[0, :8].tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    through = instruction_rows([pack], Padding(0, 8), per_document=True, reset_positions=False)
    assert through.positions.tolist() == [list(range(8))]
    assert instruction_rows([pack], Padding(0, 8), per_document=False).cu_seqlens is None


def test_a_learned_first_token_is_not_predicted_by_the_document_before_it() -> None:
    pack = TokenSample(np.array([5, 6, 7, 0]), np.array([5, 6, 7, -100]), np.array([1, 1, 2, 0]))
    rows = instruction_rows([pack], Padding(0, 4), per_document=True)
    assert rows.loss_mask.tolist() == [[1, 0, 0, 0]]


def test_documents_of_pretraining_text() -> None:
    tokens = np.array([4, 9, 5, 6, 9, 7])
    assert boundaries_at_eod(tokens, 9) == [0, 2, 5, 6]
    assert boundaries_at_eod(tokens[:5], 9) == [0, 2, 5]
    assert boundaries_at_eod(tokens[2:4], 9) == [0, 2]
    assert segment_boundaries(np.array([1, 1, 2, 0, 0])) == [0, 2, 3, 5]
    assert positions([0, 2, 5, 6]).tolist() == [0, 1, 0, 1, 2, 0]
    labels = np.array([[9, 5, 6, 9, 7, 8]])
    make = functools.partial(pretraining_rows, tokens[None], labels, np.ones((1, 6), np.float32), eod=9)
    rows = make(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    assert rows.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert rows.cu_seqlens == (0, 2, 5, 6)
    assert rows.loss_mask.tolist() == [[1, 0, 1, 1, 0, 1]]
    rows = make(reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False)
    assert (rows.positions.tolist(), rows.cu_seqlens, rows.loss_mask.sum()) == ([list(range(6))], None, 6)


def test_pretraining_rows_are_megatrons() -> None:
    import torch
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    rng = np.random.default_rng(3)
    for _ in range(20):
        tokens = rng.integers(0, 4, 24)
        for flags in ((a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)):
            mask, loss, place = _get_ltor_masks_and_position_ids(torch.from_numpy(tokens), 3, *flags, True)
            names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
            options = dict(zip(names, flags, strict=True))
            rows = pretraining_rows(tokens[None], tokens[None], np.ones((1, 24), np.float32), eod=3, **options)
            assert rows.positions[0].tolist() == place.tolist()
            assert rows.loss_mask[0].tolist() == loss.tolist()
            boundaries = rows.cu_seqlens or (0, 24)
            document = np.repeat(np.arange(len(boundaries) - 1), np.diff(boundaries))
            seen = (document[:, None] == document) & np.tri(24, dtype=bool)
            assert np.array_equal(seen, ~mask[0].numpy())


def test_find_eod(tmp_path: Path) -> None:
    for name, tokens in (("good", [1, 9, 2, 3, 9]), ("bad", [1, 9, 2, 3, 4])):
        writer = IndexedWriter(tmp_path / name)
        writer.add(np.array(tokens), np.array([2, 3]))
        writer.close()
    assert find_eod(open_indexed(tmp_path / "good"), "--reset-attention-mask") == 9
    with pytest.raises(UsageError, match=r"--reset-attention-mask: .*--append-eod"):
        find_eod(open_indexed(tmp_path / "bad"), "--reset-attention-mask")


# --------------------------------------------------------------------------------------- raw data


@pytest.fixture
def recipe(tiny_tokenizer: str) -> Callable:
    from qwen3_npu import cli
    from qwen3_npu.args.preprocess import FOREIGN, GROUPS, PreprocessArgs

    def make(*flags: str) -> PreprocessArgs:
        words = ["--input", "-", "--tokenizer-name-or-path", tiny_tokenizer, *flags]
        return PreprocessArgs(*cli.parse("x", "", GROUPS, FOREIGN, argv=words).groups)

    return make


def test_raw_pairs_are_found_where_they_were_made(tmp_path: Path, recipe: Callable) -> None:
    from qwen3_npu.data.preprocess.cache import is_raw, prepare_data_path

    records = [{"instruction": "q", "chosen": "yes", "rejected": f"no {number}"} for number in range(3)]
    source = write_lines(tmp_path / "pairs.jsonl", records)
    flags = ("--handler-name", "AlpacaStylePairwiseHandler", "--prompt-type", "qwen3")
    (made,) = prepare_data_path([str(source)], recipe(*flags), tmp_path / "cache")
    assert len(open_indexed(f"{made}_packed_chosen_input_ids_document")) == 3
    Path(made).mkdir()
    assert not is_raw(made), "a folder beside a pair has its name"


def test_raw_data_is_prepared_once(tmp_path: Path, recipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_npu.data.preprocess import cache as prepare

    source = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    ready = IndexedWriter(tmp_path / "ready")
    ready.add(np.array([1]), np.array([1]))
    ready.close()
    text = recipe("--handler-name", "GeneralPretrainHandler", "--append-eod")
    made = prepare.prepare_data_path(["0.3", str(source), "0.7", str(tmp_path / "ready")], text, tmp_path / "cache")
    assert made[0::2] == ["0.3", "0.7"]
    assert made[3] == str(tmp_path / "ready")
    assert len(open_indexed(made[1])) == 2
    again = functools.partial(prepare.prepare_data_path, [str(source)], cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "preprocess", lambda args: pytest.fail("it is there"))
        assert again(text) == [made[1]]
        source.touch()  # another time, the same content
        assert again(text) == [made[1]]
    assert again(recipe("--handler-name", "GeneralPretrainHandler")) != [made[1]], "other flags"
    write_lines(source, [{"text": "three"}])
    assert again(text) != [made[1]], "other content"
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_raw_conversations_and_failures(tmp_path: Path, recipe: Callable) -> None:
    from qwen3_npu.data.preprocess.cache import prepare_data_path

    source = write_lines(tmp_path / "a.jsonl", [{"instruction": "q", "input": "", "output": "a"}])
    chat = recipe("--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3")
    (prefix,) = prepare_data_path([str(source)], chat, tmp_path / "cache")
    assert InstructionFiles(prefix).kind is Kind.SINGLE
    assert prepare_data_path([prefix], chat, tmp_path / "cache") == [prefix], "a bare prefix is data already"
    broken = write_lines(tmp_path / "b.jsonl", [{"x": 1}])
    before = sorted((tmp_path / "cache").iterdir())
    with pytest.raises(UsageError, match=r"b.jsonl:1"):
        prepare_data_path([str(broken)], chat, tmp_path / "cache")
    assert sorted((tmp_path / "cache").iterdir()) == before
    assert prepare_data_path(["no/such/prefix"], chat, tmp_path / "cache") == ["no/such/prefix"]


def test_a_data_set_of_the_hub_is_prepared_like_a_file(
    tmp_path: Path, recipe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from qwen3_npu.data.preprocess.cache import is_raw, prepare_data_path

    asked = []

    def load(name: str, **arguments: object) -> datasets.IterableDataset:
        asked.append((name, arguments))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parameters.json").write_text('{"split": "test"}')
    flags = ("--handler-name", "GeneralPretrainHandler", "--hf-datasets-params", "parameters.json")
    (made,) = prepare_data_path(["owner/texts"], recipe(*flags), tmp_path / "cache")
    assert len(open_indexed(made)) == 2
    assert prepare_data_path(["owner/texts"], recipe(*flags), tmp_path / "cache") == [made]
    assert asked == [("owner/texts", {"split": "test", "streaming": True})], "once"
    assert not is_raw("owner/texts"), "nobody has said what its records are"
    (tmp_path / "owner").mkdir()
    assert not is_raw("owner/texts", takes_names=True), "a mistyped file"


def test_whoever_is_faster(tmp_path: Path, recipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_npu.data.preprocess import cache as prepare

    source = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    text = recipe("--handler-name", "GeneralPretrainHandler")
    real = prepare.preprocess

    def slow(args: object) -> int:
        real(args)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "preprocess", real)
            patch.setattr("os.getpid", lambda: 1)
            prepare.prepare_data_path([str(source)], text, tmp_path / "cache")
        return 0

    monkeypatch.setattr(prepare, "preprocess", slow)
    (prefix,) = prepare.prepare_data_path([str(source)], text, tmp_path / "cache")
    assert len(open_indexed(prefix)) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert json.loads((tmp_path / "cache" / "digests.json").read_text())
