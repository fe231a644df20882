"""The flags of MindSpeed-LLM's own Qwen3 scripts are taken as they are; those without effect alone are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen3_npu import cli
from qwen3_npu.args import convert, evaluation, inference, preprocess, pretrain
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.rules.switches import check_switches
from qwen3_npu.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
TRAINING = (pretrain.GROUPS, FOREIGN_TRAINING)
CONVERT = (convert.ConvertArgs, convert.TargetArgs, convert.LoraConvertArgs, convert.LegacyConvertArgs)
PROGRAMS = {
    "pretrain_gpt.py": TRAINING,
    "posttrain_gpt.py": TRAINING,
    "convert_ckpt_v2.py": (CONVERT, convert.FOREIGN),
    "preprocess_data.py": (preprocess.GROUPS, preprocess.FOREIGN),
    "inference.py": (inference.GROUPS, inference.FOREIGN),
    "evaluation.py": (evaluation.GROUPS, evaluation.FOREIGN),
}
BASE = ["--train-iters", "2", "--lr", "1e-5", "--data-path", "x"]


def scripts() -> dict[str, tuple[str, list[str]]]:
    """Script -> program and its flags."""
    flags: dict[str, list[str]] = {}
    found = {}
    for line in (ROOT / "tests" / "mindspeed_flags.txt").read_text().splitlines()[1:]:
        if match := re.fullmatch(r"(\d+) (--.*)", line):
            flags[match[1]] = match[2].split(" ")
        else:
            name, program, numbers = line.split(": ")
            found[name] = program, [word for number in numbers.split() for word in flags[number]]
    return found


SCRIPTS = scripts()


def test_all_scripts_are_here() -> None:
    assert len(SCRIPTS) == 69
    assert all((ROOT / program).is_file() for program, _ in SCRIPTS.values())


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.startswith("dpo")])
def test_flags_are_taken(name: str) -> None:
    program, argv = SCRIPTS[name]
    groups, foreign = PROGRAMS[program]
    parsed = cli.parse(program, "", groups, foreign, argv=argv)
    if groups is pretrain.GROUPS:
        args = pretrain.PretrainArgs(*parsed.groups)
        check_switches(args, parsed.given)
        assert args.lora.lora_r == (16 if "_lora_" in name else 0)


def test_the_preference_script_parses() -> None:
    _, argv = next(script for name, script in SCRIPTS.items() if name.startswith("dpo"))
    args = pretrain.PretrainArgs(*cli.parse("posttrain_gpt.py", "", *TRAINING, argv).groups)
    assert args.data.is_preference
    assert args.preference.dpo_loss_type == "sigmoid"


def said(*flags: str) -> tuple[pretrain.PretrainArgs, list[str]]:
    parsed = cli.parse("pretrain_gpt.py", "", *TRAINING, argv=[*BASE, *flags])
    args = pretrain.PretrainArgs(*parsed.groups)
    return args, check_switches(args, parsed.given)


def test_targets_switch_lora_on() -> None:
    args, notes = said("--lora-target-modules", "linear_qkv")
    assert (args.lora.lora_r, args.lora.lora_target_modules) == (16, ["linear_qkv"])
    assert any("--lora-r 16" in note for note in notes)
    assert len(said("--lora-r", "4")[0].lora.lora_target_modules) == 4


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora-alpha", "16"],
        ["--lora-fusion"],
        ["--moe-token-drop-policy", "probs"],
        ["--loss-chunk-size", "1024"],
        ["--context-parallel-algo", "megatron_cp_algo"],
        ["--lr-wsd-decay-iters", "5"],
        ["--hf-save-dir", "x"],
        ["--ckpt-step", "3"],
        ["--allow-changed", "seed"],
        ["--profile-level", "level1"],
        ["--pad-to-multiple-of", "2"],
        ["--manual-gc-interval", "5"],
        ["--run_mode", "train"],
        ["--spec", "my.own.spec"],
    ],
)
def test_a_flag_without_effect_is_refused(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=re.escape(flags[0])):
        said(*flags)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_float_flags_are_finite(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--lora-alpha", "--rotary-base", "--clip-grad"):
        with pytest.raises(SystemExit):
            said(f"{flag}={value}")
        assert f"argument {flag}: {value} is not a finite number" in capsys.readouterr().err


def test_a_start_says_what_differs() -> None:
    assert any("micro-batch mean" in note for note in said("--stage", "sft")[1])
    assert any("--lr-warmup-iters 5 is above" in note for note in said("--lr-warmup-iters", "5")[1])
