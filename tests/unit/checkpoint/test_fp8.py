"""FP8 models of the Hub: the weights are those that transformers computes from codes and scales."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import samples
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qwen3_npu.checkpoint.binary.dtypes import BF16, F32
from qwen3_npu.checkpoint.binary.fp8 import BlockScaled
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile

BLOCK = [16, 32]


def quantized(source: Path, folder: Path, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Write a model as Qwen3-*-FP8 are; what transformers makes of its weights."""
    folder.mkdir()
    tensors, expected = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        expected[name] = tensors[name] = weight.bfloat16()
        if "_proj.weight" not in name:
            continue
        rows, columns = weight.shape
        blocks = weight.reshape(rows // BLOCK[0], BLOCK[0], columns // BLOCK[1], BLOCK[1])
        scale = (blocks.abs().amax((1, 3)) / 448).to(scale_dtype)
        codes = (blocks / scale.float()[:, None, :, None]).clamp(-448, 448).reshape(rows, columns)
        tensors[name], tensors[f"{name}_scale_inv"] = codes.to(torch.float8_e4m3fn), scale
        expected[name] = Fp8Dequantize(None)._dequantize_one(tensors[name], scale, torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return expected


@pytest.mark.parametrize(("kind", "scale_dtype"), [("untied", torch.bfloat16), ("moe", torch.float32)])
def test_weights_are_those_that_transformers_dequantizes(
    kind: str, scale_dtype: torch.dtype, real_models: dict[str, Path], tmp_path: Path
) -> None:
    expected = quantized(real_models[kind], tmp_path / "fp8", scale_dtype)
    samples.to_mg(tmp_path / "fp8", tmp_path / "mg", "--target-tensor-parallel-size", 2, "--verify")
    samples.ok(
        "--load-model-type",
        "mg",
        "--load-dir",
        tmp_path / "mg",
        "--save-model-type",
        "hf",
        "--save-dir",
        tmp_path / "hf",
    )
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_every_code_and_blocks_that_do_not_fill_the_matrix(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(5).reshape(20, 64).view(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.5
    save_file({"w": codes, "w_scale_inv": scales}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    by_hand = codes.float() * scales.repeat_interleave(16, 0)[:20].repeat_interleave(30, 1)[:, :64]
    got = BlockScaled("w", file, file, (16, 30), F32).read(((3, 20), (7, 64)))
    np.testing.assert_array_equal(got, by_hand[3:, 7:].numpy())
    with pytest.raises(ValueError, match=r"w_scale_inv has shape \[2, 3\]; \[1, 1\] is expected"):
        BlockScaled("w", file, file, (128, 128), F32)


def test_memory_beyond_the_result_does_not_grow_with_the_matrix(tmp_path: Path) -> None:
    peaks = []
    for rows in (8192, 16384):
        codes = torch.zeros(rows, 2048, dtype=torch.float8_e4m3fn)
        save_file({"w": codes, "w_scale_inv": torch.ones(rows // 128, 16)}, tmp_path / f"{rows}.safetensors")
        file = SafetensorsFile(tmp_path / f"{rows}.safetensors")
        tracemalloc.start()
        out = BlockScaled("w", file, file, (128, 128), BF16).read(((0, rows), (0, 2048)))
        peaks.append(tracemalloc.get_traced_memory()[1] - out.nbytes)
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20) < 80 << 20
