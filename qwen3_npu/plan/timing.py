"""Time of one optimizer step, in closed form: products, attention, other kernels, exposed communication, bubble.

Products and attention are counted by FLOP and a share of the device's peak, which grows with the size of the product;
everything else by bytes; collectives by the ring formulas (latency x steps + bytes x (n - 1) / n / bandwidth). The
bubble of a pipeline is (PP - 1) / VPP micro-batches (arXiv:2104.04473).
"""

from __future__ import annotations

import dataclasses

from qwen3_npu.distributed.layout import exchange_pieces
from qwen3_npu.plan.activations import layer_bytes, routed_rows
from qwen3_npu.plan.device import Device
from qwen3_npu.plan.hiding.experts import left_by_turns, seconds_left
from qwen3_npu.plan.hiding.tensor import share_left
from qwen3_npu.plan.memory import in_flight
from qwen3_npu.plan.parameters import trained_counts
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape

# Operations that the host launches, forward and backward: of one layer without and with experts, more for each way to
# train it, and of a micro-batch outside of the layers. tests/golden/launches_npu.txt has the counts.
LAYER_LAUNCHES = {False: (13, 23), True: (25, 36)}
MORE_LAUNCHES = {"lora": (7, 8), "expert": (6, 4), "ring": (19, 17), "sequence_parallel": (8, 0)}
END_LAUNCHES = 43, 15
# Of an exchange in pieces that products hide: once, and for each piece but the first.
PIECE_LAUNCHES = (2, 1), (8, 11)
_HOST_BANDWIDTH = 25e9  # bytes a second each way, of PCIe 4.0 x16


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by kind; of the slowest pipeline stage.

    Attributes:
        products, attention, kernels: computing. `kernels`: operations that are bound by memory.
        recompute: recomputation in backward.
        tensor, expert, context, pipeline, data: exposed communication by group.
        bubble: waiting for other pipeline stages.
        optimizer: clipping and update.
        host: waiting for the host to launch operations.
        swap: waiting for copies of activations to the host and back.
    """

    products: float
    attention: float
    kernels: float
    recompute: float
    tensor: float
    expert: float
    context: float
    pipeline: float
    data: float
    bubble: float
    optimizer: float
    host: float
    swap: float = 0.0

    @property
    def total(self) -> float:
        return sum(value for _, value in self.rows())

    def rows(self) -> list[tuple[str, float]]:
        """Name and seconds of each kind, in the order to show them."""
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Seconds of one layer and micro-batch, forward (backward is twice the computing).

    Attributes:
        attended: the part of `products` in attention.
        again: products of experts that backward recomputes without recomputing the layer.
        experts: products of experts.
    """

    products: float
    attention: float
    kernels: float
    attended: float = 0.0
    again: float = 0.0
    experts: float = 0.0


def product_seconds(device: Device, flops: float, count: int = 1) -> float:
    """Seconds of `count` equal products that have `flops` FLOP together."""
    each = flops / max(count, 1)
    return flops / (device.flops * device.product) * (1 + device.product_half / max(each, 1.0))


def collective_seconds(device: Device, size: int, stride: int, moved: float, *, steps: float = 1.0) -> float:
    """Seconds of an all-gather, reduce-scatter or all-to-all that leaves `moved` bytes on each of `size` ranks.

    Args:
        stride: distance of neighbouring ranks; a group across nodes is as fast as the network.
        steps: steps of latency, in collectives.
    """
    if size == 1:
        return 0.0
    inside = size * stride <= device.node
    bandwidth = (device.link if inside else device.network) * device.transfer
    latency = device.latency if inside else device.network_latency
    return steps * latency * (size - 1) ** 0.5 + moved * (size - 1) / size / bandwidth


def exchange_seconds(device: Device, size: int, stride: int, moved: float, *, per_node: int = 0) -> float:
    """Seconds of an all-to-all in which each of `size` ranks sends `moved` bytes, the same to all.

    Traffic inside a node and traffic between nodes run at the same time.

    Args:
        per_node: copies of each token if a node receives each token once; 0: all copies are sent.
    """
    nodes = max(1.0, size * stride / device.node)
    if nodes == 1:
        return collective_seconds(device, size, stride, moved, steps=2)
    share = nodes * (1 - (1 - 1 / nodes) ** per_node) / per_node if per_node else 1.0
    between = moved * share * (1 - 1 / nodes) / device.network
    inside = moved / nodes / device.link
    return 2 * device.network_latency * (size - 1) ** 0.5 + max(between, inside) / device.transfer


