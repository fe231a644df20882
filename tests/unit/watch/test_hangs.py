"""A hang names its culprit: the right rank, call and line; a healthy job is left alone. See jobs.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


class Job(NamedTuple):
    """What is left of a job: its folder, what its watcher printed, rank -> exit status."""

    folder: Path
    console: str
    exits: dict[str, int]

    def stack(self, rank: int) -> str:
        return (self.folder / "logs" / "hang_step_6" / f"rank_{rank}.txt").read_text()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    root = tmp_path_factory.mktemp("jobs")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(HERE / "jobs.py"), str(root)], check=True, env=env, timeout=60)
    exits = json.loads((root / "exits.json").read_text())
    folders = [path for path in root.iterdir() if path.is_dir()]
    return {path.name: Job(path, (path / "console").read_text(), exits.get(path.name, {})) for path in folders}


# Job -> words of the verdict, in order. Rank 2 has the fault, in step 6; each step calls two collectives.
VERDICTS = {
    "stopped": [
        "rank 2 (",
        "does not run: it is stopped",
        "step 6, data",
        "after all_gather_into_tensor #10",
        "3 wait",
    ],
    "sleeps": [
        "rank 2 (",
        "never entered all_reduce #11 of group world (4 ranks; 3 wait since",
        "in data",
        "read_slowly",
    ],
    "sleeps_on_two_nodes": ["rank 2 (", "device 0) never entered all_reduce #11 of group world (4 ranks; 3 wait"],
    "skipped": [
        "order mismatch at call #11 of group world: rank 2",
        "calls all_gather_into_tensor",
        "3 others",
        "all_reduce",
    ],
    "swapped": [
        "order mismatch at call #11 of group world: rank 2",
        "calls all_gather_into_tensor",
        "3 others",
        "all_reduce",
    ],
    "skipped_in_pairs": [
        "between groups: rank 2",
        "all_reduce #6 of group of ranks 2, 3",
        "rank 3",
        "#6 of group world",
    ],
    "lost_message": ["between groups: rank 2", "all_reduce #7 of group world", "rank 0", "recv #6", "rank 2 to 0"],
    "wrong_shape": ["mismatch in all_reduce #11 of group world: rank 2", "float32 [5]", "3 others", "float32 [4]"],
    "holds_the_lock": ["rank 2 (", "never entered all_reduce #11 of group world", "hold_the_lock"],
    "second_thread": [
        "rank 2 (",
        "never entered all_reduce #",
        "of group world",
        "(read_slowly); the main thread waits for its turn at ",
        "jobs.py",
        "(turn)",
    ],
    "maximum": ["mismatch in all_reduce #11 of group world: rank 2", "float32 [4] for max", "3 others", "float32 [4]"],
    "goes_on": ["rank 2 (", "never entered all_reduce #11", "(step)", "progress again after"],
}


@pytest.mark.parametrize("name", VERDICTS)
def test_one_verdict_names_rank_and_call(name: str, jobs: dict[str, Job]) -> None:
    console = jobs[name].console
    assert console.count("warning: no progress for") == 1, console
    at = console.index("warning: no progress for")
    for words in VERDICTS[name]:
        assert words in console[at:], f"{words!r}: {console}"
        at = console.index(words, at)


def test_a_dead_rank_is_named(jobs: dict[str, Job]) -> None:
    assert "warning: rank 2 (" in jobs["killed"].console
    assert "is dead: process" in jobs["killed"].console
    assert jobs["killed"].exits["2"] == -9


@pytest.mark.parametrize("name", ["stopped", "sleeps", "sleeps_on_two_nodes"])
def test_abort_ends_all_ranks_and_tells_torchrun(name: str, jobs: dict[str, Job]) -> None:
    assert jobs[name].exits == {str(rank): -9 for rank in range(4)}
    for rank in range(4):
        said = json.loads((jobs[name].folder / f"error_{rank}.json").read_text())["message"]
        assert "no progress for" in said["message"]
        assert "rank 2 (" in said["extraInfo"]["py_callstack"]


def test_the_report_has_the_stacks_and_calls_of_all_ranks(jobs: dict[str, Job]) -> None:
    job = jobs["sleeps"]
    assert "in read_slowly" in job.stack(2)
    assert "all_gather_into_tensor #10 float32 [4], left" in job.stack(2)
    for rank in (0, 1, 3):
        assert "all_reduce #11 float32 [4], inside" in job.stack(rank)
        assert "in wait" in job.stack(rank)
    assert "no stacks" in jobs["stopped"].stack(2)


def test_a_slow_rank_is_named_with_its_phase(jobs: dict[str, Job]) -> None:
    lines = [line for line in jobs["slow"].console.splitlines() if "straggler" in line]
    assert len(lines) == 1
    assert "rank 2 (" in lines[0]
    assert "3 times 5 steps; most of it in forward" in lines[0]
    assert "no progress" not in jobs["slow"].console


def test_a_healthy_job_with_pauses_is_left_alone(jobs: dict[str, Job]) -> None:
    assert jobs["healthy"].console == ""
    assert jobs["healthy"].exits == {str(rank): 0 for rank in range(4)}
    assert not (jobs["healthy"].folder / "logs").exists()
