"""Memory of one rank of each pipeline stage, in closed form. Bytes throughout.

`activations.py` has the bytes that a layer keeps for backward. The numbers of chunks in flight are those of the 1F1B
and interleaved schedules (Narayanan et al., arXiv:2104.04473); static bytes follow Rajbhandari et al.,
arXiv:1910.02054, stage 1.
"""

from __future__ import annotations

import dataclasses

from qwen3_npu.plan.activations import NPU, TORCH, layer_bytes, norm_inputs, routed_rows
from qwen3_npu.plan.parameters import Counts, largest_count, linear_counts, matrix_counts, stage_counts, trained_counts
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape

NF4 = 0.5 + 4 / 64  # bytes of a weight: 4 bits, and a float32 scale of 64
# With scales in 8 bits: two float32 for each 256 of them, whole on each tensor-parallel rank, and an int32 for a row.
DOUBLE_NF4, DOUBLE_GROUP, DOUBLE_ROW = 0.5 + 1 / 64, 2 * 4 / (64 * 256), 4
MASTER, MOMENTS = 4, 8  # bytes a weight: the float32 copy, and Adam's two moments


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage at its peak, by kind.

    Attributes:
        weights, gradients, optimizer: static; `optimizer` is master and moments.
        layers: activations that layers keep for backward, of all micro-batches in flight.
        logits: logits and loss of one micro-batch (last stage).
        working: temporary tensors of one layer beyond the memory of the logits, which do not exist at that time.
        ends: embedding output and final norm.
        communication: buffers of collectives.
        update: needs of the optimizer's update beyond the memory of activations and buffers, which are freed before.
        start: needs of the start beyond all that: megatron-core copies trained weights into its buffers.
        reserve: memory of the runtime and the allocator.
    """

    weights: float
    gradients: float
    optimizer: float
    layers: float
    logits: float
    working: float
    ends: float
    communication: float
    update: float
    start: float
    reserve: float

    @property
    def static(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def activations(self) -> float:
        return self.layers + self.working + self.logits + self.ends

    @property
    def total(self) -> float:
        return self.static + self.activations + self.communication + self.update + self.start + self.reserve

    def rows(self) -> list[tuple[str, float]]:
        """Name and bytes of each kind, in the order to show them."""
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


def stage_memory(shape: Shape, setup: Setup, stage: int, *, reserve: float = 0.0, kernels: str = NPU) -> StageMemory:
    """Memory of one rank of a pipeline stage.

    Args:
        reserve: bytes of the runtime on this device.
        kernels: see `activations.layer_bytes`.
    """
    weights, gradients, optimizer = static_bytes(shape, setup, stage)
    kept, working = layer_activations(shape, setup, stage, kernels)
    logits = logit_bytes(shape, setup) if stage == setup.pipeline - 1 else 0.0
    working, ends = max(0.0, working - logits), _end_bytes(shape, setup, stage, kernels)
    communication, update = _communication(shape, setup), 0.0
    room = kept + logits + working + ends + communication
    if kernels != TORCH or setup.swap_optimizer:
        update = max(0.0, update_bytes(shape, setup, stage) - room)
    held = weights + gradients + optimizer + room + update
    return StageMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        layers=kept,
        logits=logits,
        working=working,
        ends=ends,
        communication=communication,
        update=update,
        start=max(0.0, start_bytes(shape, setup, stage) - held),
        reserve=reserve,
    )


def start_bytes(shape: Shape, setup: Setup, stage: int) -> float:
    """Peak of bytes while megatron-core wraps the model: a sharded optimizer's trained weights are copied into buffers,
    those of experts last; each old weight is freed when its buffer is filled.

    Model chunks are wrapped one after the other, so the last one decides. Buffers of gradients exist already.
    """
    trained, width = trained_counts(shape, setup, stage), setup.weight_bytes
    frozen = stage_counts(shape, setup, stage).total - (0 if setup.lora_rank else trained.total)
    held = width * (frozen + trained.total) + 4.0 * trained.total - _quantized_away(shape, setup, stage)
    if not setup.distributed_optimizer:
        return held
    largest = max(trained.expert * width, trained.dense * width - trained.expert * 4.0)
    masters = 0.0
    # Each is made on the device from a copy of its weight, and then moved to the host.
    if setup.swap_optimizer and setup.bf16:
        masters = sharded_bytes(setup, trained, MASTER) + width * largest_count(shape, setup, stage)
    return held + max(largest / setup.virtual, masters)


def update_bytes(shape: Shape, setup: Setup, stage: int) -> float:
    """Bytes that the optimizer's update takes for a short time: a float32 copy of the largest weight; two slices of
    masters and moments that are on the host.

    Two thirds of the cases of MindSpeed-LLM's CI show it on NPUs where activations are small; the others show 16 MiB.
    Its cause is not known, so a plan for NPUs counts it. torch's kernels need nothing.
    """
    if setup.swap_optimizer:
        trained = trained_counts(shape, setup, stage)
        return 2 * sharded_bytes(setup, trained, MOMENTS + (MASTER if setup.bf16 else 0)) / setup.swap_slices
    most = 4.0 * largest_count(shape, setup, stage)
    if setup.muon:
        most = max(most, _muon_bytes(shape, setup, stage))
    return most


def _muon_bytes(shape: Shape, setup: Setup, stage: int) -> float:
    """Bytes of Muon for the largest matrix, or all experts of a rank: the matrix, its update and two steps of the
    iteration; and of sending a matrix that lies on several ranks of a distributed optimizer."""
    shards, copies = (setup.expert_tensor, setup.expert_data) if shape.is_moe else (setup.tensor, 1)
    largest = linear_counts(shape, setup, stage).largest * shards
    if setup.lora_rank:
        largest = round(largest_count(shape, dataclasses.replace(setup, distributed_optimizer=False), stage))
    if not setup.distributed_optimizer:
        return 4.0 * setup.weight_bytes * largest
    return 6.0 * setup.weight_bytes * largest / copies


def static_bytes(shape: Shape, setup: Setup, stage: int) -> tuple[float, float, float]:
    """Bytes of weights, of gradients, and of master and moments."""
    all_weights = stage_counts(shape, setup, stage)
    trained = trained_counts(shape, setup, stage)
    held: float = all_weights.total * (2 if setup.reference else 1) + (
        trained.total * (1 + setup.pissa) if setup.lora_rank else 0
    )
    weight = setup.weight_bytes
    held -= _quantized_away(shape, setup, stage) / weight  # the reference of preference training is the same base
    if setup.swap_optimizer:  # moments and masters are on the host
        return held * weight, trained.total * 4.0, 0.0
    state = MOMENTS + (MASTER if setup.bf16 else 0)
    state -= weight if setup.bf16 and setup.reuse_master else 0
    state += 4 if setup.fp16 else 0
    moments = sharded_bytes(setup, trained, state)
    if setup.muon:
        moments -= sharded_bytes(setup, matrix_counts(shape, setup, stage), MOMENTS / 2)
    return held * weight, trained.total * (2.0 if setup.fp16 else 4.0), moments


def _quantized_away(shape: Shape, setup: Setup, stage: int) -> float:
    """Bytes that 4-bit weights save."""
    if not setup.quantized:
        return 0.0
    quantized = linear_counts(shape, setup, stage)
    each, rows = NF4, 0
    if setup.double_quantized:
        each, rows = DOUBLE_NF4 + DOUBLE_GROUP * setup.tensor, DOUBLE_ROW * quantized.rows
    return quantized.weights * (setup.weight_bytes - each) - rows


def sharded_bytes(setup: Setup, trained: Counts, state: float) -> float:
    if not setup.distributed_optimizer:
        return trained.total * state
    return trained.dense * state / (setup.data * setup.context) + trained.expert * state / setup.expert_data


def in_flight(setup: Setup, stage: int) -> int:
    """Model chunks whose activations a stage holds at the same time."""
    stages, chunks, passes = setup.pipeline, setup.virtual, setup.num_microbatches
    more = 2 if setup.interleaved else 1
    if chunks == 1:
        return min(passes, stages - stage - 1 + more)
    return min(passes * chunks, (stages - stage - 1) * 2 + (chunks - 1) * stages + more)


def layer_activations(shape: Shape, setup: Setup, stage: int, kernels: str) -> tuple[float, float]:
    """Bytes that the layers of a stage keep for backward, of all chunks in flight; and one layer's working bytes."""
    kinds = setup.layer_kinds(shape, stage)
    number = sum(kinds.values())
    if not number:
        return 0.0, 0.0
    if setup.swapped:
        kept, moving, again = _swapped_activations(shape, setup, kinds, kernels)
        # The layer that was computed last has not left yet, and backward fetches the one before it.
        kept = in_flight(setup, stage) * kept + moving
        return kept, moving + again + transient_bytes(shape, setup)
    sizes = {kind: layer_bytes(shape, setup, kind, kernels) for kind in kinds}
    per_chunk = number / setup.virtual
    inputs = setup.residual_bytes * shape.hidden_size * setup.sharded_tokens
    recomputed = min(setup.recompute, number) / setup.virtual  # layers of a chunk that keep their input only
    mean, largest = sum(sizes[kind] * count for kind, count in kinds.items()) / number, max(sizes.values())
    whole = (per_chunk - recomputed) * mean  # of the layers behind those that are recomputed, which are done by then
    kept = whole + recomputed / setup.recompute_group * inputs
    working = max(0.0, setup.recompute_group * largest - whole) if recomputed else 0.0
    if setup.quantized:  # a linear is restored for its product, with float32 values and indices of 2^22 weights
        working += linear_counts(shape, setup, stage).largest * setup.weight_bytes + 6 * 2**22
    return in_flight(setup, stage) * kept, working + transient_bytes(shape, setup)


