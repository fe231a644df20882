"""The report of a hang: the verdict, all stacks and calls in a folder, the error that torchrun shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen3_npu.watch.judge import HangVerdict
from qwen3_npu.watch.node import Report
from qwen3_npu.watch.state import INSIDE, LAUNCHED

_STATES = {INSIDE: "inside", LAUNCHED: "launched"}
_SHOWN = 8  # most calls shown of a channel


def write(logs: Path, verdict: HangVerdict, reports: Sequence[Report]) -> Path:
    """Write a folder with the verdict and a file per rank. Raises: OSError."""
    step = max((report.rank.steps for report in reports), default=0) + 1
    number, folder = 1, logs / f"hang_step_{step}"
    while folder.exists():  # folders of earlier starts of the job
        number += 1
        folder = logs / f"hang_step_{step}_{number}"
    folder.mkdir(parents=True)
    (folder / "verdict.txt").write_text(verdict.text + "\n", encoding="utf-8")
    for report in reports:
        (folder / f"rank_{report.rank.rank}.txt").write_text(_text(report), encoding="utf-8")
    return folder


def _text(report: Report) -> str:
    rank = report.rank
    lines = [str(rank), f"process {rank.pid}, state {rank.state or 'gone'} {rank.waits_in}", rank.place, ""]
    lines += ["calls of each group, the newest first:"]
    for channel in sorted(rank.channels.values(), key=lambda channel: channel.last.age):
        lines.append(f"  group {channel.label}, ranks {', '.join(map(str, channel.ranks))}")
        calls = channel.calls[::-1][:_SHOWN] or (channel.last,)
        lines += [f"    {e} {e.tensor}, {_STATES.get(e.state, 'left')}, entered {e.age:.3f} s ago" for e in calls]
    return "\n".join([*lines, "", report.stack or "no stacks: the process does not answer", ""])
