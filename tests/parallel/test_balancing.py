"""The routers' losses are transformers' `load_balancing_loss_func` with the attention mask, over micro-batches a mean.

However samples are padded or packed, the model is cut, and the loss of the tokens is normalized.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plain import FLAGS, MICRO2, VARIABLE, Document, documents, unstacked
from qwen3_npu.parity.measure import largest_difference
from qwen3_npu.parity.rows import EP2, FULL, PER_DOCUMENT, PP2, RING, SP, TP2, ULYSSES, VPP
from worlds import World

BALANCE, Z = 0.5, 0.05
LOSSES = ["--moe-aux-loss-coeff", str(BALANCE), "--moe-z-loss-coeff", str(Z)]


def losses(model: Any, batch: list[Document]) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Loss of the supervised tokens (a sum), their number, and the routers' losses of one micro-batch."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    longest = max(len(ids) for ids, _ in batch)
    ids, labels, mask = (torch.full((len(batch), longest), fill) for fill in (0, -100, 0))
    for row, (tokens, wanted) in enumerate(batch):
        ids[row, : len(tokens)], labels[row, : len(tokens)] = torch.tensor(tokens), torch.tensor(wanted)
        mask[row, : len(tokens)] = 1
    out = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    total = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    routing: Any = 0.0
    for logits in out.router_logits:
        balance = load_balancing_loss_func((logits,), num_experts=4, top_k=2, attention_mask=mask) / 2
        real = logits.logsumexp(-1).square()[mask.flatten() == 1]
        routing = routing + BALANCE * balance + Z * real.mean()
    return total, int((labels[:, 1:] != -100).sum()), routing


@pytest.fixture(scope="module")
def plain(models: dict[str, str], data: dict[str, str]) -> Any:
    """(form of data, normalization) -> loss and gradients of the first step, micro-batches of 2; each once."""
    from transformers import AutoModelForCausalLM

    known: dict[tuple[str, str], dict[str, Any]] = {}

    def compute(form: str, normalization: str) -> dict[str, Any]:
        if (form, normalization) not in known:
            model = AutoModelForCausalLM.from_pretrained(models["moe"], dtype=torch.float32)
            samples = documents(data[form])[0]
            parts = [losses(model, [*a, *b]) for a, b in zip(samples[::2], samples[1::2], strict=True)]
            tokens = sum(count for _, count, _ in parts)
            one = [
                total / (count * len(parts) if normalization == "micro-batch" else tokens) for total, count, _ in parts
            ]
            (sum(one) + sum(routing for *_, routing in parts) / len(parts)).backward()
            gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
            known[form, normalization] = {"loss": float(sum(one).detach()), "gradients": unstacked(gradients)}
        return known[form, normalization]

    return compute


TOKEN, MICRO = "token", "micro-batch"
BLOCK = ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1"]
CASES = {
    "padded": (1, "single", TOKEN, []),
    "padded to much more, recomputed": (1, "single", MICRO, ["--seq-length", "160", *FULL]),
    "packed, one layer recomputed": (1, "packed", TOKEN, PER_DOCUMENT + BLOCK),
    "dynamic lengths, DP2": (2, "single", TOKEN, VARIABLE),
    "padded, PP2 VPP2": (2, "single", TOKEN, PP2 + VPP),
    "padded, CP2 ulysses": (2, "single", MICRO, ULYSSES),
    "packed, CP2 ring": (2, "packed", TOKEN, PER_DOCUMENT + RING),
    "packed, EP2": (2, "packed", MICRO, PER_DOCUMENT + EP2),
    "padded, TP2 SP PP2": (4, "single", TOKEN, TP2 + SP + PP2),
    "packed, TP2 SP EP2": (4, "packed", TOKEN, PER_DOCUMENT + TP2 + SP + EP2),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_transformers(
    name: str, worlds: dict[int, World], models: dict[str, str], data: dict[str, str], plain: Any, tmp_path: Path
) -> None:
    size, form, normalization, extra = CASES[name]
    flags = [*FLAGS, *LOSSES, *MICRO2, "--load", models["moe"], "--data-path", data[form], *extra]
    flags += ["--loss-normalization", normalization]
    file = tmp_path / "gradients.npz"
    got = worlds[size].run("gradients", flags=flags, steps=1, file=str(file))
    expected = plain(form, normalization)
    assert got["loss"][0] == pytest.approx(expected["loss"], rel=1e-5)
    difference, where = largest_difference(dict(np.load(file)), expected["gradients"])
    assert difference <= 1e-5, where


def test_what_is_told_of_experts_leaves_padding_out(
    worlds: dict[int, World], models: dict[str, str], data: dict[str, str]
) -> None:
    """Their tokens, and with a capacity what is dropped and what is learnt."""
    real = sum(len(ids) for step in documents(data["single"])[:2] for sample in step for ids, _ in sample)
    flags = [*FLAGS, *LOSSES, *MICRO2, "--load", models["moe"], "--data-path", data["single"]]
    for capacity in ([], ["--moe-expert-capacity-factor", "0.8"]):
        short = worlds[1].run("expert_load", flags=[*flags, *capacity, *VARIABLE])
        long = worlds[1].run("expert_load", flags=[*flags, *capacity, "--seq-length", "160"])
        assert long.pop("tokens") == short["tokens"]
        for layer in short.pop("tokens"):
            assert sum(layer) < 2 * real if capacity else sum(layer) == 2 * real
        assert long == pytest.approx(short, rel=1e-5)
        assert (short["dropped"] > 0) == bool(capacity)