def _layer(shape: Shape, setup: Setup, device: Device, has_experts: bool) -> _Layer:
    tokens, tp, width = setup.tokens, setup.tensor, setup.weight_bytes
    h, query, again, experts = shape.hidden_size, shape.query_width, 0.0, 0.0
    products = attended = sum(product_seconds(device, 2 * tokens * size) for size in _attention_products(shape, tp))
    squares = setup.micro_batch * setup.seq_length**2 / setup.context / 2  # causal
    attention = 2 * squares * (query + shape.output_width) / tp / (device.flops * device.attention)
    moved = setup.sharded_tokens * h * 10 + tokens * (4 * query + 2 * shape.key_width + 2 * shape.value_width) / tp
    if has_experts:
        rows, ffn = routed_rows(shape, setup), shape.moe_ffn_hidden_size / setup.expert_tensor
        local = shape.num_experts // setup.expert
        first = product_seconds(device, 2 * rows * h * shape.gate_factor * ffn, local)
        second = product_seconds(device, 2 * rows * ffn * h, local)
        experts = first + second
        products += experts
        again = (0.0, first, experts)[setup.recompute_experts]
        products += product_seconds(device, 2 * setup.sharded_tokens * h * shape.num_experts)
        shared = 2 * tokens * h * shape.moe_shared_ffn * (shape.gate_factor + 1) / tp
        products += product_seconds(device, shared, 2) if shared else 0.0
        moved += rows * (8 * h + (2 * shape.gate_factor + 4) * ffn) + setup.sharded_tokens * shape.num_experts * 8
    else:
        ffn = shape.ffn_hidden_size / tp
        products += product_seconds(device, 2 * tokens * h * shape.gate_factor * ffn) + product_seconds(
            device, 2 * tokens * ffn * h
        )
        moved += tokens * (shape.gate_factor + 1) * ffn
    kernels = moved * width / (device.memory_bandwidth * device.streaming)
    return _Layer(products, attention, kernels, attended=attended, again=again, experts=experts)


def _attention_products(shape: Shape, tp: int) -> list[float]:
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


