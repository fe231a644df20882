"""Seconds of a product and of a collective, by a device's table.

Products go by FLOP and a share of the device's peak that grows with their size; collectives by the ring formulas
(latency x steps + bytes x (n - 1) / n / bandwidth).
"""

from __future__ import annotations

from qwen3_npu.plan.device import Device
from qwen3_npu.plan.shape import Shape


def product_seconds(device: Device, flops: float, count: int = 1) -> float:
    """Seconds of `count` equal products that have `flops` FLOP together."""
    each = flops / max(count, 1)
    return flops / (device.flops * device.product) * (1 + device.product_half / max(each, 1.0))


def collective_seconds(device: Device, size: int, stride: int, moved: float, *, steps: float = 1.0) -> float:
    """Seconds of an all-gather, reduce-scatter or all-to-all that leaves `moved` bytes on each of `size` ranks.

    Args:
        stride: distance of neighbouring ranks; a group that leaves the domain is as fast as the network.
        steps: of latency, in collectives.
    """
    if size == 1:
        return 0.0
    inside = size * stride <= device.domain
    bandwidth = device.bandwidth(size, inside) * device.transfer
    latency = device.latency if inside else device.network_latency
    return steps * latency * (size - 1) ** 0.5 + moved * (size - 1) / size / bandwidth


def exchange_seconds(
    device: Device, size: int, stride: int, moved: float, *, per_node: int = 0, steps: float = 2.0
) -> float:
    """Seconds of an all-to-all in which each of `size` ranks sends `moved` bytes, the same to all.

    What stays in a node (or SuperPoD) takes its links, at the same time as what leaves it takes the network.

    Args:
        per_node: copies of each token, of which one travels to a node, whatever number of them it needs; 0: all travel.
        steps: of latency; 2 with the exchange of sizes before it.
    """
    nodes = max(1.0, size * stride / device.domain)
    if nodes == 1:
        return collective_seconds(device, size, stride, moved, steps=steps)
    share = nodes * (1 - (1 - 1 / nodes) ** per_node) / per_node if per_node else 1.0
    between = moved * share * (1 - 1 / nodes) / device.network
    inside = moved / nodes / device.bandwidth(max(2, round(size / nodes)), True)
    return steps * device.network_latency * (size - 1) ** 0.5 + max(between, inside) / device.transfer


def attention_products(shape: Shape, tp: int) -> list[float]:
    """Weights of one rank in each of attention's products."""
    h, heads = shape.hidden_size, shape.num_attention_heads
    last = shape.output_width * h / tp
    if not shape.is_mla:
        return [h * (shape.query_width + shape.key_width + shape.value_width) / tp, last]
    kv, q = shape.kv_lora_rank, shape.q_lora_rank
    compress = h * (kv + shape.qk_pos_emb_head_dim + q)
    return [
        compress,
        (q or h) * shape.query_width / tp,
        kv * heads * (shape.qk_head_dim + shape.v_head_dim) / tp,
        last,
    ]
