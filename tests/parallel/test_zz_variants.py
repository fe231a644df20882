"""The routers' losses are transformers' `load_balancing_loss_func` with the attention mask, over micro-batches a mean.

However samples are padded or packed, the model is cut, and the loss of the tokens is normalized.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from plain import FLAGS, VARIABLE, Document, documents, unstacked
from qwen3_npu.parity.measure import largest_difference
from qwen3_npu.parity.rows import EP2, PER_DOCUMENT, PP2, RING, TP2, ULYSSES

BALANCE, Z = 0.5, 0.05
W = [BALANCE, Z]
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
        routing = routing + W[0] * balance + W[1] * real.mean()
    return total, int((labels[:, 1:] != -100).sum()), routing


def compute(model_dir, prefix, normalization, k):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    samples = documents(prefix)[0]
    parts = [losses(model, [d for s in samples[i : i + k] for d in s]) for i in range(0, len(samples), k)]
    tokens = sum(c for _, c, _ in parts)
    one = [t / (c * len(parts) if normalization == "micro-batch" else tokens) for t, c, _ in parts]
    (sum(one) + sum(r for *_, r in parts) / len(parts)).backward()
    return {
        "loss": float(sum(one).detach()),
        "gradients": unstacked({n: p.grad.numpy() for n, p in model.named_parameters()}),
    }


TOKEN, MICRO = "token", "micro-batch"
CASES = {
    "mb1": (1, "single", TOKEN, 1, (0.5, 0.05), []),
    "mb4 micro": (1, "single", MICRO, 4, (0.5, 0.05), []),
    "mb8": (1, "single", TOKEN, 8, (0.5, 0.05), ["--seq-length", "256"]),
    "packed mb4": (1, "packed", TOKEN, 4, (0.5, 0.05), PER_DOCUMENT),
    "packed mb8 micro": (1, "packed", MICRO, 8, (0.5, 0.0), PER_DOCUMENT),
    "z only": (1, "single", MICRO, 2, (0.0, 0.3), []),
    "aux only": (1, "single", TOKEN, 2, (0.7, 0.0), []),
    "z only packed": (1, "packed", TOKEN, 2, (0.0, 0.3), PER_DOCUMENT),
    "variable mb4": (1, "single", MICRO, 4, (0.5, 0.05), VARIABLE),
    "EP2 allgather": (2, "single", TOKEN, 2, (0.5, 0.05), [*EP2, "--moe-token-dispatcher-type", "allgather"]),
    "CP2 ring padded": (2, "single", TOKEN, 4, (0.5, 0.05), RING),
    "TP2 no SP packed mb4": (2, "packed", MICRO, 4, (0.5, 0.05), PER_DOCUMENT + TP2),
    "DP2 z only mb1": (2, "single", MICRO, 1, (0.0, 0.3), []),
    "PP2 aux packed mb4": (2, "packed", TOKEN, 4, (0.5, 0.0), PER_DOCUMENT + PP2),
    "ulysses packed": (2, "packed", TOKEN, 2, (0.5, 0.0), PER_DOCUMENT + ULYSSES),
}


@pytest.mark.parametrize("name", CASES)
def test_v(name, worlds, models, data, tmp_path):
    size, form, norm, k, w, extra = CASES[name]
    W[:] = w
    flags = [
        *FLAGS,
        "--moe-aux-loss-coeff",
        str(w[0]),
        "--moe-z-loss-coeff",
        str(w[1]),
        "--micro-batch-size",
        str(k),
        "--load",
        models["moe"],
        "--data-path",
        data[form],
        *extra,
        "--loss-normalization",
        norm,
    ]
    file = tmp_path / "g.npz"
    got = worlds[size].run("gradients", flags=flags, steps=1, file=str(file))
    expected = compute(models["moe"], data[form], norm, k)
    assert got["loss"][0] == pytest.approx(expected["loss"], rel=1e-5)
    difference, where = largest_difference(dict(np.load(file)), expected["gradients"])
    assert difference <= 1e-5, where
