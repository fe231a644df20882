"""NF4: codes, scales and restored weights are bitsandbytes', to the bit; a plan counts them."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional

from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.errors import UsageError
from qwen3_npu.kernels import nf4


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


def test_a_base_is_quantized_for_adapters_only() -> None:
    with pytest.raises(UsageError, match="--qlora quantizes the base of an adapter; give --lora-r"):
        LoraArgs(qlora=True)
    assert LoraArgs(qlora=True, lora_r=4).lora_ckpt_filter, "codes are not saved"
