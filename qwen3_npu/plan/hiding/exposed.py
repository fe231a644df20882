"""Seconds of the communication of a layer or a step that nothing hides, by group, in closed form."""

from __future__ import annotations

from qwen3_npu.distributed.layout import exchange_pieces
from qwen3_npu.plan.activations import routed_rows
from qwen3_npu.plan.device import Device
from qwen3_npu.plan.hiding.costs import attention_products, collective_seconds, exchange_seconds, product_seconds
from qwen3_npu.plan.hiding.experts import seconds_left
from qwen3_npu.plan.hiding.tensor import share_left
from qwen3_npu.plan.parameters import trained_counts
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape


def tensor_seconds(shape: Shape, setup: Setup, device: Device) -> float:
    """Seconds of one layer's tensor-parallel collectives: 2 gathers and 2 scatters each way, 1 more gather back."""
    moved = setup.tokens * shape.hidden_size * setup.weight_bytes
    collectives = 6 if shape.is_moe else 10  # pairs of gather and scatter; a MoE layer's MLP has none
    exchange = collective_seconds(device, setup.tensor, 1, moved)
    if not setup.overlap_tensor or not exchange:
        return collectives * exchange
    first, *_, last = attention_products(shape, setup.tensor)
    columns, rows, ffn = [first], [last], shape.hidden_size * shape.ffn_hidden_size / setup.tensor
    if not shape.is_moe:
        columns, rows = [*columns, shape.gate_factor * ffn], [*rows, ffn]
    columns, rows = ([product_seconds(device, 2 * setup.tokens * size) for size in sizes] for sizes in (columns, rows))
    return collectives * exchange * share_left(setup, device, exchange=exchange, columns=columns, rows=rows)


def expert_exchange(
    shape: Shape, setup: Setup, device: Device, products: float, *, kernels: float, moved: float
) -> tuple[float, float, float]:
    """Seconds of one layer's expert exchange: exposed in a forward and in a backward pass; and of all tokens one way.

    Args:
        products: seconds of the experts' products, forward.
        kernels: of other operations between an arrival and the way back.
        moved: rows of the busiest rank over the mean.
    """
    size = routed_rows(shape, setup) / setup.expert_tensor * shape.hidden_size * setup.weight_bytes * moved
    pieces = pieces_of(shape, setup)
    if setup.gathered:
        group = setup.expert * setup.expert_tensor
        size = setup.sharded_tokens * group * shape.hidden_size * setup.weight_bytes
        once = collective_seconds(device, group, 1, size)
        return 2 * once, 2 * once, once
    gathered = routed_rows(shape, setup) * shape.hidden_size * setup.weight_bytes * moved
    tensor = 2 * collective_seconds(device, setup.expert_tensor, 1, gathered)
    copies = shape.moe_topk if setup.two_levels else 0
    piece = exchange_seconds(device, setup.expert, setup.expert_tensor, size / pieces, per_node=copies)
    if pieces == 1:
        return tensor + 2 * piece, tensor + 2 * piece, piece
    weights = products * (0.0 if setup.lora_rank else 1.0 - setup.frozen)
    there, back = (seconds_left(piece, products + kernels, pieces, behind=behind) for behind in (0.0, weights))
    return tensor + there, tensor + back, pieces * piece


def pieces_of(shape: Shape, setup: Setup) -> int:
    """In how many pieces tokens travel to their experts and back; 1: products hide nothing of it."""
    hides = setup.overlap_experts and setup.expert > 1 and not setup.gathered
    return exchange_pieces(shape.num_experts // setup.expert) if hides else 1


def context_seconds(shape: Shape, setup: Setup, device: Device) -> float:
    """Seconds of one layer's context-parallel communication."""
    if setup.context == 1:
        return 0.0
    heads = shape.query_width + shape.key_width + shape.value_width
    if setup.ring:  # most of it is hidden by the attention of the block before
        moved = 3 * 2 * setup.tokens * setup.context * shape.key_width / setup.tensor * setup.weight_bytes
        return 0.3 * collective_seconds(device, setup.context, setup.tensor, moved, steps=setup.context)
    moved = setup.tokens * (heads + shape.output_width) / setup.tensor * setup.weight_bytes
    return 2 * collective_seconds(device, setup.context, setup.tensor, moved, steps=4)


def pipeline_seconds(shape: Shape, setup: Setup, device: Device) -> float:
    """Seconds of a step's sends and receives between stages that are not hidden."""
    if setup.pipeline == 1:
        return 0.0
    moved = setup.sharded_tokens * shape.hidden_size * setup.residual_bytes
    inside = setup.devices <= device.domain
    bandwidth = device.bandwidth(2, inside) * device.transfer
    latency = device.latency if inside else device.network_latency
    exchanges = 2 * setup.num_microbatches * setup.virtual
    return exchanges * (latency + moved / bandwidth) * (1.0 if setup.virtual == 1 else 0.3)


def data_seconds(shape: Shape, setup: Setup, device: Device, stage: int, *, busy: float) -> float:
    """Seconds of the gradients' reduction and the weights' gathering that nothing hides."""
    trained = trained_counts(shape, setup, stage)
    stride = setup.tensor
    exposed = 0.0
    for count, size in ((trained.dense, setup.data * setup.context), (trained.expert, setup.expert_data)):
        reduce = collective_seconds(device, size, stride, 4.0 * count)
        gather = collective_seconds(device, size, stride, float(setup.weight_bytes) * count)
        if not setup.distributed_optimizer:
            gather = reduce  # an all-reduce is a scatter and a gather of float32
        exposed += max(0.1 * reduce, reduce - 0.5 * busy) if setup.overlap_grads else reduce
        exposed += max(0.1 * gather, gather - 0.3 * busy) if setup.overlap_params else gather
    return exposed
