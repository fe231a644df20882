"""A training that is interrupted and resumed continues exactly; in another layout, to rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3_npu.parity.rows import EP2, PP2, SP, TP2, VPP, ZERO
from worlds import World, free_port

ROOT = Path(__file__).resolve().parents[2]
BASE = ["--seq-length", "32", "--global-batch-size", "8", "--lr", "1e-3", "--train-iters", "6", "--device", "cpu"]
BASE += ["--lr-decay-style", "cosine", "--eval-iters", "0"]


def interrupted(world: World, again: World, flags: list[str], save: Path, resumed_flags: list[str]) -> dict:
    """Three steps, a checkpoint, three more steps in the second world; what the last three did."""
    world.run("train", flags=[*flags, "--save", str(save)], steps=3)
    return again.run("train", flags=[*resumed_flags, "--load", str(save)], steps=3)


SAME = {
    "one process": (1, []),
    "one process, dropout": (1, ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]),
    "one process, bf16": (1, ["--bf16"]),
    "one process, bf16, distributed optimizer": (1, ["--bf16", *ZERO]),
    "DP2 distributed optimizer": (2, ZERO),
    "TP2 SP PP2 VPP2": (4, TP2 + SP + PP2 + VPP),
    "TP2 DP2 distributed optimizer, dropout": (4, [*TP2, *ZERO, "--hidden-dropout", "0.1"]),
}


@pytest.mark.parametrize("name", SAME)
def test_same_layout_continues_bit_for_bit(
    name: str, worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    size, extra = SAME[name]
    flags = [*BASE, "--data-path", tokens, *extra]
    whole = worlds[size].run("train", flags=[*flags, "--load", models["tied"]], steps=6)
    rest = interrupted(worlds[size], worlds[size], [*flags, "--load", models["tied"]], tmp_path, flags)
    assert rest["loss"] == whole["loss"][3:]
    assert rest["grad_norm"] == whole["grad_norm"][3:]


OTHER = {
    "tied: DP2 distributed optimizer -> one process": ("tied", 2, ZERO, 1, []),
    "tied: one process -> TP2 PP2": ("tied", 1, [], 4, TP2 + PP2),
    "untied: TP2 PP2 VPP2 -> DP2 distributed optimizer": ("untied", 4, TP2 + PP2 + VPP, 2, ZERO),
    "moe: EP2 distributed optimizer -> TP2 SP": ("moe", 2, EP2 + ZERO, 2, TP2 + SP),
    "moe: TP2 SP EP2 -> PP2 distributed optimizer": ("moe", 4, TP2 + SP + EP2, 2, PP2 + ZERO),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_layout_continues_to_rounding(
    name: str, worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    kind, size, extra, other_size, other_extra = OTHER[name]
    flags = [*BASE, "--data-path", tokens]
    load = ["--load", models[kind]]
    whole = worlds[1].run("train", flags=flags + load, steps=6)
    rest = interrupted(worlds[size], worlds[other_size], flags + extra + load, tmp_path, flags + other_extra)
    assert rest["loss"] == pytest.approx(whole["loss"][3:], rel=1e-5)
    assert rest["grad_norm"] == pytest.approx(whole["grad_norm"][3:], rel=1e-5)


def test_finetune_and_no_load_optim_start_over(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    flags = [*BASE, "--data-path", tokens]
    worlds[1].run("train", flags=[*flags, "--load", models["tied"], "--save", str(tmp_path)], steps=3)
    resumed = worlds[1].run("train", flags=[*flags, "--load", str(tmp_path)], steps=1)
    finetuned = worlds[1].run("train", flags=[*flags, "--load", str(tmp_path), "--finetune"], steps=1)
    assert finetuned["loss"] != resumed["loss"], "another first batch"
    fresh = worlds[1].run("train", flags=[*flags, "--load", str(tmp_path), "--no-load-optim"], steps=2)
    assert fresh["loss"][0] == resumed["loss"][0]


def launch(processes: int, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(free_port()), str(ROOT / "pretrain_gpt.py"), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def workers(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the training processes of a torchrun."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, the last one written."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_killed_while_saving(models: dict[str, str], tokens: str, tmp_path: Path) -> None:
    flags = [*BASE, "--train-iters", "12", "--data-path", tokens, *TP2, "--save-interval", "1", "--log-interval", "100"]
    whole = launch(2, [*flags, "--load", models["tied"], "--tensorboard-dir", str(tmp_path / "whole")])
    assert whole.wait() == 0, whole.stdout.read()

    save = tmp_path / "checkpoints"
    first = launch(
        2, [*flags, "--load", models["tied"], "--save", str(save), "--tensorboard-dir", str(tmp_path / "tb")]
    )
    killed_in_save = False
    while first.poll() is None and not killed_in_save:
        # The third checkpoint or later, so that there is something to fall back to.
        partial = sorted(save.glob("iter_*.partial/mp_rank_*"))
        if partial and int(partial[0].parent.name[5:12]) >= 3:
            os.kill(workers(first)[1], signal.SIGKILL)
            killed_in_save = True
        time.sleep(0.0005)
    output, _ = first.communicate(timeout=60)
    assert killed_in_save, output
    assert first.returncode != 0, "a killed rank must end the job with an error"

    tracker = int((save / "latest_checkpointed_iteration.txt").read_text())
    resume = launch(2, [*flags, "--load", str(save), "--save", str(save), "--tensorboard-dir", str(tmp_path / "tb")])
    output, _ = resume.communicate(timeout=120)
    assert resume.returncode == 0, output
    assert f"at step {tracker}," in output, "the newest whole checkpoint is taken"
    assert losses(tmp_path / "tb") == losses(tmp_path / "whole"), "exactly the uninterrupted run"
    assert not list(save.glob("*.partial")), "leftovers of the killed save are gone"
