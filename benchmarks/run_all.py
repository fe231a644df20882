#!/usr/bin/env python3
"""Run every benchmark, write benchmarks/results/NAME.json, and print each ratio beside that of the last result.

    python benchmarks/run_all.py [--only convert save ...] [--quick] [--tokenizer DIR --words FILE] [--table]

A result says when it was made, of which commit, on which machine and under which load. Every ratio compares two
programs that ran in turns on the same machine; times alone are not compared from one result to the next. --table
writes the table of docs/benchmarks.md from the results and runs nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
MARK = "<!-- made by benchmarks/run_all.py --table -->\n"
# Name -> its arguments, and those that --quick adds: fewer repeats and questions, the same sizes.
RUNS: dict[str, tuple[list[str], list[str]]] = {
    "convert": ([], ["--sizes", "qwen3-0.6b", "--repeats", "1"]),
    "evaluate": ([], ["--questions", "8", "--theirs", "2"]),
    "generate": ([], ["--steps", "8", "--rounds", "1"]),
    "plan_scripts": ([], []),
    "preprocess": ([], ["--mb", "16", "--big-mb", "0", "--alpaca-mb", "8", "--repeats", "1"]),
    "save": ([], ["--repeats", "1"]),
    "train": ([], ["--steps", "4", "--only", "speed"]),
}
# What a benchmark compares: where in its result, and what the figure says.
RATIOS = ("ratio", "ratio_to_cp", "ratio_held", "times_faster_than_like_mindspeed", "times_the_ceiling")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--quick", action="store_true", help="fewer repeats and questions")
    parser.add_argument("--tokenizer", help="a Qwen3 tokenizer, for preprocess")
    parser.add_argument("--words", help="a file of plain text, for preprocess")
    parser.add_argument("--table", action="store_true", help="write the table of docs/benchmarks.md and stop")
    args = parser.parse_args()
    failed = []
    for name in [] if args.table else args.only:
        usual, quick = RUNS[name]
        words = [*usual, *(quick if args.quick else [])]
        if name == "preprocess":
            if not (args.tokenizer and args.words):
                print(f"{name}: left out; it needs --tokenizer and --words", flush=True)
                continue
            words += ["--tokenizer", args.tokenizer, "--words", args.words]
        before = _read(RESULTS / f"{name}.json")
        found = _run(name, words)
        if found is None:
            failed.append(name)
            continue
        for line in compared(name, before, found):
            print(line, flush=True)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    _write_table()
    print(f"failed: {' '.join(failed)}" if failed else "all ran")
    return int(bool(failed))


def _run(name: str, words: list[str]) -> dict[str, Any] | None:
    """The result of one benchmark; None if it failed, whose last lines are printed."""
    command = [sys.executable, f"benchmarks/{name}.py", *words]
    load, start = os.getloadavg()[0], time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: exit {done.returncode}\n{done.stderr[-2000:]}", flush=True)
        return None
    shown = [Path(word).name if os.path.isabs(word) else word for word in words]  # folders of a machine are its own
    result = json.loads(done.stdout) if name != "plan_scripts" else {"rows": done.stdout.count("\n") - 2}
    result.pop("command", None)
    return {
        "command": " ".join(["python", f"benchmarks/{name}.py", *shown]),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.fromtimestamp(start, datetime.timezone.utc).isoformat(timespec="minutes"),
        "machine": {"cpu": _cpu(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],  # running processes, of one minute, before and after
        "seconds": round(time.time() - start),
        "result": result,
    }


def ratios(found: object, path: str = "") -> Iterator[tuple[str, float]]:
    """(where it stands, ratio) of a result."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key in RATIOS and isinstance(value, int | float):
                yield f"{path} {key}".strip(), float(value)
            elif key in RATIOS and isinstance(value, dict) and "time" in value:
                yield f"{path} {key}".strip(), float(value["time"])
            else:
                yield from ratios(value, f"{path} {key}".strip())
    elif isinstance(found, list):
        for number, value in enumerate(found):
            yield from ratios(value, f"{path} {number}".strip())


def compared(name: str, before: dict[str, Any] | None, found: dict[str, Any]) -> list[str]:
    """A line for each ratio: now, and how it is to the last result's."""
    last = dict(ratios(before["result"])) if before else {}
    lines = []
    for where, value in ratios(found["result"]):
        beside = (
            f"; the last was {last[where]:g}: x {value / last[where]:.2f}" if last.get(where) else "; no last result"
        )
        lines.append(f"{name}: {where}: {value:g}{beside}")
    return lines or [f"{name}: ran, {found['seconds']} s"]


def _write_table() -> None:
    lines = ["| benchmark | when (UTC) | commit | on | load | ratios |", "|---" * 6 + "|"]
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        on, load = found["machine"], " to ".join(f"{value:g}" for value in found["load"])
        said = "; ".join(f"{where} {value:g}" for where, value in ratios(found["result"])) or "ran"
        when = found["date"].removesuffix("+00:00").replace("T", " ")
        cells = (f"`{found['command']}`", when, found["commit"], f"{on['cpus']} x {on['cpu']}", load, said)
        lines.append(f"| {' | '.join(cells)} |")
    head, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(head + MARK + "\n" + "\n".join(lines) + "\n")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
