"""--fp32-residual-connection: transformers' modules in bfloat16, their branches added up in float32 by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_model import built, transformers_model

import tiny

IDS = torch.randint(0, 256, (1, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small branches beside a large embedding: a residual in bfloat16 has no digits for them."""
    made = tiny.write_model(tmp_path_factory.mktemp("model") / "hf", tiny.arch("untied"))
    tensors = safetensors.torch.load_file(made / "model.safetensors")
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.mul_(2e-3)
        elif "embed_tokens" in name:
            tensor.div_(tensor.std())
    safetensors.torch.save_file(tensors, made / "model.safetensors", {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layers add to the embedding; and the gradient of the first MLP's last weight."""

    def norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        return (y * module.weight.float()).bfloat16()

    theirs: Any = transformers_model(folder).bfloat16()
    model, length = theirs.model, IDS.shape[1]
    first = hidden = model.embed_tokens(IDS).float()
    rotation = model.rotary_emb(hidden.bfloat16(), torch.arange(length).unsqueeze(0))
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None].bfloat16()
    for layer in model.layers:
        attended, _ = layer.self_attn(norm(layer.input_layernorm, hidden), rotation, attention_mask=mask)
        hidden = hidden + attended.float()
        hidden = hidden + layer.mlp(norm(layer.post_attention_layernorm, hidden)).float()
    logits = theirs.lm_head(norm(model.norm, hidden)).float()
    torch.nn.functional.cross_entropy(logits[0], IDS[0]).backward()
    return (hidden - first).detach(), model.layers[0].mlp.down_proj.weight.grad.float()


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.parametrize("train", [{}, {"recompute_norm": True}], ids=["plain", "norms recomputed"])
@pytest.mark.usefixtures("process")
def test_small_branches_reach_a_residual_in_float32(
    folder: Path, expected: tuple[torch.Tensor, torch.Tensor], train: dict[str, Any], kernel: str
) -> None:
    from qwen3_npu.model.sequence import TokenSequence

    positions = torch.arange(IDS.shape[1]).unsqueeze(0)
    error = {}
    for wide in (True, False):
        with built(folder, kernel, bf16=True, fp32_residual_connection=wide, **train) as model:
            model.bfloat16()
            kept: list[torch.Tensor] = []
            for module in (model.decoder.layers[0].input_layernorm, model.decoder.final_layernorm):
                module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            sequence = TokenSequence(positions, None, model.arch.rope, torch.bfloat16)
            model(IDS, positions, None, labels=IDS, packed_seq_params=sequence).mean().backward()
            first, last = kept[:2]
            assert last.dtype == (torch.float32 if wide else torch.bfloat16)
            delta = (last.float() - first.float()).detach().transpose(0, 1)
            grad = model.decoder.layers[0].mlp.linear_fc2.weight.grad.float()
        error[wide] = [
            ((got - said).norm() / said.norm()).item() for got, said in zip((delta, grad), expected, strict=True)
        ]
    assert max(error[True]) < 0.02, error
    assert error[False][0] > 0.3, "bfloat16 would do as well"
