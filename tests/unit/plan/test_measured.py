"""The plan's constants and rules against what others measured on devices."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks.planning.fit_devices import error
from benchmarks.planning.megatron_cases import errors, read_golden
from benchmarks.planning.mindspeed_ci import flags_of, read_cases, stage_of
from benchmarks.planning.npu_cases import first_iteration
from benchmarks.planning.published import read_published
from qwen3_npu.plan.device import GIB
from qwen3_npu.plan.memory import start_bytes
from qwen3_npu.plan.parameters import stage_counts


def test_memory_is_what_others_measured_on_npus(real_data: Path) -> None:
    """MindSpeed-LLM's CI, first iteration, of all its ranks: static bytes of 7 in 8, the peak of 8 in 10."""
    path = real_data / "calibration" / "mindspeed_ci.csv"
    if not path.is_file():
        pytest.skip("no calibration data")
    static, peaks, ranks = [], [], 0
    for case in read_cases(path):
        ranks += len(case.measured)
        if case.shape is None:
            continue
        for rank, (after, most) in case.measured.items():
            planned, peak = first_iteration(case, stage_of(case, rank))
            static.append(abs(planned / after - 1))
            peaks.append(abs(peak / most - 1))
    assert ranks > 200
    assert sum(error <= 0.02 for error in static) >= 0.87 * ranks
    assert sum(error <= 0.1 for error in peaks) >= 0.8 * ranks
    assert statistics.median(static) < 0.003, "megabytes of gigabytes"


def test_memory_is_what_others_measured_on_gpus(real_data: Path) -> None:
    """Megatron-LM's functional tests, steady state, of the rows that a plan can express: seen and unseen cases."""
    path = real_data / "calibration" / "megatron_golden.csv"
    if not path.is_file():
        pytest.skip("no calibration data")
    rows = read_golden(path)
    assert len(rows) > 500
    found = list(errors(rows))
    assert len(found) >= 0.84 * len(rows)
    for unseen in (False, True):
        part = [each for each in found if each[0].is_unseen == unseen]
        assert sum(abs(static) <= 0.02 for _, static, _ in part) >= 0.89 * len(part)
        assert sum(abs(peak) <= 0.1 for _, _, peak in part) >= 0.93 * len(part)
    assert sum(abs(peak) <= 0.1 for _, _, peak in found) >= 0.82 * len(rows), "with rows of other kinds of model"


def test_flags_are_read_from_a_script_with_its_variables() -> None:
    script = 'TP=8\nexport SEQ_LENGTH="4096"\nrun --seq-length ${SEQ_LENGTH} --moe --tensor-size $TP \\\n  --bf16'
    assert flags_of(script) == {"seq-length": "4096", "moe": "1", "tensor-size": "8", "bf16": "1"}


def test_step_times_are_those_that_others_published() -> None:
    """Median error over 19 runs of Hopper GPUs; `fit_devices.py` gives the sources, and errors of unseen runs."""
    rows = [row for row in read_published() if row.is_fitted]
    errors = sorted(abs(error(row, {})) for row in rows)
    assert len(errors) == 19
    assert errors[9] <= 0.12
    assert errors[-1] <= 0.2


def test_runs_that_others_saw_run_out_of_memory_do_not_fit() -> None:
    rows = read_published("published_oom.txt")
    assert len(rows) >= 12
    assert not [row.name for row in rows if row.verdict.fits]


def test_the_run_that_asked_for_26_gib_at_once_trained_all_weights() -> None:
    """ms-swift#9403: 30.23 GiB held, 26.44 more asked for: the start of full training, to the digits of the message."""
    (row,) = (row for row in read_published("published_oom.txt") if row.name == "235B on 32 NPUs, as it ran")
    counts = stage_counts(row.shape, row.setup, 0)
    assert f"{2 * counts.expert / GIB:.2f}" == "26.44"
    assert f"{2 * (counts.total + counts.dense) / GIB:.2f}" == "30.23"
    assert start_bytes(row.shape, row.setup, 0) >= 2 * (counts.total + counts.dense + counts.expert)
