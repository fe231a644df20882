"""Commands of README and docs/ work as they stand: programs, scripts, flags and variables exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3_npu import cli
from qwen3_npu.args import convert, evaluation, inference, preprocess, pretrain
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.parallel import RuntimeArgs
from qwen3_npu.args.tools import doctor, ledger, parity, plan, quarantine, trace

ROOT = Path(__file__).resolve().parents[3]
CONVERT = (convert.ConvertArgs, convert.TargetArgs, convert.LoraConvertArgs, convert.LegacyConvertArgs)
FLAGS = {
    "pretrain_gpt.py": (pretrain.GROUPS, FOREIGN_TRAINING),
    "convert_ckpt.py": (CONVERT, convert.FOREIGN),
    "preprocess_data.py": (preprocess.GROUPS, preprocess.FOREIGN),
    "inference.py": (inference.GROUPS, inference.FOREIGN),
    "evaluation.py": (evaluation.GROUPS, evaluation.FOREIGN),
    "qwen3_npu.doctor": ((doctor.DoctorArgs,), {}),
    "qwen3_npu.parity": ((parity.ParityArgs, RuntimeArgs), {}),
    "qwen3_npu.plan": ((plan.PlanArgs, trace.TraceArgs, *pretrain.GROUPS), FOREIGN_TRAINING),
    "qwen3_npu.ledger": ((ledger.LedgerArgs,), {}),
    "qwen3_npu.data": ((quarantine.QuarantineArgs,), {}),
}
# The program that a script of examples/ passes its flags to, by the beginning of its name.
PROGRAMS = dict.fromkeys(("pretrain", "tune", "dpo", "rm"), "pretrain_gpt.py") | {
    "posttrain": "pretrain_gpt.py",
    "generate": "inference.py",
    "chat": "inference.py",
    "evaluate": "evaluation.py",
    "ckpt": "convert_ckpt.py",
    "convert": "convert_ckpt.py",
    "data": "preprocess_data.py",
}


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Program -> every spelling of its flags."""
    parsers = {program: cli.build_parser(program, "", *flags) for program, flags in FLAGS.items()}
    return {name: {o for a in parser._actions for o in a.option_strings} for name, parser in parsers.items()}


def commands(page: Path) -> Iterator[str]:
    """Lines of code blocks, continued ones as one, and code inside of sentences; comments are cut off."""
    text = page.read_text()
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"(^|\s)#.*", "", line)
    yield from re.findall(r"`([^`\n]+)`", text)


def unknown(command: str, known: dict[str, set[str]]) -> list[str]:
    """What this command names that is not there."""
    found = []
    for name in re.findall(r"(?<![\w/.$-])(?:examples|tests|docs|benchmarks|docker)/[\w/.+-]*\w", command):
        if "NAME" not in name and not list(ROOT.glob(f"{name}*")):
            found.append(name)
    for program, rest in re.findall(r"([\w./+]+\.(?:py|sh)|qwen3_npu\.\w+)([^|;&]*)", command):
        stem = program.rpartition("/")[2]
        flags = known.get(stem) or known.get(PROGRAMS.get(stem.split("_")[0], ""), set())
        if program.startswith("benchmarks/"):
            flags = set(re.findall(r'"(--[\w-]+)"', (ROOT / program).read_text()))
        found += [f"{stem} {flag}" for flag in re.findall(r"(?<!\S)--[\w-]+", rest) if flags and flag not in flags]
    return found


PAGES = sorted({*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")})


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_name_what_exists(page: Path, known: dict[str, set[str]]) -> None:
    wrong = {command: found for command in commands(page) if (found := unknown(command, known))}
    assert not wrong


def test_variables_before_scripts_are_read_by_them() -> None:
    read = set(re.findall(r"[A-Z][A-Z_0-9]+", "".join(p.read_text() for p in ROOT.glob("examples/**/*.sh"))))
    for page in PAGES:
        for command in commands(page):
            if "examples/" in command:
                assert set(re.findall(r"(?<!\S)([A-Z][A-Z_0-9]+)=", command.split("examples/")[0])) <= read, command


def test_the_check_sees_what_is_not_there(known: dict[str, set[str]]) -> None:
    assert unknown("bash examples/qwen3/tune_qwen3_9b.sh", known) == ["examples/qwen3/tune_qwen3_9b.sh"]
    assert unknown("torchrun pretrain_gpt.py --lr 1 --no-flag 2", known) == ["pretrain_gpt.py --no-flag"]
    assert unknown("python -m qwen3_npu.doctor --devise x", known) == ["qwen3_npu.doctor --devise"]
    script = "examples/qwen3/ckpt_convert_qwen3_hf2mcore.sh"
    assert unknown(f"TP=2 bash {script} --verify --lr 1", known) == [f"{script.rpartition('/')[2]} --lr"]
    assert unknown("python benchmarks/train.py --no-flag", known) == ["train.py --no-flag"]
