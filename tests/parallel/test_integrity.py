"""Damaged checkpoints are found, named and passed over; failures to save are said aloud; old checkpoints go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_resume import BASE

from qwen3_npu.parity.rows import TP2, ZERO
from worlds import World

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def saved(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Format -> checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("saved")
    for ckpt_format in ("torch", "torch_dist"):
        save = ["--save", str(root / ckpt_format), "--ckpt-format", ckpt_format]
        worlds[2].run(
            "checkpoints", flags=[*BASE, *TP2, "--data-path", tokens, "--load", models["tied"], *save], steps=2
        )
    return {ckpt_format: root / ckpt_format for ckpt_format in ("torch", "torch_dist")}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "truncated weights": ("torch", "mp_rank_01/model_optim_rng.pt", cut, "bytes, not"),
    "a flipped bit in the optimizer": ("torch", "mp_rank_00/optimizer.pt", flip, "its xxh3_128 digest is another"),
    "no weights": ("torch", "mp_rank_00/model_optim_rng.pt", Path.unlink, "is missing"),
    "no folder": ("torch", ".", shutil.rmtree, "does not exist"),
    "a manifest of nothing": ("torch", "integrity.json", lambda p: p.write_text("[]"), "cannot be read"),
    "a truncated manifest": ("torch_dist", "integrity.json", cut, "cannot be read"),
    "a flipped bit in a chunk": ("torch_dist", "__1_0.distcp", flip, "its xxh3_128 digest is another"),
    "truncated metadata": ("torch_dist", ".metadata", cut, "bytes, not"),
    "no common.pt": ("torch_dist", "common.pt", Path.unlink, "is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    name: str, worlds: dict[int, World], saved: dict[str, Path], tokens: str, tmp_path: Path
) -> None:
    ckpt_format, file, damage, message = DAMAGE[name]
    folder = Path(shutil.copytree(saved[ckpt_format], tmp_path / "save"))
    damage(folder / "iter_0000002" / file)
    answer = worlds[2].run("resumed", flags=[*BASE, *TP2, "--data-path", tokens, "--load", str(folder)])
    assert answer["error"] is None
    assert answer["iteration"] == 1
    (named,) = (line for line in answer["said"] if "damaged checkpoint" in line)
    assert str(folder / "iter_0000002" / file).removesuffix("/.") in named
    assert message in named
    assert any("iter_0000001 is the newest complete checkpoint" in line for line in answer["said"])


def test_none_is_whole(worlds: dict[int, World], saved: dict[str, Path], tokens: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["torch"], tmp_path / "save"))
    flags = [*BASE, *TP2, "--data-path", tokens, "--load", str(folder)]
    flip(folder / "iter_0000002" / "mp_rank_01" / "optimizer.pt")
    one = worlds[2].run("resumed", flags=[*flags, "--ckpt-step", "2"])
    assert "holds no complete checkpoint (damaged: iter_0000002;" in one["error"], (
        "the step that was asked for, or none"
    )
    flip(folder / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt")
    none = worlds[2].run("resumed", flags=flags)
    assert "holds no complete checkpoint (damaged: iter_0000002, iter_0000001;" in none["error"]


def test_killed_before_the_first_tracker(
    worlds: dict[int, World], saved: dict[str, Path], tokens: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved["torch_dist"], tmp_path / "save"))
    (folder / TRACKER).unlink()
    answer = worlds[2].run("resumed", flags=[*BASE, *TP2, "--data-path", tokens, "--load", str(folder)])
    assert answer["iteration"] == 2


def test_without_a_manifest_nothing_is_checked_aloud(
    worlds: dict[int, World], saved: dict[str, Path], tokens: str, tmp_path: Path
) -> None:
    """A checkpoint of another program has none."""
    folder = Path(shutil.copytree(saved["torch"], tmp_path / "save"))
    (folder / "iter_0000002" / "integrity.json").unlink()
    answer = worlds[2].run("resumed", flags=[*BASE, *TP2, "--data-path", tokens, "--load", str(folder)])
    assert answer["iteration"] == 2
    assert any("has no integrity.json" in line for line in answer["said"])


@pytest.mark.parametrize(
    "extra",
    [TP2, ZERO, [*ZERO, "--async-save"]],
    ids=["TP2", "distributed optimizer", "distributed optimizer, async"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_stops_all(
    rank: int, extra: list[str], worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    flags = [*BASE, "--data-path", tokens, "--load", models["tied"], "--save", str(tmp_path), *extra]
    for said in worlds[2].run("failing_save", flags=[*flags, "--max-failed-saves", "0"], rank=rank):
        assert f"iter_0000002 was not saved: rank {rank}: " in said
        assert "No space left on device" in said
    assert (tmp_path / TRACKER).read_text() == "1", "the checkpoint before is still the newest"
    assert not (tmp_path / "iter_0000002").exists()


@pytest.mark.parametrize("extra", [[], ["--async-save"]], ids=["at once", "async"])
def test_training_goes_on_after_a_checkpoint_that_failed(
    extra: list[str], worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    flags = [*BASE, "--data-path", tokens, "--load", models["tied"], "--save", str(tmp_path), *TP2, *extra]
    assert worlds[2].run("failing_save", flags=flags, rank=1) == ["nothing", "nothing"]
    assert (tmp_path / TRACKER).read_text() == "1"
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"], "what was begun is removed"


@pytest.mark.parametrize("extra", [[], ["--async-save", "--ckpt-format", "torch_dist"]], ids=["torch", "torch_dist"])
def test_only_the_newest_are_kept(
    extra: list[str], worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    for theirs in ("iter_0000000", "iter_0000009"):  # converted weights, and a checkpoint of later steps
        (tmp_path / theirs).mkdir()
    (tmp_path / "iter_0000009" / "integrity.json").write_text(json.dumps({"files": {}}))
    (tmp_path / "iter_0000004.removed").mkdir()  # killed while deleting
    flags = [*BASE, *TP2, "--data-path", tokens, "--load", models["tied"], "--save", str(tmp_path), *extra]
    worlds[2].run("checkpoints", flags=[*flags, "--save-total-limit", "2"], steps=4)
    there = sorted(path.name for path in tmp_path.glob("iter_*"))
    assert there == ["iter_0000000", "iter_0000003", "iter_0000004", "iter_0000009"]
    answer = worlds[2].run("resumed", flags=[*BASE, *TP2, "--data-path", tokens, "--load", str(tmp_path)])
    assert answer["iteration"] == 4
