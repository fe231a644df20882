"""From a training's own figures to this cluster's device table: `--learn RUN_DIR`."""

from __future__ import annotations

import json
from pathlib import Path

from qwen3_npu import schema
from qwen3_npu.errors import UsageError
from qwen3_npu.files import write_text
from qwen3_npu.plan.device import find_device


def learn(folder: Path, output: Path) -> list[str]:
    """Write the table; what was learnt, a line each.

    A run's metrics.jsonl has a line `plan` (what was predicted for which device) and the measured steps. Products and
    attention take the blame for computing in proportion; memory beyond the plan becomes the reserve.

    Raises:
        UsageError: no such run, or it was not planned.
    """
    path = folder / "metrics.jsonl"
    lines = schema.read_small(path).splitlines()
    plans = [row for row in (_row(line, path) for line in lines) if "planned_step_seconds" in row.fields]
    if not plans:
        raise UsageError(f"--learn {folder}: {path} has no planned step; the training must have logged three steps")
    last = plans[-1]
    device = find_device(last.text("device"))
    planned, measured = (last.number(f"{kind}_step_seconds", least=1e-9) for kind in ("planned", "measured"))
    ratio = measured / planned
    extra = last.number("measured_bytes", least=0) - last.number("planned_bytes", least=0)
    constants = {
        "product": min(0.98, device.product / ratio),
        "attention": min(0.98, device.attention / ratio),
        "streaming": min(0.98, device.streaming / ratio),
        "reserve": max(1.0, device.reserve + extra),
        "error": 0.1,
    }
    record = {"device": device.name, "learnt_from": last.text("layout", ""), "constants": constants}
    write_text(output, json.dumps(record, indent=2) + "\n")
    return [
        f"step: planned {planned:.2f} s, measured {measured:.2f} s",
        f"written: {output}; give it as --device-table {output}",
    ]


def _row(line: bytes, path: Path) -> schema.Record:
    return schema.record(schema.parse_json(line, str(path)), str(path))