def launches(setup: Setup, is_moe: bool, recomputed: float = 0.0, *, pieces: int = 1) -> float:
    """Operations that the host launches for one layer and micro-batch.

    Args:
        recomputed: share of the layers whose forward pass runs twice.
        pieces: see `_pieces`.
    """
    used = {
        "lora": setup.lora_rank > 0,
        "expert": is_moe and setup.expert > 1,
        "ring": setup.ring and setup.context > 1,
        "sequence_parallel": setup.sequence_parallel and setup.tensor > 1,
    }
    more = [MORE_LAUNCHES[name] for name, is_used in used.items() if is_used]
    if is_moe and pieces > 1:
        more += [PIECE_LAUNCHES[0], *[PIECE_LAUNCHES[1]] * (pieces - 1)]
    if setup.overlap_tensor and setup.tensor > 1:
        linears = (2 if is_moe else 4) * (setup.tensor_pieces - 1)  # products more than without
        more.append((0, linears // 2) if setup.fused_tensor else (linears, linears + (1 if is_moe else 2)))
    forward, backward = (sum(counts) for counts in zip(LAYER_LAUNCHES[is_moe], *more, strict=True))
    return forward * (1 + recomputed) + backward


def step_time(shape: Shape, setup: Setup, device: Device, *, imbalance: float = 1.1) -> StepTime:
    """Seconds of one optimizer step, by kind.

    Args:
        imbalance: tokens of the busiest expert rank over the mean (1 with forced balance).
    """
    # Stages between the first and the last are equal, but for an uneven pipeline.
    different = {
        (setup.layers[stage], stage == 0, stage == setup.pipeline - 1): stage for stage in range(setup.pipeline)
    }
    stages = [_stage_time(shape, setup, device, stage, imbalance=imbalance) for stage in different.values()]
    slowest = max(stages, key=lambda time: time.total)
    per_pass = (slowest.total - slowest.data - slowest.optimizer) / setup.num_microbatches
    bubble = per_pass * (setup.pipeline - 1) / setup.virtual
    return dataclasses.replace(slowest, bubble=bubble)


def _stage_time(shape: Shape, setup: Setup, device: Device, stage: int, *, imbalance: float) -> StepTime:
    counts, passes = setup.layer_kinds(shape, stage), setup.num_microbatches
    number = sum(counts.values())
    share = min(setup.recompute, number) / max(number, 1)
    products = attention = kernels = again = attended = expert = 0.0
    for is_moe in counts:
        layer = _layer(shape, setup, device, is_moe)
        slow = imbalance if is_moe and setup.expert > 1 else 1.0
        products += counts[is_moe] * layer.products * slow
        attended += counts[is_moe] * layer.attended
        attention += counts[is_moe] * layer.attention
        kernels += counts[is_moe] * layer.kernels
        again += counts[is_moe] * layer.again * slow
        if is_moe:
            expert = counts[is_moe] * _expert(shape, setup, device, layer.experts * slow, share=share, moved=slow)
    if setup.swapped:  # the MLPs of these layers alone
        share, recompute = 0.0, share * (products - attended) + (1 - share) * again
    else:
        recompute = share * (products + attention + kernels) + (1 - share) * again
    forward = (products + attention + kernels) / max(number, 1)
    backward = 1.0 if setup.lora_rank else 2.0 - setup.frozen  # a frozen weight has no gradient of its own
    products *= 1 + backward
    attention *= 3.5  # backward recomputes the scores: 2.5 x forward
    kernels *= 3
    head = product_seconds(device, 6 * setup.tokens * shape.hidden_size * shape.vocab_size / setup.tensor)
    logits = setup.tokens * shape.vocab_size / setup.tensor * 20 / (device.memory_bandwidth * device.streaming)
    if stage == setup.pipeline - 1:
        products += head * (1 + shape.mtp_layers)
        kernels += logits * (1 + shape.mtp_layers)
    launched = sum(counts[kind] * launches(setup, kind, share, pieces=_pieces(shape, setup)) for kind in counts) + sum(
        END_LAUNCHES
    )
    busy = products + attention + kernels + recompute
    if setup.interleaved:
        expert = left_by_turns(expert, busy, in_flight(setup, stage) - 1, passes * setup.virtual)
    waits = counts.get(True, 0) * (2 + share) if setup.expert > 1 and not setup.sizes_on_device else 0.0
    return StepTime(
        products=passes * products,
        attention=passes * attention,
        kernels=passes * kernels,
        recompute=passes * recompute,
        tensor=passes * number * _tensor(shape, setup, device) * (1 + share / 2),
        expert=passes * expert,
        context=passes * number * _context(shape, setup, device),
        pipeline=_pipeline(shape, setup, device),
        data=_data(shape, setup, device, stage, busy=passes * busy),
        bubble=0.0,
        optimizer=_optimizer(shape, setup, device, stage),
        host=passes * (max(0.0, launched * device.launch - busy) + waits * device.stall),
        swap=passes * _swap(shape, setup, counts, forward),
    )


def _swap(shape: Shape, setup: Setup, counts: dict[bool, int], forward: float) -> float:
    """Exposed seconds of a micro-batch's copies to the host and back, beyond a layer's own computing."""
    if not setup.swapped or not counts:
        return 0.0
    plain = dataclasses.replace(setup, swapped=())
    moved = max(layer_bytes(shape, plain, kind) - layer_bytes(shape, setup, kind) for kind in counts)
    copied = moved / _HOST_BANDWIDTH
    exposed = max(0.0, copied - forward) + max(0.0, copied - 2 * forward)
    return min(setup.swapped_layers, sum(counts.values())) * exposed


def _tensor(shape: Shape, setup: Setup, device: Device) -> float:
    """Seconds of one layer's tensor-parallel collectives: 2 gathers and 2 scatters each way, 1 more gather back."""
    moved = setup.tokens * shape.hidden_size * setup.weight_bytes
    collectives = 6 if shape.is_moe else 10  # pairs of gather and scatter; a MoE layer's MLP has none
    exchange = collective_seconds(device, setup.tensor, 1, moved)
    if not setup.overlap_tensor or not exchange:
        return collectives * exchange
    first, *_, last = _attention_products(shape, setup.tensor)
    columns, rows, ffn = [first], [last], shape.hidden_size * shape.ffn_hidden_size / setup.tensor
    if not shape.is_moe:
        columns, rows = [*columns, shape.gate_factor * ffn], [*rows, ffn]
    columns, rows = ([product_seconds(device, 2 * setup.tokens * size) for size in sizes] for sizes in (columns, rows))
    return collectives * exchange * share_left(setup, device, exchange=exchange, columns=columns, rows=rows)


def _expert(shape: Shape, setup: Setup, device: Device, products: float, *, share: float, moved: float) -> float:
    """Exposed seconds of one layer's expert exchange: both ways, in forward, recomputation and backward.

    Args:
        products: seconds of the experts' products, forward.
        share: of the layers whose forward pass runs twice.
        moved: rows of the busiest rank over the mean.
    """
    size = routed_rows(shape, setup) / setup.expert_tensor * shape.hidden_size * setup.weight_bytes * moved
    forwards, pieces = 2.0 if setup.recompute_experts == 2 else 1 + share, _pieces(shape, setup)
    if setup.gathered:
        group = setup.expert * setup.expert_tensor
        size = setup.sharded_tokens * group * shape.hidden_size * setup.weight_bytes
        return 2 * (forwards + 1) * collective_seconds(device, group, 1, size)
    copies = shape.moe_topk if setup.two_levels else 0
    piece = exchange_seconds(device, setup.expert, setup.expert_tensor, size / pieces, per_node=copies)
    if pieces == 1:
        return piece * 2 * (forwards + 1)
    weights = products * (0.0 if setup.lora_rank else 1.0 - setup.frozen)
    there, back = (seconds_left(piece, products, pieces, behind=behind) for behind in (0.0, weights))
    return forwards * there + back


def _pieces(shape: Shape, setup: Setup) -> int:
    """Number of pieces of the exchange of tokens; 1: it is not hidden."""
    hides = setup.overlap_experts and setup.expert > 1 and not setup.gathered
    return exchange_pieces(shape.num_experts // setup.expert) if hides else 1


def _context(shape: Shape, setup: Setup, device: Device) -> float:
    """Seconds of one layer's context-parallel communication."""
    if setup.context == 1:
        return 0.0
    heads = shape.query_width + shape.key_width + shape.value_width
    if setup.ring:  # most of it is hidden by the attention of the block before
        moved = 3 * 2 * setup.tokens * setup.context * shape.key_width / setup.tensor * setup.weight_bytes
        return 0.3 * collective_seconds(device, setup.context, setup.tensor, moved, steps=setup.context)
    moved = setup.tokens * (heads + shape.output_width) / setup.tensor * setup.weight_bytes
    return 2 * collective_seconds(device, setup.context, setup.tensor, moved, steps=4)


def _pipeline(shape: Shape, setup: Setup, device: Device) -> float:
    """Exposed seconds of a step's sends and receives between stages."""
    if setup.pipeline == 1:
        return 0.0
    moved = setup.sharded_tokens * shape.hidden_size * setup.residual_bytes
    inside = setup.devices <= device.node
    bandwidth = (device.link if inside else device.network) * device.transfer
    latency = device.latency if inside else device.network_latency
    exchanges = 2 * setup.num_microbatches * setup.virtual
    return exchanges * (latency + moved / bandwidth) * (1.0 if setup.virtual == 1 else 0.3)


def _data(shape: Shape, setup: Setup, device: Device, stage: int, *, busy: float) -> float:
    """Exposed seconds of reducing gradients and gathering weights."""
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


def _optimizer(shape: Shape, setup: Setup, device: Device, stage: int) -> float:
    """Seconds of clipping and update: about 36 bytes a weight pass through memory."""
    trained = trained_counts(shape, setup, stage)
    if setup.distributed_optimizer:
        own = trained.dense / (setup.data * setup.context) + trained.expert / setup.expert_data
    else:
        own = float(trained.total)
    time = (own * 36 + trained.total * 8) / (device.memory_bandwidth * device.streaming)
    return time + (own * 24 / _HOST_BANDWIDTH if setup.swap_optimizer else 0.0)


def model_flops(shape: Shape, setup: Setup) -> float:
    """FLOP of a step that the model needs, recomputation not counted: 6 x weights and causal attention, as
    `model.arch.flops_per_token`."""
    tokens = setup.global_batch * setup.seq_length
    active = 0.0
    for layer in range(shape.num_layers):
        active += sum(_attention_products(shape, 1))
        if shape.has_experts(layer):
            ffn = shape.moe_topk * shape.moe_ffn_hidden_size + shape.moe_shared_ffn
            active += shape.hidden_size * ((shape.gate_factor + 1) * ffn + shape.num_experts)
        else:
            active += shape.hidden_size * (shape.gate_factor + 1) * shape.ffn_hidden_size
    attention = shape.num_layers * setup.seq_length * (shape.query_width + shape.output_width) / 2
    return 6.0 * tokens * (active + shape.vocab_size * shape.hidden_size + attention)
