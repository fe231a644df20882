"""A dry run finds what can be known before a training begins, in one line, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from qwen3_npu import cli, log
from qwen3_npu.args import pretrain
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.rules.fit import fit_flags
from qwen3_npu.checkpoint.mapping.table import hf_shapes
from qwen3_npu.data.train.data_path import check_data
from qwen3_npu.distributed import environment
from qwen3_npu.errors import UsageError
from qwen3_npu.parity import tiny
from qwen3_npu.training.prepare.start import check_start

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    tiny.write_model(root / "model", tiny.arch())
    tiny.write_model(root / "other", tiny.arch(hidden_size=96))
    tiny.write_tokens(root / "tokens", documents=20)
    (root / "empty").mkdir()
    (root / "a file").write_text("x")
    return root


def parsed(made: Path, *flags: str) -> pretrain.PretrainArgs:
    base = ["--train-iters", "2", "--lr", "1e-5", "--data-path", str(made / "tokens"), "--dry-run"]
    found = cli.parse("pretrain_gpt.py", "", pretrain.GROUPS, FOREIGN_TRAINING, argv=[*base, *flags])
    return pretrain.PretrainArgs(*found.groups)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--load", "missing"], "--load {made}/missing does not exist"),
        (["--load", "empty"], "--load {made}/empty holds no Hugging Face model, no Megatron checkpoint and no PEFT "),
        (["--load", "other"], "--load {made}/other holds "),
        (
            ["--load", "model", "--lora-r", "4", "--lora-load", "missing"],
            "--lora-load {made}/missing does not exist",
        ),
        (["--load", "model", "--lora-r", "4", "--lora-load", "model"], "--lora-load {made}/model is a full model"),
        (["--save", "a file/x"], "--save {made}/a file/x cannot be written: Not a directory"),
        (["--stage=orpo"], "--stage orpo trains a given model; give it with --load"),
        (
            ["--stage=dpo", "--load", "model", "--ref-model", "missing"],
            "--ref-model {made}/missing does not exist",
        ),
        (["--stage=dpo", "--load", "model", "--ref-model", "other"], "--ref-model {made}/other holds "),
        (["--stage=dpo", "--load", "model", "--refer-model-iter", "3"], "{made}/model holds one model and no steps"),
        (["--load", "model", "--ckpt-step", "3"], "{made}/model holds one model and no steps, and step 3 is asked for"),
        (
            ["--stage=dpo", "--load", "model", "--refer-model-iter", "3", "--lora-r", "4"],
            "--refer-model-iter 3 has no effect: with LoRA the reference is the model without its adapter",
        ),
        (["--lora-r", "4"], "--lora-r trains an adapter of a given model; give it with --load"),
        (["--tensorboard-dir", "a file"], "--tensorboard-dir {made}/a file cannot be written: File exists"),
        (["--data-cache-path", "a file/x"], "--data-cache-path {made}/a file/x cannot be written"),
    ],
)
def test_folders_are_looked_at(flags: list[str], told: str, made: Path) -> None:
    named = [str(made / word) if not word.startswith("--") and not word.isdigit() else word for word in flags]
    with pytest.raises(UsageError) as refused:
        check_start(parsed(made, *named), tiny.arch())
    assert str(refused.value).startswith(told.format(made=made))
    assert "\n" not in str(refused.value)


def test_what_is_right_passes_and_leaves_nothing(made: Path) -> None:
    before = sorted(made.rglob("*"))
    new = str(made / "new" / "deep")
    args = parsed(made, "--load", str(made / "model"), "--save", new, "--tensorboard-dir", new + "/tensorboard")
    check_start(args, tiny.arch())
    check_start(
        parsed(made, "--stage", "dpo", "--load", new, "--save", new, "--ref-model", str(made / "model")), tiny.arch()
    )
    check_start(parsed(made, "--load", new, "--save", new), tiny.arch())  # a first start of a script that resumes
    assert sorted(made.rglob("*")) == before


def test_a_checkpoint_that_does_not_fit_is_found_before_the_first_step(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parsed(made, "--load", str(made / "model"), "--save", str(made / "new"), "--bf16")
    shapes = hf_shapes(tiny.arch())  # of a Hugging Face directory: 2 bytes, and 12 of the optimizer
    needed = 14 * sum(math.prod(shape) for shape in shapes.values())
    log.setup()
    for free, said in ((needed, False), (needed - 1000, True)):
        with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=free)):
            check_start(args, tiny.arch())  # a dry run warns
            assert ("1 kB are missing" in capsys.readouterr().out) == said
            real = args._replace(runtime=dataclasses.replace(args.runtime, dry_run=False))
            with pytest.raises(UsageError, match="1 kB are missing") if said else contextlib.nullcontext():
                check_start(real, tiny.arch())


def test_an_expert_is_not_padded_to_more_than_all_tokens(made: Path) -> None:
    """Megatron takes the capacity's number of tokens out of fewer, which is a RuntimeError in the first step."""
    flags = ["--seq-length", "16", "--moe-pad-expert-input-to-capacity", "--moe-expert-capacity-factor"]
    with pytest.raises(UsageError, match=r"^--moe-expert-capacity-factor 2\.5 .* is above 2, "):
        fit_flags(parsed(made, *flags, "2.5"), tiny.arch("moe"), 1)
    fit_flags(parsed(made, *flags, "2"), tiny.arch("moe"), 1)
    fit_flags(parsed(made, *flags[:2], flags[-1], "2.5"), tiny.arch("moe"), 1)


