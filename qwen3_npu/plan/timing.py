"""Time of one optimizer step, in closed form: products, attention, other kernels, exposed communication, bubble.

Products and attention are counted by FLOP and a share of the device's peak, which grows with the size of the product;
everything else by bytes; collectives by the ring formulas (latency x steps + bytes x (n - 1) / n / bandwidth). The
bubble of a pipeline is (PP - 1) / VPP micro-batches (arXiv:2104.04473).
"""

from __future__ import annotations

import dataclasses

from qwen3_npu.plan.activations import MINDSPEED, layer_bytes, routed_rows
from qwen3_npu.plan.device import Device
from qwen3_npu.plan.hiding.costs import attention_products, product_seconds
from qwen3_npu.plan.hiding.experts import ExpertLayer
from qwen3_npu.plan.hiding.exposed import (
    context_seconds,
    data_seconds,
    expert_exchange,
    pieces_of,
    pipeline_seconds,
    tensor_seconds,
)
from qwen3_npu.plan.memory import in_flight
from qwen3_npu.plan.parameters import trained_counts
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape

# Operations that the host launches, forward and backward: of one layer without and with experts, more for each way to
# train it, and of a micro-batch outside of the layers. tests/golden/launches_npu.txt has the counts.
LAYER_LAUNCHES = {False: (13, 23), True: (25, 36)}
MORE_LAUNCHES = {"lora": (7, 8), "expert": (6, 4), "ring": (19, 17), "sequence_parallel": (8, 0)}
END_LAUNCHES = 43, 15
# The same for an exchange in pieces that products hide: once, and for each piece after the first.
PIECE_LAUNCHES = (2, 1), (8, 11)
# Bytes per weight if its gradient is added to the sum by itself: 16 bits written and read, the sum read and written.
_SUM_BYTES = 12
# Bytes that pass through memory for each logit of the loss and its gradient; megatron-core's loss, operation by
# operation: float32 copy 6, largest 4, difference 8, exponential 8, sum 4, division 8; gradient 8, its copy 6.
_LOGIT_BYTES, _LOGIT_BYTES_MEGATRON = 20, 52
# Share of a layer's kernels between the arrival of tokens at their experts and their way back. Most bytes are those of
# copies of tokens: sorted, arrived, sent back, summed.
_BETWEEN = 0.4


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
        reference: forward passes of the reference of preference training, communication included.
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
    reference: float = 0.0

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


def _layer(shape: Shape, setup: Setup, device: Device, has_experts: bool) -> _Layer:
    tokens, tp, width = setup.tokens, setup.tensor, setup.weight_bytes
    h, query, again, experts = shape.hidden_size, shape.query_width, 0.0, 0.0
    products = attended = sum(product_seconds(device, 2 * tokens * size) for size in attention_products(shape, tp))
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


def launches(setup: Setup, is_moe: bool, recomputed: float = 0.0, *, pieces: int = 1) -> float:
    """Operations that the host launches for one layer and micro-batch.

    Args:
        recomputed: share of the layers whose forward pass runs twice.
        pieces: see `hiding.exposed.pieces_of`.
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
        rows = (1 if is_moe else 2) * (
            1 if setup.lora_rank else 2
        )  # in the order of the pieces; gradients in two parts
        more.append((0, linears // 2) if setup.fused_tensor else (linears, linears + rows))
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


def _layers(shape: Shape, setup: Setup, device: Device, counts: dict[bool, int], *, slow: float) -> _Layer:
    """All layers of a stage; the busiest rank's experts compute `slow` times as much as the mean."""
    total = _Layer(0.0, 0.0, 0.0)
    for is_moe, number in counts.items():
        one, more = _layer(shape, setup, device, is_moe), slow if is_moe else 1.0
        total = _Layer(
            products=total.products + number * one.products * more,
            attention=total.attention + number * one.attention,
            kernels=total.kernels + number * one.kernels,
            attended=total.attended + number * one.attended,
            again=total.again + number * one.again * more,
            experts=total.experts + number * one.experts * more,
        )
    return total


