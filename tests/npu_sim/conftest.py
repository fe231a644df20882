"""Worlds of simulated NPUs, the CPU world that they are compared with, models and data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qwen3_npu.data.train.token_file import IndexedWriter, publish

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel" / "support"))

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
    return {kind: str(tiny.write_model(root / kind, tiny.arch(kind))) for kind in ("untied", "moe")}


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a token file; several documents share a sequence, each ends with token 1."""
    prefix, rng = tmp_path_factory.mktemp("tokens") / "text_document", np.random.default_rng(0)
    lengths = rng.integers(5, 25, 200)
    documents = [np.append((rng.integers(254) + np.cumsum(rng.integers(1, 4, n - 1))) % 254 + 2, 1) for n in lengths]
    writer = IndexedWriter(prefix)
    writer.add(np.concatenate(documents).astype(np.int32), lengths.astype(np.int32))
    publish([writer])
    return str(prefix)