def _swapped_activations(
    shape: Shape, setup: Setup, kinds: dict[bool, int], kernels: str
) -> tuple[float, float, float]:
    """Bytes that a chunk keeps on the device, that one layer swaps, and that its recomputed MLP needs."""
    number = sum(kinds.values())
    plain = dataclasses.replace(setup, swapped=())

    def mean(of: Setup) -> float:
        return sum(layer_bytes(shape, of, kind, kernels) * count for kind, count in kinds.items()) / number

    whole, on_host = mean(plain), mean(plain) - mean(setup)
    again = whole - mean(dataclasses.replace(plain, recompute_mlp=True))
    layers, recomputed = min(setup.swapped_layers, number), min(setup.recompute, number)
    kept = (number * whole - layers * on_host - recomputed * again) / setup.virtual
    return kept, on_host, again if recomputed else 0.0


def transient_bytes(shape: Shape, setup: Setup) -> float:
    """Bytes of the largest gradients and gathered inputs that exist only for a short time."""
    width = setup.weight_bytes
    gathered = shape.hidden_size * setup.tokens if setup.sequence_parallel and setup.tensor > 1 else 0
    if shape.is_moe:
        wide = routed_rows(shape, setup) * (shape.hidden_size + shape.moe_ffn_hidden_size / setup.expert_tensor)
    else:
        wide = setup.tokens * shape.gate_factor * shape.ffn_hidden_size / setup.tensor
    return (gathered + wide) * width


