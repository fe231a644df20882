"""Bad numbers, signals, and ranks that fail: all ranks do the same, and what is wrong is said last."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_resume import BASE

from qwen3_npu.parity.rows import PP2, TP2, ZERO
from worlds import World, free_port

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("size", "extra", "rank"), [(2, ZERO, 1), (4, TP2 + PP2, 2)], ids=["DP2", "TP2 PP2"])
def test_a_nan_on_one_rank_skips_the_update_on_all(
    size: int, extra: list[str], rank: int, worlds: dict[int, World], models: dict[str, str], tokens: str
) -> None:
    flags = [*BASE, "--load", models["untied"], "--data-path", tokens, *extra]
    for one in worlds[size].run("poisoned", flags=flags, rank=rank, steps=[2]):
        assert one["skipped"] == [False, True, False, False]
        assert one["changed"] == [True, False, True, True]
        assert one["updates"] == 3
        assert one["stopped"] is None


def test_too_many_bad_steps_in_a_row_stop_the_training(
    worlds: dict[int, World], models: dict[str, str], tokens: str
) -> None:
    flags = [*BASE, "--load", models["untied"], "--data-path", tokens, "--max-skipped-updates", "1"]
    for one in worlds[2].run("poisoned", flags=flags, rank=1, steps=[2, 3]):
        assert one["skipped"] == [False, True]
        assert "above --max-skipped-updates 1" in one["stopped"]
        assert "the weights are those of step 1" in one["stopped"]


def test_a_signal_to_one_rank_saves_and_stops_all(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    flags = [*BASE, "--load", models["tied"], "--data-path", tokens, *TP2, "--save", str(tmp_path)]
    assert worlds[2].run("signalled", flags=[*flags, "--exit-signal-handler"], rank=1, step=2) == [2, 2]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert worlds[2].run("signalled", flags=[*flags, "--exit-duration-in-mins", "0"], rank=-1, step=0) == [1, 1]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


def test_a_rank_that_fails_ends_the_job(models: dict[str, str], tokens: str) -> None:
    """Within seconds, with its error as the last word, though the other rank waits for it in a collective."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(ROOT / "tests" / "parallel" / "support" / "failing.py")]
    flags = [*BASE, "--load", models["tied"], "--data-path", tokens, *TP2, "--log-interval", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    failed_at = None
    for line in job.stdout:
        lines.append(line)
        if failed_at is None and "memory of this device is broken" in line:
            failed_at = time.monotonic()
    assert job.wait() != 0
    assert failed_at is not None, "".join(lines)
    assert time.monotonic() - failed_at < 30
    end = "".join(lines[-6:])
    assert "RuntimeError: memory of this device is broken" in end


def test_every_group_waits_as_long_as_asked(worlds: dict[int, World], models: dict[str, str], tokens: str) -> None:
    flags = [*BASE, "--data-path", tokens, "--load", models["untied"], "--distributed-timeout-minutes", "1.5"]
    waits = worlds[2].run("longest_waits", flags=[*flags, "--tensor-model-parallel-size", "2", "--sequence-parallel"])
    assert len(waits) > 10
    assert set(waits) == {90.0}


def test_groups_end_while_their_threads_are_busy(worlds: dict[int, World]) -> None:
    """torch 2.7 by itself waits for ever within the first few."""
    assert worlds[1].run("busy_ends", timeout=60) > 100


def test_nodes_that_see_other_folders_or_data_are_named(worlds: dict[int, World], tmp_path: Path) -> None:
    here, there = str(tmp_path), str(tmp_path / "other")
    Path(there).mkdir()
    run = worlds[2].run
    assert run("refused_by_nodes", folders=[here, here], digests=["a", None]) == ["", ""]
    folder, data = run("refused_by_nodes", folders=[here, there], digests=["a", "b"])
    assert f"--save {here}: not seen from all nodes" in folder
    assert f"--data-path x on {os.uname().nodename} is not what it is on" in data
    assert not list(tmp_path.rglob(".shared-*"))


def test_nodes_may_have_copies_of_data_and_caches(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        for ending in (".bin", ".idx"):
            (tmp_path / str(rank) / f"text{ending}").write_bytes(Path(tokens + ending).read_bytes())
    flags = [*BASE, "--load", models["untied"], *ZERO]
    expected = worlds[2].run("train", flags=[*flags, "--data-path", "1", tokens], steps=2)
    copies = ["--data-path", "1", f"{tmp_path}/RANK/text"]
    assert worlds[2].run("train_on_copies", flags=[*flags, *copies], steps=2)["loss"] == expected["loss"]
    assert {path.parts[-4] for path in tmp_path.rglob("*-order.npy")} == {"0", "1"}
