"""Shared by all tests: where real data lies, and small models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tests train many tiny models in several processes; one thread each is fastest and repeats bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when triton is imported, whoever does that first: kernels of a GPU run on the host.
os.environ["TRITON_INTERPRET"] = "1"

# Folder of a test -> its markers.
MARKERS = {"parallel": ("parallel", "slow"), "npu_sim": ("npu_sim", "slow"), "examples": ("slow",)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the folder that they are in."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0] if item.path.is_relative_to(ROOT / "tests") else ""
        for name in MARKERS.get(folder, ()):
            item.add_marker(name)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real tokenizer and samples (not part of the project for their licences); tests that need them skip without."""
    folder = Path(os.environ.get("QWEN3_NPU_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "qwen3-tokenizer").is_dir():
        pytest.skip(f"real data not found in {folder} (set QWEN3_NPU_TEST_DATA)")
    return folder
