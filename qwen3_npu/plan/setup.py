"""One way to train: layout, batch, and what is recomputed, sharded or moved to the host."""

from __future__ import annotations

import dataclasses

from qwen3_npu.errors import UsageError
from qwen3_npu.plan.shape import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All settings on which memory and time depend, besides the model's shape.

    Attributes:
        tensor, pipeline, context, expert, expert_tensor, data: sizes of the parallel groups; `data` without `context`.
        layers: layers of each chunk of each stage, `layers[stage][chunk]` (numbers of layers with weights).
        micro_batch, num_microbatches: samples per forward pass, and passes per step.
        ring: context parallelism sends keys and values around a ring (else it exchanges sequence for heads).
        distributed_optimizer: optimizer state is sharded over data-parallel ranks.
        recompute: number of recomputed layers of each stage; with `swapped`, of layers whose MLP is recomputed.
        recompute_group: layers of one recomputed group (method uniform).
        recompute_activation, recompute_norm, recompute_attention: only these are recomputed.
        fp32_residual: the residual stream is float32, whatever the layers' dtype.
        muon: the layers' matrices have one moment, and are gathered for their update.
        packed: several documents share a sequence.
        frozen: share of frozen weights, equal on all stages.
        lora_rank, lora_targets: of adapters; rank 0: none.
        dora, pissa: adapters have magnitudes; adapters keep their initial A and B.
        quantized, quantized_ends: the layers' linears, and embedding and output layer, are in 4 bits.
        double_quantized: their scales are in 8 bits.
        reuse_master: the 16-bit weight is the upper half of its float32 master.
        swap_optimizer: optimizer state is on the host; a step copies it in `swap_slices` slices.
        swapped: modules of the first `swapped_layers` of each stage whose activations wait on the host for backward.
        recompute_mlp: the MLP of a layer keeps its input only.
        recompute_experts: MoE layers recompute their first product and activation (1), or their whole MLP (2).
        expert_capacity: capacity of an expert relative to its even share.
        loss_chunk: tokens whose logits exist at the same time; 0: all.
        overlap_grads, overlap_params: data-parallel communication overlaps backward, or forward.
        gathered: every rank of an expert group gets all tokens of the group (dispatcher allgather).
        two_levels: a token is sent to another node once, for all its experts there (DeepEP, HybridEP; not in this
            project).
        sizes_on_device: the host does not wait for the sizes of that exchange (HybridEP; not in this project).
        overlap_tensor, overlap_experts: tensor-parallel, or expert, communication is hidden behind products.
        interleaved: passes of two micro-batches hide each other's expert communication.
        fused_tensor: by the device's own operations; else in `tensor_pieces` pieces.
        pad: share of a batch's tokens that are padding.
        reference: a frozen copy of the model is in memory (preference training).
        scored: the reference, that copy or the model without its adapter, computes each micro-batch first.
        fp16: gradients have 16 bits, and the optimizer keeps a float32 copy of its share (not in this project).
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    layers: tuple[tuple[int, ...], ...]
    seq_length: int
    micro_batch: int = 1
    num_microbatches: int = 1
    sequence_parallel: bool = False
    ring: bool = False
    distributed_optimizer: bool = False
    bf16: bool = True
    fp32_residual: bool = False
    muon: bool = False
    recompute: int = 0
    recompute_group: int = 1
    recompute_activation: bool = False
    recompute_norm: bool = False
    recompute_attention: bool = False
    packed: bool = False
    frozen: float = 0.0
    quantized: bool = False
    quantized_ends: bool = False
    double_quantized: bool = False
    dora: bool = False
    pissa: bool = False
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    reuse_master: bool = False
    swap_optimizer: bool = False
    swapped: tuple[str, ...] = ()
    swapped_layers: int = 0
    recompute_mlp: bool = False
    swap_slices: int = 16
    recompute_experts: int = 0
    expert_capacity: float = 1.0
    loss_chunk: int = 0
    overlap_grads: bool = False
    overlap_params: bool = False
    overlap_tensor: bool = False
    overlap_experts: bool = False
    interleaved: bool = False
    gathered: bool = False
    two_levels: bool = False
    sizes_on_device: bool = False
    fused_tensor: bool = False
    tensor_pieces: int = 4
    pad: float = 0.0
    reference: bool = False
    scored: bool = False
    fp16: bool = False

    def __post_init__(self) -> None:
        if len(self.layers) != self.pipeline:
            raise UsageError(f"layers of {len(self.layers)} stages are given; the pipeline has {self.pipeline}")

    @property
    def virtual(self) -> int:
        return len(self.layers[0])

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def expert_data(self) -> int:
        """Copies of one expert's shard."""
        return max(1, self.devices // (self.expert * self.expert_tensor * self.pipeline))

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.num_microbatches * self.data

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch * self.seq_length // self.context

    @property
    def sharded_tokens(self) -> float:
        """The same, sharded by sequence parallelism."""
        return self.tokens / (self.tensor if self.sequence_parallel else 1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def residual_bytes(self) -> int:
        """Bytes of a number of the residual stream, which is sent between pipeline stages."""
        return 4 if self.fp32_residual else self.weight_bytes

    def first_layer(self, stage: int, chunk: int) -> int:
        """The number of a chunk's first layer; chunks of all stages come before the next chunk of any."""
        before = sum(self.layers[s][c] for c in range(chunk) for s in range(self.pipeline))
        return before + sum(self.layers[s][chunk] for s in range(stage))

    def layer_kinds(self, shape: Shape, stage: int) -> dict[bool, int]:
        """How many layers of a stage have experts (True), and have none (False); the last has those of `mtp_layers`."""
        number, experts = sum(self.layers[stage]), 0
        if shape.is_moe and not shape.moe_dense_layers:
            experts = number
        elif shape.is_moe:
            held = [
                self.first_layer(stage, chunk) + i
                for chunk in range(self.virtual)
                for i in range(self.layers[stage][chunk])
            ]
            experts = sum(map(shape.has_experts, held))
        kinds = {True: experts, False: number - experts}
        if stage == self.pipeline - 1:
            kinds[shape.is_moe] += shape.mtp_layers
        return {kind: count for kind, count in kinds.items() if count}