def test_padded_experts_of_ranks_with_other_micro_batches_need_one_length(made: Path) -> None:
    """Ranks exchange as many rows as they have themselves: others of another length, and gloo aborts the process."""
    flags = ["--seq-length", "16", "--moe-pad-expert-input-to-capacity", "--moe-expert-capacity-factor", "1"]
    flags += ["--stage", "sft", "--expert-model-parallel-size", "2"]
    with pytest.raises(UsageError, match="--expert-model-parallel-size 2 needs micro-batches of one length"):
        fit_flags(parsed(made, *flags, "--no-pad-to-seq-lengths"), tiny.arch("moe"), 2)
    fit_flags(parsed(made, *flags), tiny.arch("moe"), 2)
    within = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1"]
    fit_flags(parsed(made, *flags, *within, "--no-pad-to-seq-lengths"), tiny.arch("moe"), 2)


def test_groups_of_recomputed_layers_divide_a_stage(made: Path) -> None:
    """Megatron takes whole groups beyond the last layer, which is an IndexError in the first step."""
    flags = ["--seq-length", "16", "--recompute-granularity", "full", "--recompute-num-layers", "3"]
    with pytest.raises(UsageError, match="3 does not divide the 4 layers of a pipeline stage; use one of 1, 2, 4, or "):
        fit_flags(parsed(made, *flags, "--recompute-method", "uniform"), tiny.arch(), 1)
    fit_flags(parsed(made, *flags, "--recompute-method", "block"), tiny.arch(), 1)
    fit_flags(parsed(made, *flags[:-1], "2", "--recompute-method", "uniform"), tiny.arch(), 1)


def test_a_split_that_leaves_nothing_is_refused(made: Path) -> None:
    for split, evaluates, name in (("0,100,0", False, "training"), ("100,0,0", True, "validation")):
        args = parsed(made, "--split", split)
        with pytest.raises(UsageError) as refused:
            check_data(args.data, 256, seq_length=16, evaluates=evaluates)
        held = f"{made / 'tokens'} (20)"
        assert str(refused.value).startswith(f"--split {split} leaves no document of {held} for {name}; give another")
    check_data(parsed(made, "--split", "100,0,0").data, 256, seq_length=16)


def test_a_port_in_use_and_a_host_that_does_not_resolve_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = str(held.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        environment.check_meeting(first=False)
        with pytest.raises(UsageError, match=f"^MASTER_PORT {port} is in use on this host"):
            environment.check_meeting(first=True)
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        body = (
            "from qwen3_npu import cli\nfrom qwen3_npu.platform import select_platform\n"
            "from qwen3_npu.args.parallel import RuntimeArgs\nfrom qwen3_npu.distributed.launch import process_group\n"
            "def main():\n"
            "    with process_group(select_platform('cpu'), RuntimeArgs(distributed_timeout_minutes=0.1)): pass\n"
            "cli.run('p', main)"
        )
        done = subprocess.run(
            [sys.executable, "-c", body], env=os.environ | variables, capture_output=True, text=True, check=False
        )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert f"p: error: MASTER_PORT {port} is in use" in done.stderr
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(UsageError, match=r"^MASTER_ADDR no-such-host\.invalid does not resolve"):
        environment.check_meeting(first=False)
    for port, said in (("", "is not set: "), ("29500x", "29500x: "), ("70000", "70000: ")):
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UsageError, match=f"^MASTER_PORT {said}with MASTER_ADDR a port"):
            environment.check_meeting(first=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    # Asked before torch's store is, which prints a stack of its own.
    from qwen3_npu.args.parallel import RuntimeArgs
    from qwen3_npu.distributed import launch

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch.dist, "rendezvous", lambda *args, **named: pytest.fail("the store was asked"))
    platform = mock.Mock()
    with (
        pytest.raises(UsageError, match="does not resolve"),
        launch.process_group(platform, RuntimeArgs()),
    ):
        pass


def test_from_scratch_goes_with_nothing_that_has_weights(made: Path, capsys: pytest.CaptureFixture) -> None:
    save = str(made / "scratch")
    assert parsed(made, "--from-scratch", "--save", save).checkpoint.load is None
    check_start(parsed(made, "--from-scratch", "--save", save, "--load", save), tiny.arch())  # resumes, or begins
    with pytest.raises(UsageError, match=r"--from-scratch and --load .* contradict each other"):
        parsed(made, "--from-scratch", "--load", str(made / "model"))
    with pytest.raises(UsageError, match="--from-scratch and --finetune contradict each other"):
        parsed(made, "--from-scratch", "--finetune")
    for flag in ("--load", "--save", "--hf-dir"):  # would be the current folder
        with pytest.raises(SystemExit):
            parsed(made, flag, "")
        assert f"{flag}: an empty path was given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "one"}, "RANK=one: torchrun sets a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: torchrun sets a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 WORLD_SIZE 2: ranks count from 0"),
    ],
)
def test_ranks_that_are_none_are_named(variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^{told}"):
        environment.ranks()
