"""Flags: declared once, checked, unknown ones refused with a suggestion."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qwen3_npu import cli
from qwen3_npu.cli import Foreign, flag
from qwen3_npu.errors import Stopped, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """sample flags"""

    micro_batch_size: int = flag(minimum=1, unit="samples", help="samples per step")
    rate: float = flag(0.5, minimum=0, help="a rate")
    mode: str = flag("a", choices=["a", "b"], help="a mode")
    names: list[str] | None = flag(None, help="some names")
    pad: bool = flag(True, names=("--fill",), help="pad")
    tight: bool = flag(False, names=("--no-room",), help="leave no room")

    def __post_init__(self) -> None:
        if self.mode == "b" and self.rate > 1:
            raise UsageError("--mode b needs --rate up to 1")


FOREIGN = {
    "--swiglu": Foreign("always so"),
    "--spec": Foreign("there is one", nargs="+"),
    "--norm": Foreign("only RMSNorm", nargs=1, only=("RMSNorm",)),
    "--bias": Foreign("has none", refused=True),
}


def parse(*words: str) -> cli.Parsed:
    return cli.parse("prog", "A program.", (Sample,), FOREIGN, argv=["--micro-batch-size", "2", *words])


def test_values_and_defaults() -> None:
    parsed = parse("--rate", "0.25", "--names", "x", "y", "--no-pad")
    assert parsed.groups[0] == Sample(micro_batch_size=2, rate=0.25, names=["x", "y"], pad=False)
    assert parsed.given == {"micro_batch_size", "rate", "names", "pad"}
    assert parse("--no-fill").groups[0].pad is False
    assert parse("--no-room").groups[0].tight
    assert not parse("--no-tight").groups[0].tight


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--micro-batchsize", "3"], "unknown flag --micro-batchsize; did you mean --micro-batch-size?"),
        (["--rat", "3"], "unknown flag --rat; did you mean --rate?"),
        (["--zzzz"], "error: unknown flag --zzzz; see prog --help\n"),
        (["stray\x1b[31m"], r"unknown flag stray\x1b[31m; see prog --help"),
        (["--rate", "x"], "invalid float value: 'x'"),
        (["--rate", "-1"], "-1 is too small; the minimum is 0"),
        (["--mode", "c"], "invalid choice: 'c'"),
    ],
)
def test_bad_words_exit_2(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_required_flag(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse("prog", "", (Sample,), argv=[])
    assert stopped.value.code == 2
    assert "required: --micro-batch-size" in capsys.readouterr().err


def test_foreign_flags() -> None:
    assert parse("--swiglu", "--spec", "a", "b").notes == [
        "--swiglu: no effect here: always so",
        "--spec: no effect here: there is one",
    ]
    assert parse("--norm", "RMSNorm").notes == []
    with pytest.raises(UsageError, match=r"--norm LayerNorm: only RMSNorm; use RMSNorm or drop the flag"):
        parse("--norm", "LayerNorm")
    with pytest.raises(UsageError, match="--bias: has none"):
        parse("--bias")


def test_checks_inside_a_group() -> None:
    with pytest.raises(UsageError, match="--mode b needs"):
        parse("--mode", "b", "--rate", "2")


def test_help_says_unit_default_and_foreign_flags(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("sample flags", "[samples]", "(required)", "(default: 0.5)", "--swiglu always so", "--bias has none"):
        assert part in text


def test_run_prints_one_line_and_exits_2(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UsageError("--x 1: impossible; use 2")

    with pytest.raises(SystemExit) as stopped:
        cli.run("prog", main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "prog: error: --x 1: impossible; use 2\n"


@pytest.mark.parametrize(("error", "code"), [(UsageError("--lr is wrong"), 2), (Stopped("no more memory"), 1)])
def test_torchrun_is_told(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In the form that its last lines show."""

    def main() -> None:
        raise error

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as end:
        cli.run("program.py", main)
    assert end.value.code == code
    assert capsys.readouterr().err == f"program.py: error: {error}\n"
    said = json.loads((tmp_path / "error.json").read_text())["message"]
    assert said["message"] == said["extraInfo"]["py_callstack"] == str(error)
