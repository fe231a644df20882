"""The scripts of examples/: what each would run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from qwen3_npu.model.sizes import SIZES

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p for kind in ("qwen3", "qwen3_moe") for p in (ROOT / "examples" / kind).glob("*.sh"))
# A python that says what it was asked to run: the number of processes, then each word on a line of its own.
_ECHO = '#!/usr/bin/env bash\necho "WORLD=${WORLD_SIZE:-}"\nprintf "ARG %s\\n" "$@"\n'


class Asked(NamedTuple):
    """What a script would run."""

    world: int
    program: str
    flags: list[str]


def size_of(script: Path) -> str:
    """The model that a script is for."""
    name = script.stem.replace("0point6b", "0.6b").replace("1point7b", "1.7b").replace("_", "-")
    found = [size for size in SIZES if size.removeprefix("qwen3-") in name.split("qwen3-", 1)[1]]
    return max(found, key=len, default="qwen3-235b-a22b" if "235b" in name else "qwen3-30b-a3b")


class Original(NamedTuple):
    """What a script of MindSpeed-LLM runs."""

    program: str
    processes: int
    flags: list[str]


def originals() -> dict[str, Original]:
    """By name."""
    flags: dict[str, list[str]] = {}
    found = {}
    for line in (ROOT / "tests" / "mindspeed_flags.txt").read_text().splitlines()[1:]:
        if match := re.fullmatch(r"(\d+) (--.*)", line):
            flags[match[1]] = match[2].split(" ")
        else:
            name, program, numbers = line.split(": ")
            program, _, processes = program.partition(" on ")
            words = [word for number in numbers.split() for word in flags[number]]
            found[name] = Original(program, int(processes or 1), words)
    return found


def ask(script: Path, folder: Path, *flags: str, **environment: str) -> Asked:
    """Run a script with a python that only says what it is asked."""
    echo = folder / "python"
    echo.write_text(_ECHO)
    echo.chmod(0o755)
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = clean | {"PYTHON": str(echo), "DRY_RUN": "1", **environment}
    result = subprocess.run(["bash", str(script), *flags], capture_output=True, text=True, env=env, cwd=folder)
    assert result.returncode == 0, result.stderr
    # Trainings and generation are checked by the program first (that is what is printed); others are shown only.
    words = re.findall(r"^ARG (.*)$", result.stdout, re.M)
    if not words:
        words = [w.strip("'") for w in re.findall(r"'[^']*'", result.stdout)][1:]
        return Asked(1, Path(words[0]).name, words[1:])
    world = int(re.search(r"WORLD=(\d+)", result.stdout)[1])
    assert words[-1] == "--dry-run"
    return Asked(world, Path(words[0]).name, words[1:])
