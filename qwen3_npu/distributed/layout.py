"""Which layers, experts and vocabulary rows live on which rank. Pure arithmetic, no torch.

The converter, the live model and the checkpoint files all use this module, so they agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch

NOOP = -1  # in a stage's list of layers: a no-op layer


@dataclasses.dataclass(frozen=True)
class Rank:
    """One model shard: coordinates of a rank, without its data-parallel and context-parallel copies."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How one model is sharded.

    Attributes:
        tensor, pipeline, expert, expert_tensor: sizes of the parallel groups.
        chunks: `chunks[pipeline rank][virtual chunk]` lists the model's layer numbers held there, `NOOP` for a
            no-op layer. The position in the list is the layer's local number in checkpoint names.
        padded_vocab_size: rows of the embedding after padding; a multiple of `tensor`.
        stacked_experts: experts are stored as two stacked tensors (grouped GEMM), not one pair per expert.
    """

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int
    chunks: tuple[tuple[tuple[int, ...], ...], ...]
    padded_vocab_size: int
    stacked_experts: bool = True

    @property
    def virtual(self) -> int:
        """Model chunks on each pipeline rank; 1 without virtual pipeline stages."""
        return len(self.chunks[0])

    @property
    def num_layers(self) -> int:
        """Layers counted as Megatron counts them, no-op layers included."""
        return sum(len(chunk) for stage in self.chunks for chunk in stage)

    @property
    def noop_layers(self) -> list[int]:
        """No-op layers, numbered as Megatron numbers layers."""
        places = [layer for virtual in range(self.virtual) for stage in self.chunks for layer in stage[virtual]]
        return [place for place, layer in enumerate(places) if layer == NOOP]

    def ranks(self) -> Iterator[Rank]:
        """The distinct model shards, pipeline rank slowest.

        With `expert_tensor` < `tensor` not every pair (tensor, expert) exists: rank r has tensor = r % TP and
        expert = r // ETP % EP (Megatron's order), and only the pairs that occur are returned.
        """
        period = math.lcm(self.tensor, self.expert_tensor * self.expert)
        pairs = sorted({(r % self.tensor, r // self.expert_tensor % self.expert) for r in range(period)})
        for pipeline in range(self.pipeline):
            for tensor, expert in pairs:
                yield Rank(tensor, pipeline, expert, tensor % self.expert_tensor)

    def folder(self, rank: Rank) -> str:
        """`mp_rank_TT[_PPP][_EEE]`: Megatron's folder name; a part is there only if its size is above 1."""
        name = f"mp_rank_{rank.tensor:02d}"
        if self.pipeline > 1:
            name += f"_{rank.pipeline:03d}"
        if self.expert > 1:
            name += f"_{rank.expert:03d}"
        return name

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        if self.virtual > 1:
            parts.append(f"VPP{self.virtual}")
        if self.expert > 1:
            parts.append(f"EP{self.expert}")
        if self.expert_tensor != self.tensor:
            parts.append(f"ETP{self.expert_tensor}")
        return " ".join(parts)


def plan(
    arch: Qwen3Arch,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    expert_tensor: int | None = None,
    layers_per_virtual_stage: int | None = None,
    num_layer_list: Sequence[int] | None = None,
    noop_layers: Sequence[int] = (),
    vocab_divisible_by: int = 1,
    padded_vocab_size: int | None = None,
    stacked_experts: bool = True,
) -> Layout:
    """The layout that the user's sizes describe.

    Args:
        expert_tensor: ranks that share one expert; `None`: as many as `tensor`.
        layers_per_virtual_stage: layers in one chunk of an interleaved pipeline; `None`: one chunk a stage.
        num_layer_list: layers of each pipeline stage, for an uneven pipeline.
        noop_layers: no-op layers, numbered from 0 among all layers.
        vocab_divisible_by: the padded vocabulary is a multiple of this times `tensor`.
        padded_vocab_size: rows of the padded vocabulary; overrides `vocab_divisible_by`.

    Raises:
        UsageError: the sizes do not fit this architecture. All problems are named at once.
    """
    etp = tensor if expert_tensor is None else expert_tensor
    problems = _problems(arch, tensor, expert, etp)
    chunks: tuple[tuple[tuple[int, ...], ...], ...] = ()
    try:
        chunks = _chunks(arch, pipeline, layers_per_virtual_stage, num_layer_list, noop_layers=noop_layers)
    except UsageError as error:
        problems.append(str(error))
    multiple = vocab_divisible_by * tensor
    padded = padded_vocab_size or math.ceil(arch.vocab_size / multiple) * multiple
    if padded < arch.vocab_size:
        problems.append(f"--padded-vocab-size {padded} is smaller than the model's vocabulary of {arch.vocab_size}")
    if padded % tensor:
        problems.append(f"--padded-vocab-size {padded} is not a multiple of the tensor parallel size {tensor}")
    if problems:
        raise UsageError("; ".join(problems))
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        expert=expert if arch.is_moe else 1,
        expert_tensor=etp if arch.is_moe else tensor,
        chunks=chunks,
        padded_vocab_size=padded,
        stacked_experts=stacked_experts,
    )


