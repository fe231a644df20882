"""benchmarks/gpu.py does what it does on a GPU here, too, in tiny shapes."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwen3_npu.platform import select_platform

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_layers_are_trained_and_timed_beside_transformers(
    gpu: ModuleType, process: Any, tmp_path: Path, name: str
) -> None:
    found = {}
    for section, train in (
        (name, gpu._ours(select_platform("cpu"), process, tmp_path)),
        (f"peer_{name}", gpu._peer("cpu", tmp_path)),
    ):
        gpu._runs(name, True, gpu.Record(tmp_path / f"{section}.json"), train)
        found[section] = json.loads((tmp_path / f"{section}.json").read_text())
    for runs in found.values():
        assert "8 x 1 packed" in runs
        for result in runs.values():
            # An untrained model: every word of 256 is as likely as any other.
            assert result["loss"] == pytest.approx(math.log(256), rel=0.1)
            assert result["tokens_per_s"] > 0
    text = "\n".join(gpu.table(found))
    assert f"{name} 1 x 1" in text
    assert "mm" in text


def test_the_kernels_are_checked_and_timed_and_a_wrong_one_is_named(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, rates = importlib.import_module("gpu_kernels"), importlib.import_module("gpu_rates")
    found = {"kernels": {}, "rates": {}}
    kernels.check("cpu", kernels.TINY, found["kernels"].__setitem__)
    rates.rates("cpu", kernels.TINY, found["rates"].__setitem__)
    lines = gpu.table(found)
    assert lines[0].startswith("kernels: ")
    assert lines[0].endswith(", 0 wrong")
    assert any(line.startswith("swiglu ") for line in lines)
    from qwen3_npu.kernels import torch_native

    monkeypatch.setattr(torch_native, "swiglu", lambda x: x[..., x.shape[-1] // 2 :] * 1.0)
    kernels.check("cpu", kernels.TINY, found["kernels"].__setitem__)
    assert [line for line in gpu.table(found) if "WRONG" in line and "swiglu float32" in line]
