"""`conversion.json`: what was converted from what, with the SHA-256 of every tensor written."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu import __version__
from qwen3_npu.checkpoint.formats.base import Record
from qwen3_npu.files import write_text

MANIFEST = "conversion.json"


def write_manifest(root: Path, facts: Mapping[str, Any], records: Mapping[str, Record]) -> None:
    """Write the manifest of a finished conversion.

    Args:
        facts: what is known of source and target.
        records: of every file, by its path relative to `root`.
    """
    content = {
        "versions": {"qwen3_npu": __version__, "numpy": np.__version__, "python": platform.python_version()},
        **facts,
        "files": {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in records.items()},
    }
    write_text(root / MANIFEST, json.dumps(content, indent=1) + "\n")
