"""Killed at whatever change on disk, a training has a whole checkpoint to resume: the new one or the one before."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_resume import BASE

from pairs import write_labelled
from trl_oracle import LOSSES
from worlds import World

# What is there, what is saved, with which flags, and what may be found when that is cut off; None: no checkpoint yet.
SAVES = {
    "the first": ([], 1, [], {None, 1}),
    "the next": ([1], 2, [], {1, 2}),
    "one of many files": ([1], 2, ["--ckpt-format", "torch_dist"], {1, 2}),
    "the same step again": ([1, 2], 2, [], {2}),
    "the only one again": ([2], 2, [], {2}),
    "an earlier step than there is": ([2], 1, [], {1, 2}),
    "one too many": ([1, 2], 3, ["--save-total-limit", "2"], {2, 3}),
}


@pytest.mark.parametrize("name", SAVES)
def test_killed_at_any_change(
    name: str, worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    there, step, extra, expected = SAVES[name]
    flags = [*BASE, "--data-path", tokens, "--load", models["tied"], *extra]
    found = worlds[1].run("kill_cases.saves", flags=flags, root=str(tmp_path), there=there, step=step)
    assert len(found) > 10, "the changes are not noticed"
    assert set(found) == expected
    assert found[-1] == step


def test_a_preference_training_killed_while_it_saves_goes_on_with_the_same_losses(
    worlds: dict[int, World], models: dict[str, str], tmp_path: Path
) -> None:
    """The reference is no part of a checkpoint: it is what the training began with."""
    flags = [*BASE, *LOSSES["kto"], "--seq-length", "64", "--split", "1,0,0"]
    flags += ["--data-path", write_labelled(tmp_path / "answers"), "--ref-model", models["untied"]]
    start, save = ["--load", models["untied"]], ["--save", str(tmp_path / "save")]
    whole = worlds[1].run("train", flags=[*flags, *start], steps=4)["loss"]
    first = worlds[1].run("kill_cases.killed", flags=[*flags, *start, *save], steps=3, changes=7)
    rest = worlds[1].run("train", flags=[*flags, "--load", str(tmp_path / "save")], steps=2)["loss"]
    assert first + rest[1:] == whole
    assert rest[0] == whole[2]
    assert len(set(whole)) == 4
