"""One way to train: layout, batch, and what is recomputed, sharded or moved to the host."""

from __future__ import annotations

import dataclasses

from qwen3_npu.errors import UsageError
from qwen3_npu.plan.shape import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything beside the model's shape that memory and time depend on.

    Attributes:
        tensor, pipeline, context, expert, expert_tensor, data: sizes of the parallel groups; `data` without `context`.
        layers: layers of each chunk of each stage, `layers[stage][chunk]` (numbers of layers with weights).
        micro_batch, num_microbatches: samples per forward pass, and passes per step.
        ring: context parallelism passes keys and values around (else: exchanges sequence for heads).
        distributed_optimizer: optimizer state is sharded over data-parallel ranks.
        recompute: layers of each stage whose inside is computed again in backward; beside `swapped`, whose MLP is.
        recompute_group: layers of one recomputed group (method uniform).
        recompute_activation, recompute_norm, recompute_attention: these alone are computed again.
        fp32_residual: the sum that layers add to is float32, whatever their dtype.
        muon: the layers' matrices have one moment, and are gathered for their update.
        packed: several documents share a sequence.
        frozen: share of the weights that is not trained, alike on all stages.
        lora_rank, lora_targets: 0: no adapters.
        dora, pissa: adapters have magnitudes; they keep what they began with.
        quantized, quantized_ends: the layers' linears, and embedding and output layer, are in 4 bits.
        double_quantized: their scales are in 8 bits.
        reuse_master: the 16-bit weight is the upper half of its float32 master.
        swap_optimizer: optimizer state is on the host, and comes in `swap_slices` to be updated.
        swapped: modules of the first `swapped_layers` of each stage; what they keep for backward is on the host until
            then.
        recompute_mlp: the MLP of a layer keeps its input only.
        recompute_experts: MoE layers compute their first product and activation (1), or all of their MLP (2), again.
        expert_capacity: rows of an expert over its even share, where more are dropped and, if padded, fewer filled up.
        loss_chunk: tokens whose logits exist at the same time; 0: all.
        overlap_grads, overlap_params: data-parallel communication runs beside backward, or forward.
        gathered: every rank of an expert group gets all tokens of the group (dispatcher allgather).
        two_levels: a token goes to another node once, however many of its experts are there (DeepEP, HybridEP; not in
            this project).
        sizes_on_device: the host does not wait for the sizes of that exchange (HybridEP; not in this project).
        overlap_tensor, overlap_experts: products hide tensor-parallel, or expert, communication.
        fused_tensor: by the device's own operations; else in so many `tensor_pieces`.
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
        """The same where sequence parallelism shards them."""
        return self.tokens / (self.tensor if self.sequence_parallel else 1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def residual_bytes(self) -> int:
        """Bytes of a number in the sum that layers add to, which travels between pipeline stages."""
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