def _stage_time(shape: Shape, setup: Setup, device: Device, stage: int, *, imbalance: float) -> StepTime:
    counts, passes = setup.layer_kinds(shape, stage), setup.num_microbatches
    number = sum(counts.values())
    share = min(setup.recompute, number) / max(number, 1)
    slow = imbalance if setup.expert > 1 else 1.0
    layers = _layers(shape, setup, device, counts, slow=slow)
    products, attention, kernels = layers.products, layers.attention, layers.kernels
    sparse = counts.get(True, 0)
    expert = _expert_seconds(shape, setup, device, stage, layers=layers, slow=slow) if sparse else 0.0
    if setup.swapped:  # the MLPs of these layers alone
        share, recompute = 0.0, share * (products - layers.attended) + (1 - share) * layers.again
    else:
        recompute = share * (products + attention + kernels) + (1 - share) * layers.again
    once = products + attention + kernels
    backward = 1.0 if setup.lora_rank else 2.0 - setup.frozen  # a frozen weight has no gradient of its own
    products *= 1 + backward
    attention *= 3.5  # backward recomputes the scores: 2.5 x forward
    kernels *= 3
    head = product_seconds(device, 6 * setup.tokens * shape.hidden_size * shape.vocab_size / setup.tensor)
    passed = _LOGIT_BYTES_MEGATRON if device.kernels == MINDSPEED else _LOGIT_BYTES
    logits = setup.tokens * shape.vocab_size / setup.tensor * passed / (device.memory_bandwidth * device.streaming)
    if stage == setup.pipeline - 1:
        products += head * (1 + shape.mtp_layers)
        kernels += logits * (1 + shape.mtp_layers)
        once += (head + logits) / 3
    if device.kernels == MINDSPEED:
        kernels += trained_counts(shape, setup, stage).total * _SUM_BYTES / (device.memory_bandwidth * device.streaming)
    launched = sum(
        counts[kind] * launches(setup, kind, share, pieces=pieces_of(shape, setup)) for kind in counts
    ) + sum(END_LAUNCHES)
    computing = products + attention + kernels + recompute
    asks = setup.expert * setup.expert_tensor > 1 and not setup.sizes_on_device
    waits = sparse * (2 + share) if asks else 0.0
    tensor = number * tensor_seconds(shape, setup, device) * (1 + share / 2)
    context = number * context_seconds(shape, setup, device)
    busy = computing + tensor + expert + context
    return StepTime(
        products=passes * products,
        attention=passes * attention,
        kernels=passes * kernels,
        recompute=passes * recompute,
        tensor=passes * tensor,
        expert=passes * expert,
        context=passes * context,
        pipeline=pipeline_seconds(shape, setup, device),
        # The share of the forward pass: 4 of tensor parallelism's 10 exchanges.
        reference=passes * (once + 0.4 * tensor + expert / (2 + share) + context / 2) if setup.scored else 0.0,
        data=data_seconds(shape, setup, device, stage, busy=passes * computing),
        bubble=0.0,
        optimizer=_optimizer(shape, setup, device, stage),
        host=passes * (max(0.0, launched * device.launch - busy) + waits * device.stall),
        swap=passes * _swap(shape, setup, device, counts, forward=once / max(number, 1)),
    )


def _expert_seconds(shape: Shape, setup: Setup, device: Device, stage: int, *, layers: _Layer, slow: float) -> float:
    """Seconds of a micro-batch's expert exchanges that nothing hides: forward, recomputation and backward.

    Interleaved passes at the start, and as many at the end, have no other one beside them.
    """
    counts = setup.layer_kinds(shape, stage)
    number, sparse = sum(counts.values()), counts[True]
    share = min(setup.recompute, number) / number
    experts, kernels = layers.experts / sparse, layers.kernels / sparse
    between = _BETWEEN * kernels
    there, back, moved = expert_exchange(shape, setup, device, experts, kernels=between, moved=slow)
    forwards = 2.0 if setup.recompute_experts == 2 else 1 + share
    apart = sparse * (forwards * there + back)
    if not setup.interleaved:
        return apart
    copies = (kernels - between) / 3
    one = ExpertLayer(
        attended=(layers.products + layers.attention) / sparse - experts + copies,
        routed=copies,
        experts=experts + between,
        summed=copies,
        backward=1.0 if setup.lora_rank else 2.0 - setup.frozen,
        there=there,
        back=back,
        moved=moved,
    )
    number = max(1, round(sparse / setup.virtual))
    plain, again = (one.by_turns(number, is_recomputed=is_on) for is_on in (False, True))
    beside = (plain + (forwards - 1) * (again - plain)) * sparse / number
    alone = min(1.0, (in_flight(setup, stage) - 1) / (setup.num_microbatches * setup.virtual))
    return alone * apart + (1 - alone) * beside


def _swap(shape: Shape, setup: Setup, device: Device, counts: dict[bool, int], *, forward: float) -> float:
    """Exposed seconds of a micro-batch's copies to the host and back, beyond a layer's own computing."""
    if not setup.swapped or not counts:
        return 0.0
    plain = dataclasses.replace(setup, swapped=())
    moved = max(layer_bytes(shape, plain, kind) - layer_bytes(shape, setup, kind) for kind in counts)
    copied = moved / device.host_link
    exposed = max(0.0, copied - forward) + max(0.0, copied - 2 * forward)
    return min(setup.swapped_layers, sum(counts.values())) * exposed


def _optimizer(shape: Shape, setup: Setup, device: Device, stage: int) -> float:
    """Seconds of clipping and update: about 36 bytes a weight pass through memory."""
    trained = trained_counts(shape, setup, stage)
    if setup.distributed_optimizer:
        own = trained.dense / (setup.data * setup.context) + trained.expert / setup.expert_data
    else:
        own = float(trained.total)
    time = (own * 36 + trained.total * 8) / (device.memory_bandwidth * device.streaming)
    return time + (own * 24 / device.host_link if setup.swap_optimizer else 0.0)


def model_flops(shape: Shape, setup: Setup) -> float:
    """FLOP of a step that the model needs, recomputation not counted: 6 x weights and causal attention, as
    `model.arch.flops_per_token`."""
    tokens = setup.global_batch * setup.seq_length
    active = 0.0
    for layer in range(shape.num_layers):
        active += sum(attention_products(shape, 1))
        if shape.has_experts(layer):
            ffn = shape.moe_topk * shape.moe_ffn_hidden_size + shape.moe_shared_ffn
            active += shape.hidden_size * ((shape.gate_factor + 1) * ffn + shape.num_experts)
        else:
            active += shape.hidden_size * (shape.gate_factor + 1) * shape.ffn_hidden_size
    attention = shape.num_layers * setup.seq_length * (shape.query_width + shape.output_width) / 2
    return 6.0 * tokens * (active + shape.vocab_size * shape.hidden_size + attention)
