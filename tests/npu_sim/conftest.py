"""Worlds of simulated NPUs, the CPU world that they are compared with, models and data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel" / "support"))

import counts
import tiny
import wheel
from worlds import World

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="package")
def npu_worlds() -> Iterator[dict[int, World]]:
    """World size -> processes with a simulated NPU each; skips where torch_npu's wheel cannot be had."""
    try:
        environment = wheel.environment()
    except RuntimeError as error:
        pytest.skip(f"no simulated NPU: {error}")
    started = {size: World(size, HERE / "worker.py", environment) for size in (1, 2)}
    yield started
    for world in started.values():
        world.stop()


@pytest.fixture(scope="package")
def cpu_world() -> Iterator[World]:
    """One process on the CPU."""
    world = World(1)
    yield world
    world.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kind -> Hugging Face directory of a tiny model."""
    root = tmp_path_factory.mktemp("models")
    archs = {kind: tiny.arch(kind) for kind in ("untied", "tied", "moe")}
    # Blocks of 4-bit weights, 64 of a row, on two tensor-parallel ranks, and in an expert.
    archs |= {"wide": tiny.arch(intermediate_size=128), "wide moe": tiny.arch("moe", moe_intermediate_size=64)}
    return {kind: str(tiny.write_model(root / kind, arch)) for kind, arch in archs.items()}


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a token file; several documents share a sequence, each ends with token 1."""
    return str(counts.write_documents(tmp_path_factory.mktemp("tokens") / "text_document"))
