"""Helpers of the converter's tests are importable; models are written once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import samples


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> Hugging Face directory of a tiny model with random bits for weights."""
    root = tmp_path_factory.mktemp("models")
    return {kind: samples.write_bits(root / kind, arch) for kind, arch in samples.ARCHS.items()}


@pytest.fixture(scope="session")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> Hugging Face directory of a tiny float32 model that computes something."""
    root = tmp_path_factory.mktemp("real_models")
    return {kind: samples.write_floats(root / kind, arch) for kind, arch in samples.ARCHS.items()}
