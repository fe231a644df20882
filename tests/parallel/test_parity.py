"""The first losses of fixed trainings, committed: a refactor changes no number. And the certificate as users run it.

After a change that is meant to change them: `QWEN3_NPU_WRITE_GOLDEN=1 bash tests/run.sh tests/parallel/test_parity.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_npu.parity.passport import shipped
from qwen3_npu.parity.rows import PP2, VPP, ZERO
from qwen3_npu.parity.walk import walk_runs
from qwen3_npu.training.fingerprints.files import Recording, read
from worlds import World

ROOT = Path(__file__).resolve().parents[2]


def test_a_breach_is_named_and_fails() -> None:
    """Rounding makes rows of TP differ by more than a millionth, rows of PP by less."""
    command = [sys.executable, "-m", "qwen3_npu.parity", "--device", "cpu", "--processes", "2"]
    command += ["--rows", "^untied: (PP2|TP2 SP|TP2 PP2)$", "--tolerance", "1e-6"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    lines = {line.split(" loss ")[0].strip(): line for line in done.stdout.splitlines() if " loss " in line}
    assert lines["untied: PP2"].endswith("ok"), done.stdout + done.stderr
    assert "BREACH in model.layers" in lines["untied: TP2 SP"]
    assert "1 rows left out" in done.stdout
    assert "1 of 2 rows differ" in done.stderr
    assert done.returncode == 1


def test_rows_that_do_not_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_npu.parity", "--rows", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--list-rows" in done.stderr


@pytest.mark.parametrize(
    ("size", "cases"), [(1, ["moe bf16"]), (2, ["dense bf16", "packed bf16"])], ids=["one", "TP2, CP2"]
)
def test_other_kernels_and_layouts_agree_with_the_shipped_passport(
    size: int, cases: list[str], worlds: dict[int, World]
) -> None:
    said = worlds[size].run("passport_cases.agreement", cases=cases)
    assert {case: first for case, (_, first) in said.items()} == dict.fromkeys(cases)
    assert max(used for used, _ in said.values()) < 0.7


FAULTS = [("swiglu", "backward", "layers.1.mlp.activation_func"), ("rms_norm", "forward", "layers.0.input_layernorm")]


@pytest.mark.parametrize(("fault", "way", "where"), FAULTS)
def test_a_faulty_operator_is_named_where_it_is(fault: str, way: str, where: str, worlds: dict[int, World]) -> None:
    ((_, place),) = worlds[1].run("passport_cases.agreement", cases=["dense bf16"], fault=fault).values()
    assert place[2:5] == [where, fault, way]


def test_files_of_two_trainings_are_compared(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    """With other kernels nothing is named; a faulty one is."""
    flags = ["--load", models["untied"], "--data-path", tokens, "--seq-length", "32", "--global-batch-size", "4"]
    flags += ["--micro-batch-size", "1", "--train-iters", "3", "--eval-iters", "0", "--fingerprint-interval", "3"]
    flags += ["--lr", "1e-3", "--bf16", *ZERO, "--recompute-granularity", "selective", *PP2, *VPP]

    def files(name: str, case: str, *changed: str, **options: str) -> list[Recording]:
        worlds[2].run(case, flags=[*flags, "--tensorboard-dir", str(tmp_path / name), *changed], **options)
        found = sorted((tmp_path / name / "fingerprints").iterdir())
        assert [file.name for file in found] == ["step_0000001.npz", "step_0000003.npz"]
        return [read(file) for file in found]

    usual = files("torch", "whole_training")
    others = files("reference", "whole_training", "--kernels", "reference")
    wrong = files("wrong", "passport_cases.faulty_training", fault="swiglu")
    assert min(len(one.cases["training"].names) for one in usual) > 100
    passport = read(shipped())
    assert [walk_runs(found, expected, passport).first for found, expected in zip(others, usual, strict=True)] == [
        None
    ] * 2
    first = walk_runs(wrong[0], usual[0], passport).first
    assert first is not None
    assert first.place[2:5] == ("layers.3.mlp.activation_func", "swiglu", "backward")


GOLDEN = ROOT / "tests" / "golden"
FLAGS = ["--seq-length", "32", "--global-batch-size", "4", "--micro-batch-size", "2", "--lr", "1e-3", "--device", "cpu"]
FLAGS += ["--train-iters", "20", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--eval-iters", "0"]


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_losses_are_as_committed(kind: str, worlds: dict[int, World], models: dict[str, str], tokens: str) -> None:
    flags = [*FLAGS, "--load", models[kind], "--data-path", tokens]
    losses = worlds[1].run("train", flags=flags, steps=20)["loss"]
    path = GOLDEN / f"losses_{kind}.txt"
    if os.environ.get("QWEN3_NPU_WRITE_GOLDEN"):
        path.write_text("".join(f"{loss!r}\n" for loss in losses))
    # Not exact: another processor's vector units round sums differently.
    assert losses == pytest.approx([float(line) for line in path.read_text().split()], rel=2e-6)
