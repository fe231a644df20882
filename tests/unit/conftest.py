"""Makes `import tiny` work, and megatron importable without an accelerator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session", autouse=True)
def cpu_platform() -> None:
    """As an entry point does, before megatron is imported."""
    from qwen3_npu.platform import select_platform

    select_platform("cpu").activate()


@pytest.fixture(scope="session")
def process() -> Iterator[object]:
    """A process group of one."""
    from qwen3_npu.args.parallel import RuntimeArgs
    from qwen3_npu.distributed.launch import process_group
    from qwen3_npu.platform import select_platform

    with process_group(select_platform("cpu"), RuntimeArgs()) as world:
        yield world
