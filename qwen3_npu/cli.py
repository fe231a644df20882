"""Declare a flag once: a dataclass field is the flag, its type, default, unit, help and check.

No torch here, nor in anything this imports: `--help` must answer in well under a second.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import operator
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qwen3_npu.errors import Stopped, UsageError, did_you_mean, printable
from qwen3_npu.processes import end_with_launcher


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A flag of Megatron or MindSpeed-LLM scripts that is known and has no effect, or is refused.

    Attributes:
        reason: why it has no effect (or is refused), shown to the user.
        nargs: number of its values: 0 (a switch), 1, "?", "*" or "+".
        only: if not empty, the accepted values; any other value is an error.
        refused: the flag is an error, because it would need another architecture or result.
    """

    reason: str
    nargs: int | str = 0
    only: tuple[str, ...] = ()
    refused: bool = False


def flag(
    default: object = dataclasses.MISSING,
    *,
    help: str,
    unit: str = "",
    choices: Sequence[object] | None = None,
    names: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
) -> Any:
    """One command line flag; the field's name is its first spelling (`train_iters` -> `--train-iters`).

    Args:
        default: without one the flag is required. A list default is copied.
        unit: shown in `--help`.
        names: further spellings, e.g. `("--variable-seq-lengths",)`.
        minimum, maximum: smallest and largest value allowed (for a list: of each element).
        above, below: the same, but these are not allowed themselves.
    """
    meta: dict[str, object] = {"help": help, "unit": unit, "choices": choices, "names": names, "metavar": metavar}
    meta |= {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def option(name: str) -> str:
    """The command line spelling of a field."""
    return "--" + name.replace("_", "-")


_METAVARS: dict[object, str] = {int: "N", float: "X", str: "TEXT"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse prints the whole usage here, which for 150 flags hides the one line that matters.
        line = printable(f"{self.prog}: error: {message}; see {self.prog} --help")
        tell_torchrun(line)
        if _is_told_elsewhere():
            raise SystemExit(2)
        print(line, file=sys.stderr)
        raise SystemExit(2)


def _fields(groups: Sequence[type]) -> dict[str, tuple[type, dataclasses.Field]]:
    """Field name -> (first group that declares it, field). A field of several groups is one flag."""
    found: dict[str, tuple[type, dataclasses.Field]] = {}
    for group in groups:
        for f in dataclasses.fields(group):
            found.setdefault(f.name, (group, f))
    return found


def _default(f: dataclasses.Field) -> object:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _unwrap(hint: object) -> Any:
    """`int | None` -> `int`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _path(text: str) -> str:
    """Refuse an empty path (`--load "$UNSET"`), which would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path was given; name one, or drop the flag")
    return text


# Bound -> (how a value is compared with it, what the error says).
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (operator.ge, "too small; the minimum is"),
    "maximum": (operator.le, "too large; the maximum is"),
    "above": (operator.gt, "too small; it must be above"),
    "below": (operator.lt, "too large; it must be below"),
}
_LARGEST = 2**63 - 1  # counts and numbers of samples are kept in int64


def _checked(kind: Callable, f: dataclasses.Field) -> Callable:
    """`kind` as an argparse type that refuses NaN and values outside the field's bounds."""
    if f.metadata["metavar"] in ("DIR", "FILE"):
        return _path
    if kind not in (int, float):
        return kind
    bounds = {name: f.metadata[name] for name in _BOUNDS}
    if kind is int and bounds["maximum"] is None:
        bounds["maximum"] = _LARGEST

    def convert(text: str) -> Any:
        value = kind(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        for name, (holds, what) in _BOUNDS.items():
            if bounds[name] is not None and not holds(value, bounds[name]):
                raise argparse.ArgumentTypeError(f"{text} is {what} {bounds[name]}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return convert


def _add(parser: argparse._ArgumentGroup, f: dataclasses.Field, hint: object) -> None:
    meta, kind = f.metadata, _unwrap(hint)
    default = _default(f)
    required = default is dataclasses.MISSING
    text = meta["help"] + (f" [{meta['unit']}]" if meta["unit"] else "")
    if not required and default not in (None, [], "") and kind is not bool:
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
    text = text.replace("%", "%%")
    names = [option(f.name), *meta["names"]]
    if required:
        text += " (required)"
    # `parse` asks for required flags itself, after it has named the unknown ones: a typo is both.
    common = {"dest": f.name, "help": text, "default": None if required else default}
    metavar = meta["metavar"] or (None if meta["choices"] else _METAVARS.get(kind))
    if kind is bool:
        # argparse treats every name that begins with --no- as a negation; a further name is never one.
        same = [name for name in names if name.startswith("--no-")]
        common["help"] += f" (also {', '.join(same)})" if same else ""
        positive = [name for name in names if name not in same]
        parser.add_argument(*positive, action=argparse.BooleanOptionalAction, **common)
        for name in same:
            parser.add_argument(name, action="store_const", const=True, **{**common, "help": argparse.SUPPRESS})
        return
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
        common |= {"nargs": "+"}
        metavar = metavar or _METAVARS.get(kind)
    parser.add_argument(*names, type=_checked(kind, f), choices=meta["choices"], metavar=metavar, **common)


def _epilog(foreign: Mapping[str, Foreign]) -> str:
    lines = []
    for title, refused in (("accepted, no effect here:", False), ("known and refused:", True)):
        entries = {name: entry for name, entry in sorted(foreign.items()) if entry.refused == refused}
        if entries:
            width = max(map(len, entries))
            lines += [title, *(f"  {name:<{width}}  {entry.reason}" for name, entry in entries.items())]
    return "\n".join(lines)


def build_parser(
    prog: str, description: str, groups: Sequence[type], foreign: Mapping[str, Foreign]
) -> argparse.ArgumentParser:
    """An argparse parser with one argument group per dataclass."""
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=_epilog(foreign),
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sections: dict[type, argparse._ArgumentGroup] = {}
    types: dict[type, dict[str, object]] = {}
    for name, (group, f) in _fields(groups).items():
        if group not in sections:
            sections[group] = parser.add_argument_group((group.__doc__ or group.__name__).strip().splitlines()[0])
            types[group] = typing.get_type_hints(group)
        _add(sections[group], f, types[group][name])
    for name, entry in foreign.items():
        dest = _foreign_dest(name)
        if entry.nargs == 0:
            parser.add_argument(name, dest=dest, action="store_true", help=argparse.SUPPRESS)
        else:
            nargs = None if entry.nargs == 1 else entry.nargs
            parser.add_argument(name, dest=dest, nargs=nargs, help=argparse.SUPPRESS)
    return parser


def _refuse_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> NoReturn:
    known = [s for action in parser._actions for s in action.option_strings]
    flags = [u for u in unknown if u.startswith("-")] or unknown
    parser.error("; ".join(f"unknown flag {u}{did_you_mean(u.split('=')[0], known)}" for u in flags))


def _foreign_dest(name: str) -> str:
    return "foreign " + name  # the space keeps it apart from every field


def _check_foreign(given: set[str], values: dict[str, object], foreign: Mapping[str, Foreign]) -> list[str]:
    """The notes on foreign flags that were given. One that contradicts this code is a `UsageError`."""
    notes = []
    for name, entry in foreign.items():
        if _foreign_dest(name) not in given:
            continue
        value = values[_foreign_dest(name)]
        words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        if entry.refused:
            raise UsageError(f"{name}: {entry.reason}; drop the flag")
        if not entry.only:
            notes.append(f"{name}: no effect here: {entry.reason}")
        elif words not in entry.only:
            raise UsageError(f"{name} {words}: {entry.reason}; use {' or '.join(entry.only)} or drop the flag")
    return notes


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The parsed command line.

    Attributes:
        groups: one instance per dataclass, in the order of the request.
        notes: a line per accepted flag that has no effect; for the start-up log.
        given: names of the fields that were on the command line (not defaults).
    """

    groups: tuple[Any, ...]
    notes: list[str]
    given: frozenset[str]


def parse(
    prog: str,
    description: str,
    groups: Sequence[type],
    foreign: Mapping[str, Foreign] | None = None,
    *,
    argv: Sequence[str] | None = None,
) -> Parsed:
    """Parse argv into one instance per dataclass; a field declared by several groups is given to each.

    Raises:
        SystemExit: 0 for `--help`, 2 for an unknown flag (with a suggestion) or a bad value.
        UsageError: `__post_init__` of a group refuses its values.
    """
    foreign = foreign or {}
    parser = build_parser(prog, description, groups, foreign)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse_unknown(parser, unknown)
    values = vars(namespace)
    required = {name for name, (_, f) in _fields(groups).items() if _default(f) is dataclasses.MISSING}
    if missing := [option(name) for name in _fields(groups) if name in required and values[name] is None]:
        parser.error(f"required: {', '.join(missing)}")
    given = {
        action.dest
        for action in parser._actions
        for word in (sys.argv[1:] if argv is None else argv)
        if word.split("=")[0] in action.option_strings
    }
    notes = _check_foreign(given, values, foreign)
    built = tuple(g(**{f.name: values[f.name] for f in dataclasses.fields(g)}) for g in groups)
    return Parsed(groups=built, notes=notes, given=frozenset(given))


def tell_torchrun(text: str, file: str | None = None) -> None:
    """Write an error to the file whose text torchrun shows last, after the output of the other ranks.

    Args:
        file: of another process; default: this one's.
    """
    if file := file or os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun prints the field py_callstack of this file.
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def _is_told_elsewhere() -> bool:
    """Whether rank 0 reports the same error; torchrun shows the first error anyway."""
    return os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_ERROR_FILE" in os.environ


# The modules of pyproject.toml's dependencies; what imports them lies inside `main` of the entry points.
REQUIRED = (
    *("torch", "megatron.core", "numpy", "packaging", "psutil", "tokenizers", "safetensors"),
    *("pyarrow", "orjson", "xxhash", "jinja2", "tensorboard"),
)


def _explained(main: Callable[[], int | None]) -> int:
    """Run it. Raises: UsageError: for a package that is missing, and for torch that cannot load its torch_npu."""
    try:
        return main() or 0
    except ModuleNotFoundError as error:
        if error.name not in {*REQUIRED, "megatron"}:
            raise
        text = f"{error.name} is not installed in {sys.executable}"
        raise UsageError(f"{text}; python -m qwen3_npu.doctor lists what to install") from None
    except RuntimeError as error:
        if "backend extension: torch_npu" not in str(error):  # torch imports it, and it needs CANN's libraries
            raise
        remedy = "source its set_env.sh (python -m qwen3_npu.doctor says which)"
        without = "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to work without NPUs"
        raise UsageError(f"torch cannot load torch_npu, which needs CANN; {remedy}, or {without}") from None


def run(prog: str, main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point: `UsageError` becomes one line on stderr and exit status 2, `Stopped` one and status 1."""
    end_with_launcher()
    try:
        code = _explained(main)
    except (UsageError, Stopped) as error:
        if not (isinstance(error, UsageError) and _is_told_elsewhere()):
            with contextlib.suppress(OSError, ValueError):  # closed, or full
                print(f"{prog}: error: {printable(str(error))}", file=sys.stderr, flush=True)
        tell_torchrun(printable(str(error)))
        code = 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr, flush=True)
        code = 130
    raise SystemExit(code)
