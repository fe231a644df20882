"""For the tests of data."""

from __future__ import annotations

import json
from pathlib import Path


def write_lines(path: Path, records: list[dict]) -> Path:
    """Records as a .jsonl file."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
