"""Checkpoints of the training loop become models with which transformers computes what the live model computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import samples
from live_training import LIVE_TOKENS

from qwen3_npu.data.train.token_file import IndexedWriter


@pytest.fixture(scope="module")
def trained(real_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND -> checkpoint of two steps, KIND.npy -> the live model's logits."""
    root = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    writer = IndexedWriter(root / "tokens")
    writer.add(rng.integers(0, 250, 6000).astype(np.int32), np.full(120, 50, np.int32))
    writer.close()
    (root / "models").mkdir()
    for kind, folder in real_models.items():
        (root / "models" / kind).symlink_to(folder)
    script = Path(__file__).with_name("live_training.py")
    command = [sys.executable, str(script), str(root / "models"), str(root / "tokens"), str(root)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return root


def transformers_logits(folder: Path) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(LIVE_TOKENS)).logits.numpy()


@pytest.mark.parametrize("kind", samples.ARCHS)
def test_logits_of_a_trained_model(kind: str, trained: Path, real_models: dict[str, Path], tmp_path: Path) -> None:
    live = np.load(trained / f"{kind}.npy")
    assert np.abs(live - transformers_logits(real_models[kind])).max() > 0.01, "the training moved the weights"
    assert (trained / kind / "iter_0000002" / "mp_rank_00" / "optimizer.pt").is_file()
    samples.to_hf(trained / kind, tmp_path / "hf", "--verify")
    assert np.abs(live - transformers_logits(tmp_path / "hf")).max() < 1e-5
    # And through another layout and format.
    samples.to_mg(trained / kind, tmp_path / "dist", "--target-tensor-parallel-size", 2, "--ckpt-format", "torch_dist")
    samples.to_hf(tmp_path / "dist", tmp_path / "hf2")
    samples.assert_same_weights(tmp_path / "hf", tmp_path / "hf2")


def test_what_torch_saved(trained: Path, tmp_path: Path) -> None:
    """Enums, devices, paths, sets, numpy states, parameters inside larger storages, no config.json."""
    kind = "moe"
    samples.to_hf(trained / kind, tmp_path / "hf")
    samples.to_hf(trained / "resaved", tmp_path / "hf2")
    samples.assert_same_weights(tmp_path / "hf", tmp_path / "hf2")
    config = json.loads((tmp_path / "hf2" / "config.json").read_text())
    assert config.get("num_experts", 0) == samples.ARCHS[kind].num_experts
