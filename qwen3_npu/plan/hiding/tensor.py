"""Exposed tensor-parallel communication, in closed form.

For one layer, with product P and exchange C of each linear (`distributed/tensor_parallel`): forward, and backward of
a row-parallel linear, run in n pieces, which take (C + P) / n + (n - 1) / n max(C, P), or in one fused operation,
max(C, P) divided by the device's efficiency. The backward in pieces hides its exchange behind the weight's gradient,
too, but for one piece. In the backward of a column-parallel linear the gather is hidden behind the following linear,
the scatter behind the rest of the input's gradient and the weight's gradient. Without the flags, the backward of a
column-parallel linear hides each exchange behind a product, as in megatron. `trace` plays the real program.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_npu.plan.device import Device
from qwen3_npu.plan.setup import Setup


def share_left(
    setup: Setup, device: Device, *, exchange: float, columns: Sequence[float], rows: Sequence[float]
) -> float:
    """Exposed seconds of exchanges, relative to those without `overlap_tensor`.

    Args:
        exchange: seconds of one gather or scatter.
        columns, rows: seconds of the product of each column- and row-parallel linear of a layer.
    """
    weights = 0.0 if setup.lora_rank else 1.0  # a frozen weight has no gradient to hide behind
    if not setup.sequence_parallel:
        both = 2 * exchange  # an all-reduce
        back = sum(max(0.0, both - weights * product) for product in columns)
        return _share(sum(_in_pieces(setup, both, p) for p in rows) + back, len(rows) * both + back)
    plain = exchange * (len(columns) + 2 * len(rows))
    plain += sum((1 + weights) * max(0.0, exchange - product) for product in columns)

    def hidden(product: float) -> float:
        if setup.fused_tensor and device.kernels == "npu":
            return max(exchange, product) / device.fused - product
        return _in_pieces(setup, exchange, product)

    behind = 1 - 1 / setup.tensor_pieces  # of the product: what is left when the first piece of its sum leaves
    left = sum(map(hidden, columns)) + sum(map(hidden, rows))
    if setup.fused_tensor and device.kernels == "npu":
        left += sum(map(hidden, rows))
    else:  # all but the last piece of the weight's gradient is computed before that piece arrives
        left += sum(max(0.0, hidden(product) - behind * weights * product) for product in rows)
    for product in columns:
        left += max(0.0, exchange - (behind + 1) * product) if weights else hidden(product)
    return _share(left, plain)


def _in_pieces(setup: Setup, exchange: float, product: float) -> float:
    n = setup.tensor_pieces
    return (exchange + product) / n + (n - 1) / n * max(exchange, product) - product


def _share(left: float, plain: float) -> float:
    return min(1.0, left / plain) if plain else 1.0