def logit_bytes(shape: Shape, setup: Setup) -> float:
    """Bytes of logits and of their float32 softmax, which becomes the gradient; of rewards, their float32 input."""
    if shape.reward:
        return setup.sharded_tokens * shape.hidden_size * 4
    rows, width = shape.vocab_size / setup.tensor, setup.weight_bytes
    tokens = min(setup.tokens, setup.loss_chunk) if setup.loss_chunk else setup.tokens
    # Of chunks, the weight's gradient is held while that of the next is computed.
    gradients = 2 * shape.hidden_size * rows * width if setup.loss_chunk and not setup.lora_rank else 0.0
    return (1 + shape.mtp_layers) * tokens * rows * (width + 4) + gradients


def _end_bytes(shape: Shape, setup: Setup, stage: int, kernels: str) -> float:
    """Bytes of the inputs of a stage's chunks, and of the final norm."""
    one = setup.residual_bytes * shape.hidden_size * setup.sharded_tokens
    received = in_flight(setup, stage) if setup.pipeline > 1 else 0.0
    received -= received / setup.virtual if stage == 0 else 0
    entered = in_flight(setup, 0) / setup.virtual if stage == 0 else 0.0
    # torch_npu's norm keeps what was received; torch's a float32 copy beside it, unless it is float32 already.
    copied = kernels == TORCH and not setup.fp32_residual
    kept = (entered + (received if copied else 0.0)) * one
    if stage < setup.pipeline - 1:
        return kept
    return kept + one + norm_inputs(setup, kernels, shape.hidden_size, setup.residual_bytes) * setup.sharded_tokens


def gathered_bytes(shape: Shape, setup: Setup) -> float:
    """Bytes of megatron-core's buffer for what sequence parallelism gathers; it lives as long as the process."""
    is_used = setup.sequence_parallel and setup.tensor > 1
    return setup.weight_bytes * shape.hidden_size * setup.tokens if is_used else 0.0


def _communication(shape: Shape, setup: Setup) -> float:
    # Two activations on their way in, and two out, between pipeline stages.
    between = 4 * setup.residual_bytes * shape.hidden_size * setup.sharded_tokens if setup.pipeline > 1 else 0.0
    return between + gathered_bytes(shape, setup)
