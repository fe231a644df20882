"""Wrong requests of preference training are one line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qwen3_npu.args.preference import PREFERENCE_STAGES, PreferenceArgs
from qwen3_npu.args.training import DataArgs
from qwen3_npu.data.preprocess.sft_handler import Style, _fitted
from qwen3_npu.data.text.templates import QWEN
from qwen3_npu.data.train.data_path import check_data
from qwen3_npu.data.train.preference_dataset import Labelled, LabelledFiles, PairFiles, labelled_rows
from qwen3_npu.data.train.rows import Padding
from qwen3_npu.data.train.sft_dataset import TokenSample
from qwen3_npu.data.train.token_file import IndexedWriter, publish
from qwen3_npu.errors import UsageError

NAMES = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def write(prefix: Path, *, counts: tuple[int, int, int, int]) -> str:
    writers = [IndexedWriter(f"{prefix}_packed_{name}_document") for name in NAMES]
    for writer, count in zip(writers, counts, strict=True):
        writer.add(np.arange(4 * count, dtype=np.int32), np.full(count, 4, np.int32))
    publish(writers)
    return str(prefix)


def test_as_many_rejected_as_chosen_answers_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 chosen answers and 3 rejected ones"):
        PairFiles(write(tmp_path / "p", counts=(2, 2, 3, 3)))


def test_labels_belong_to_their_answers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="chosen_labels_document does not belong to"):
        PairFiles(write(tmp_path / "p", counts=(2, 3, 2, 2)))


def test_pairs_are_not_conversations(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p", counts=(2, 2, 2, 2))
    with pytest.raises(UsageError, match="holds pairs, and this training reads instruction data: give --stage dpo"):
        check_data(DataArgs(data_path=[prefix], stage="sft"), 256, seq_length=32)


def test_ids_of_pairs_are_looked_at(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p", counts=(2, 2, 2, 2))
    with pytest.raises(UsageError, match="chosen_input_ids_document"):
        check_data(DataArgs(data_path=[prefix], stage="dpo"), 5, seq_length=32)


@pytest.mark.parametrize(
    ("flags", "micro", "words"),
    [
        ({}, 1, "--micro-batch-size 1: --stage kto compares each prompt"),
        ({"ref_logprobs": "cache"}, 2, "--ref-logprobs cache: --stage kto"),
    ],
)
def test_what_kto_cannot_do_is_one_line(flags: dict, micro: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PreferenceArgs(**flags).check_kto(micro)


@pytest.mark.parametrize(
    ("stage", "flags", "words"),
    [
        ("kto", {"is_pairwise_dataset": True}, "--is-pairwise-dataset has no effect with --stage kto; it belongs to "),
        ("kto", {"pref_ftx": 0.1}, "--pref-ftx 0.1 has no effect with --stage kto; it belongs to --stage dpo or orpo"),
        ("rm", {"ref_model": "x"}, "--ref-model x has no effect with --stage rm; it belongs to --stage dpo or kto"),
        ("rm", {"dpo_beta": 0.2}, "--dpo-beta 0.2 has no effect with --stage rm"),
        ("dpo", {"center_rewards_coefficient": 0.1}, "--center-rewards-coefficient 0.1 has no effect with --stage dpo"),
        ("orpo", {"ref_logprobs": "cache"}, "--ref-logprobs cache has no effect with --stage orpo"),
        ("sft", {"dpo_loss_type": "ipo"}, "--dpo-loss-type ipo has no effect with --stage sft; it belongs to "),
    ],
)
def test_a_flag_that_says_nothing_to_a_stage_is_refused(stage: str, flags: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PreferenceArgs(**flags).check_stage(stage)


def test_every_flag_belongs_to_a_stage() -> None:
    for stage in ("pt", "sft", *PREFERENCE_STAGES):
        PreferenceArgs().check_stage(stage)


def test_kto_needs_a_weight_above_zero() -> None:
    with pytest.raises(UsageError, match="nothing would be learned"):
        PreferenceArgs(desirable_weight=0, undesirable_weight=0)


def labelled(prefix: Path, desirable: list[list[int]]) -> str:
    columns = ("input_ids", [[3, 4, 5]] * 2), ("labels", [[-100, 4, 5]] * 2), ("desirable", desirable)
    writers = []
    for name, rows in columns:
        writers.append(IndexedWriter(f"{prefix}_packed_answer_{name}_document"))
        for row in rows:
            writers[-1].add(np.array(row, np.int32), np.array([len(row)], np.int32))
    publish(writers)
    return str(prefix)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[1]], "does not hold one label for each of 2"),
        ([[1], [0, 1]], "does not hold one label for each of 2"),
        ([[1], [2]], "other labels than 0 and 1"),
    ],
)
def test_every_answer_has_one_label(labels: list[list[int]], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        LabelledFiles(labelled(tmp_path / "k", labels))


def test_labelled_answers_are_no_pairs(tmp_path: Path) -> None:
    prefix = labelled(tmp_path / "k", [[1], [0]])
    check_data(DataArgs(data_path=[prefix], stage="kto"), 256, seq_length=32)
    with pytest.raises(UsageError, match="holds labelled answers, and this training reads pairs: give --stage kto"):
        check_data(DataArgs(data_path=[prefix], stage="dpo"), 256, seq_length=32)
    with pytest.raises(UsageError, match="answer_input_ids_document"):
        check_data(DataArgs(data_path=[prefix], stage="kto"), 5, seq_length=32)


def test_a_prompt_with_the_answer_before_it_follows_each_answer() -> None:
    """As TRL's collator: prompt i with completion i - 1 of the micro-batch. Too long ones are cut."""
    samples = []
    for prompt, answer in (([2, 3], [10]), ([4], [11, 12]), ([5, 6, 7], [13, 14, 15])):
        labels = np.array([-100] * len(prompt) + answer, np.int32)
        samples.append(Labelled(TokenSample(np.array(prompt + answer, np.int32), labels, None), len(prompt) > 1))
    rows = labelled_rows(samples, Padding(0, 8), longest=5, packed=False)
    found = [row[row != 0].tolist() for row in rows.tokens]
    assert found[0::2] == [[2, 3, 10], [4, 11, 12], [5, 6, 7, 13, 14, 15]]
    assert found[1::2] == [[2, 3, 13, 14, 15], [4, 10], [5, 6, 7, 11, 12]]
    assert rows.loss_mask.sum(1).tolist() == [1, 3, 2, 1, 3, 2]
    assert rows.answers is not None
    assert rows.answers.desirable is not None
    assert rows.answers.desirable.tolist() == [1, 0, 1]


