"""Wrong requests of preference training are one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3_npu.args.preference import PreferenceArgs
from qwen3_npu.args.training import DataArgs
from qwen3_npu.data.train.data_path import check_data
from qwen3_npu.data.train.preference_dataset import PairFiles
from qwen3_npu.data.train.token_file import IndexedWriter, publish
from qwen3_npu.errors import UsageError

NAMES = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def write(prefix: Path, *, counts: tuple[int, int, int, int]) -> str:
    writers = [IndexedWriter(f"{prefix}_packed_{name}_document") for name in NAMES]
    for writer, count in zip(writers, counts, strict=True):
        writer.add(np.arange(4 * count, dtype=np.int32), np.full(count, 4, np.int32))
    publish(writers)
    return str(prefix)


@pytest.mark.parametrize("value", [0.0, -0.1])
def test_beta_must_be_above_zero(value: float) -> None:
    with pytest.raises(UsageError, match=r"--dpo-beta .* must be above 0"):
        PreferenceArgs(dpo_beta=value)


def test_more_than_half_of_the_preferences_cannot_be_wrong() -> None:
    with pytest.raises(UsageError, match=r"--dpo-label-smoothing 0\.5 must be below"):
        PreferenceArgs(dpo_label_smoothing=0.5)


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
