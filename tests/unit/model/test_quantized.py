"""NF4: codes, scales and restored weights are bitsandbytes', to the bit; a plan counts them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from bitsandbytes import functional

from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.checkpoint.binary.dtypes import BF16
from qwen3_npu.checkpoint.training.save import Trained
from qwen3_npu.errors import UsageError
from qwen3_npu.kernels import nf4
from qwen3_npu.model.quantized import ScalesOfTensor, fill, looked_up, quantized, restored


def hard(dtype: torch.dtype) -> torch.Tensor:
    """Usual weights, a block of zeros, weights between two values, very small and very large ones."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator) * 0.02
    values = torch.tensor(nf4.VALUES)
    weight[0, :64] = 0
    weight[1, :16], weight[1, 16:31] = values, (values[:-1] + values[1:]) / 2
    weight[2] *= 1e-30
    weight[3] *= 1e30
    weight[4, 64:128] = -0.5
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1 << 23, 1 << 10])
def test_codes_and_weights_are_those_of_bitsandbytes(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "_AT_ONCE", at_once)
    weight = hard(dtype)
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    codes, scales = nf4.quantize(weight)
    assert torch.equal(codes, theirs.flatten())
    assert torch.equal(scales, state.absmax)
    restored = nf4.dequantize(codes, scales, dtype).view_as(weight)
    assert torch.equal(restored, functional.dequantize_4bit(theirs, state))
    assert (restored - weight).abs().max() > 0


def test_scales_in_8_bits_are_those_of_bitsandbytes_also_of_a_part_of_a_tensor() -> None:
    """Of two tensors, of whose rows and columns a rank has some; a group of 256 scales begins within a row."""
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(70, 640, generator=generator) * 0.02, torch.zeros(48, 640)]
    whole[0][3, :64], whole[1][:20] = 0, torch.randn(20, 640, generator=generator)
    parts = [(slice(0, 48), slice(0, 48), 4), (slice(48, 64), slice(54, 70), 4)], [(slice(64, 112), slice(0, 48), 4)]
    local = torch.cat([whole[0][:48], whole[0][54:], whole[1]])[:, 256:512]
    parameter = quantized(torch.nn.Parameter(torch.empty(112, 256)), (112, 256), is_double=True)
    expected = []
    for weight in whole:
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        found, tops, mean = nf4.quantize_scales(nf4.largest(weight))
        assert torch.equal(found, state.absmax)
        assert torch.equal(tops, state.state2.absmax)
        assert torch.equal(mean, state.offset)
        expected.append(functional.dequantize_4bit(codes, state))
    places = [ScalesOfTensor(nf4.largest(w).view(len(w), -1), where) for w, where in zip(whole, parts, strict=True)]
    fill(parameter, local, lambda scales: places)
    rows = torch.cat([expected[0][:48], expected[0][54:], expected[1]])[:, 256:512]
    assert torch.equal(restored(parameter), rows)
    assert torch.equal(looked_up(torch.tensor([[50, 3]]), parameter), rows[[50, 3]][None])


def test_a_base_is_quantized_for_adapters_only() -> None:
    with pytest.raises(UsageError, match="--qlora quantizes the base of an adapter; give --lora-r"):
        LoraArgs(qlora=True)
    assert LoraArgs(qlora=True, lora_r=4).lora_ckpt_filter, "codes are not saved"


@pytest.mark.parametrize("weights", [[], [torch.zeros(4, dtype=torch.uint8)]], ids=["no weights", "codes alone"])
def test_a_rank_without_floats_is_saved_in_the_dtype_of_the_others(weights: list[torch.Tensor]) -> None:
    """No-op layers have no weights, an embedding in 4 bits beside them none of floats."""
    chunk = torch.nn.ParameterList(torch.nn.Parameter(weight, requires_grad=False) for weight in weights)
    chunk.config = mock.Mock(params_dtype=torch.bfloat16)
    assert Trained(mock.Mock(), mock.Mock(), [chunk], mock.Mock(), mock.Mock()).dtype is BF16