def test_a_start_says_which_pairs_are_cut_and_refuses_those_without_an_answer(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p", counts=(10, 10, 10, 10))  # of 4 tokens
    data = DataArgs(data_path=[prefix], stage="dpo", split="8,2,0")
    facts = check_data(data, 256, seq_length=3)
    assert (facts.samples, facts.truncated, facts.truncated_tokens) == (8, 8, 16)
    assert check_data(data, 256, seq_length=4).truncated == 0
    writers = [IndexedWriter(f"{tmp_path / 'q'}_packed_{name}_document") for name in NAMES]
    for writer, name in zip(writers, NAMES, strict=True):
        writer.add(np.full(8, -100 if name == "rejected_labels" else 5, np.int32), np.full(2, 4, np.int32))
    publish(writers)
    with pytest.raises(UsageError, match="q_packed_rejected_labels_document holds no token to learn"):
        check_data(DataArgs(data_path=[str(tmp_path / "q")], stage="dpo", split="1,0,0"), 256, seq_length=8)


def test_a_pair_whose_answers_find_no_room_is_left_out_and_counted() -> None:
    """LLaMA-Factory's rule gives 30 tokens after 10,000 no place among 50: int(50 * 30 / 10030) is 0."""
    counts: Counter[str] = Counter()
    style = Style(template=QWEN, thinking=None, eod=None, longest=50, truncates=True)
    prompt, answer = np.arange(10000, dtype=np.int32), np.arange(30, dtype=np.int32)
    assert _fitted(style, prompt, [answer, answer[:3]], counts) == []
    assert counts["samples without anything to learn"] == 1
    ids, labels, *_ = _fitted(style, prompt, [answer[:20], answer[:3]], counts)
    assert (len(ids), (labels != -100).sum()) == (50, 20)