def single_layout(arch: Qwen3Arch) -> Layout:
    """The layout of one process."""
    return plan(arch)


def check_world_size(layout: Layout, world_size: int, context: int = 1) -> None:
    """Raises: UsageError: the processes cannot be divided into copies of the model (`context`: ranks per sequence)."""
    model = layout.tensor * layout.pipeline * context
    if world_size % model:
        name = f"TP {layout.tensor} x PP {layout.pipeline}" + (f" x CP {context}" if context > 1 else "")
        raise UsageError(
            f"{world_size} processes cannot hold copies of {name}: start a multiple of {model}, "
            f"or change the parallel sizes"
        )
    experts = layout.expert * layout.expert_tensor * layout.pipeline
    if world_size % experts:
        raise UsageError(
            f"{world_size} processes cannot hold copies of EP {layout.expert} x ETP {layout.expert_tensor} x PP "
            f"{layout.pipeline}: start a multiple of {experts}, or change the parallel sizes"
        )


def divisors(number: int) -> str:
    """The divisors of a number, for error messages."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _problems(arch: Qwen3Arch, tensor: int, expert: int, etp: int) -> list[str]:
    problems = []
    if not _shards_heads(arch, tensor):
        possible = [size for size in range(1, arch.num_attention_heads + 1) if _shards_heads(arch, size)]
        problems.append(
            f"tensor parallel size {tensor} does not divide the {arch.num_key_value_heads} KV heads; "
            f"use one of {', '.join(map(str, possible))}"
        )
    if not arch.is_moe:
        if arch.intermediate_size % tensor:
            problems.append(f"tensor parallel size {tensor} does not divide the FFN size {arch.intermediate_size}")
        if expert > 1:
            problems.append(f"expert parallel size {expert} needs a MoE model; this one is dense")
        return problems
    if arch.num_experts % expert:
        problems.append(
            f"expert parallel size {expert} does not divide the {arch.num_experts} experts; "
            f"use one of {divisors(arch.num_experts)}"
        )
    if arch.moe_intermediate_size % etp:
        problems.append(
            f"expert tensor parallel size {etp} does not divide the experts' FFN size {arch.moe_intermediate_size}"
        )
    if tensor % etp:
        problems.append(f"expert tensor parallel size {etp} does not divide the tensor parallel size {tensor}")
    return problems


def _shards_heads(arch: Qwen3Arch, tensor: int) -> bool:
    """Whether each rank has complete query heads, and complete key/value heads or, with more ranks, a shared one."""
    heads, groups = arch.num_attention_heads, arch.num_key_value_heads
    rows = (heads + 2 * groups) * arch.head_dim
    return heads % tensor == 0 and rows % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0)


def _chunks(
    arch: Qwen3Arch,
    pipeline: int,
    layers_per_virtual_stage: int | None,
    num_layer_list: Sequence[int] | None,
    *,
    noop_layers: Sequence[int],
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    layers = arch.num_hidden_layers
    if num_layer_list is not None:
        if layers_per_virtual_stage or noop_layers:
            raise UsageError("--num-layer-list cannot be combined with virtual stages or --noop-layers")
        if len(num_layer_list) != pipeline or sum(num_layer_list) != layers or min(num_layer_list) < 1:
            raise UsageError(
                f"--num-layer-list {','.join(map(str, num_layer_list))} must have {pipeline} entries (the pipeline "
                f"size), each 1 or more, that add up to the model's {layers} layers"
            )
        starts = [sum(num_layer_list[:p]) for p in range(pipeline)]
        return tuple((tuple(range(s, s + n)),) for s, n in zip(starts, num_layer_list, strict=True))
    total = layers + len(noop_layers)
    wrong = [n for n in noop_layers if not 0 <= n < total]
    if wrong or len(set(noop_layers)) != len(noop_layers):
        raise UsageError(f"--noop-layers {wrong or list(noop_layers)}: distinct numbers from 0 to {total - 1} expected")
    numbers = iter(range(layers))
    places = [NOOP if place in noop_layers else next(numbers) for place in range(total)]
    if total % pipeline:
        raise UsageError(
            f"pipeline parallel size {pipeline} does not divide the {total} layers; use one of {divisors(total)}, "
            f"--num-layer-list, or --noop-layers to add no-op layers"
        )
    per_chunk = layers_per_virtual_stage or total // pipeline
    if (total // pipeline) % per_chunk:
        raise UsageError(
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the {total // pipeline} layers of "
            f"a pipeline stage; use one of {divisors(total // pipeline)}"
        )
    virtual = total // pipeline // per_chunk
    return tuple(
        tuple(
            tuple(places[(v * pipeline + p) * per_chunk : (v * pipeline + p + 1) * per_chunk]) for v in range(virtual)
        )
        for p in range(pipeline)
    )


def exchange_pieces(experts: int) -> int:
    """Number of pieces of an exchange that is hidden behind products; 1 for a single expert, where nothing is hidden.

    The first piece is not hidden on its way there, nor the last one on its way back: four pieces leave half as much
    communication as two.
    """
    return min(4, experts)
