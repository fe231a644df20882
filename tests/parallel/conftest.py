"""Worlds, models and data for the parallel tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import llama
import tiny
from plain import LONGEST
from worlds import World

KINDS = ("untied", "tied", "moe", "few", "qwen2", "yarn")


@pytest.fixture(scope="package")
def worlds() -> Iterator[dict[int, World]]:
    """World size -> world, started at the first case."""
    started = {size: World(size) for size in (1, 2, 4)}
    yield started
    for world in started.values():
        world.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kind -> Hugging Face directory of a tiny model."""
    root = tmp_path_factory.mktemp("models")
    made = {kind: tiny.write_model(root / kind, tiny.arch(kind)) for kind in KINDS}
    with llama.registered() as arch:
        made["llama"] = tiny.write_model(root / "llama", arch)
    return {kind: str(folder) for kind, folder in made.items()}


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a token file."""
    return str(tiny.write_tokens(tmp_path_factory.mktemp("tokens") / "text_document"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Form -> prefix."""
    root = tmp_path_factory.mktemp("instructions")
    return {
        "single": str(tiny.write_instructions(root / "single")),
        "packed": str(tiny.write_instructions(root / "packed", pack=LONGEST)),
    }
