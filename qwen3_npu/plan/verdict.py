"""The verdict on one layout: memory of each stage against the device, time of a step, and remedies."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from qwen3_npu.plan.device import GIB, Device
from qwen3_npu.plan.memory import StageMemory, stage_memory
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape
from qwen3_npu.plan.timing import StepTime, model_flops, step_time

# Share of the device's memory that may be planned for: the rest is for fragmentation and for memory that no formula
# describes.
USABLE = 0.94


@dataclasses.dataclass(frozen=True)
class PlanVerdict:
    """Memory and time of one layout on one kind of device.

    Values are computed on first use: a search needs only the peak of most layouts.
    """

    shape: Shape
    setup: Setup
    device: Device

    @functools.cached_property
    def _known(self) -> dict[int, StageMemory]:
        return {}

    def _stage(self, stage: int) -> StageMemory:
        if stage not in self._known:
            device = self.device
            memory = stage_memory(self.shape, self.setup, stage, reserve=device.reserve, kernels=device.kernels)
            self._known[stage] = memory
        return self._known[stage]

    @functools.cached_property
    def stages(self) -> tuple[StageMemory, ...]:
        """Memory of each pipeline stage."""
        return tuple(map(self._stage, range(self.setup.pipeline)))

    @functools.cached_property
    def time(self) -> StepTime:
        """Time of one step."""
        return step_time(self.shape, self.setup, self.device)

    @functools.cached_property
    def peak(self) -> float:
        """Bytes of the fullest stage."""
        return max(self._stage(stage).total for stage in self._different())

    def _different(self) -> list[int]:
        """The stages that can be the fullest: among equal middle stages the first one holds most micro-batches."""
        layers = self.setup.layers
        middle = {layers[stage]: stage for stage in range(len(layers) - 2, 0, -1)}
        return list(dict.fromkeys((0, len(layers) - 1, *middle.values())))

    @property
    def limit(self) -> float:
        """Bytes that may be used."""
        return self.device.memory * USABLE

    @functools.cached_property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return all(self._stage(stage).total <= self.limit for stage in self._different())

    @property
    def is_hopeless(self) -> bool:
        """Whether weights, gradients and optimizer state of the first stage alone are too much."""
        return self._stage(0).static + self.device.reserve > self.limit

    @property
    def optimizer_share(self) -> float:
        """The optimizer's share of the usable memory on the first stage."""
        return self._stage(0).optimizer / self.limit

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and device, padding left out."""
        tokens = self.setup.global_batch * self.setup.seq_length * (1 - self.setup.pad)
        return tokens / self.time.total / self.setup.devices

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation: needed FLOP over the peak's."""
        return model_flops(self.shape, self.setup) / self.setup.devices / self.time.total / self.device.flops


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change that saves memory.

    Attributes:
        words: flags.
        saved: saved bytes of the fullest stage.
        slower: relative change of the step's time.
    """

    words: str
    saved: float
    slower: float

    def __str__(self) -> str:
        return f"{self.words}: -{self.saved / GIB:.1f} GiB, {100 * self.slower:+.0f} % time"


def remedies(verdict: PlanVerdict, most: int = 4) -> list[Remedy]:
    """Remedies that make a layout smaller: sufficient ones first, sorted by their cost in time."""
    found = []
    for words, setup in _changes(verdict.setup):
        changed = PlanVerdict(verdict.shape, setup, verdict.device)
        if (saved := verdict.peak - changed.peak) > 0.05 * GIB:
            found.append((not changed.fits, Remedy(words, saved, changed.time.total / verdict.time.total - 1)))
    found.sort(key=lambda pair: (pair[0], pair[1].slower if not pair[0] else -pair[1].saved))
    return [remedy for _, remedy in found[:most]]


def _changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    most = max(sum(stage) for stage in setup.layers)
    per_chunk = max(max(stage) for stage in setup.layers)
    for share in (0.25, 0.5, 1.0):
        layers = max(1, round(per_chunk * share))
        if layers * setup.virtual > setup.recompute and not setup.swapped:
            flags = f"--recompute-granularity full --recompute-method block --recompute-num-layers {layers}"
            yield flags, dataclasses.replace(setup, recompute=min(most, layers * setup.virtual), recompute_group=1)
    if not setup.swapped and not setup.recompute:
        yield "--swap-attention", dataclasses.replace(setup, swapped=("self_attention",), swapped_layers=most)
    if not setup.recompute_activation and setup.recompute < most:
        yield "--recompute-activation-function", dataclasses.replace(setup, recompute_activation=True)
    if not setup.distributed_optimizer and not setup.lora_rank and setup.data * setup.context > 1:
        yield "--use-distributed-optimizer", dataclasses.replace(setup, distributed_optimizer=True)
    if setup.distributed_optimizer and not (setup.lora_rank or setup.muon or setup.swap_optimizer):
        if setup.bf16 and not setup.reuse_master:
            yield "--reuse-fp32-param", dataclasses.replace(setup, reuse_master=True)
        swapped = dataclasses.replace(setup, swap_optimizer=True, reuse_master=False)
        yield "--swap-optimizer" + (" instead of --reuse-fp32-param" if setup.reuse_master else ""), swapped
    if not setup.sequence_parallel and setup.tensor > 1:
        yield "--sequence-parallel", dataclasses.replace(setup, sequence_parallel=True)
    if setup.micro_batch > 1:
        passes = setup.num_microbatches * setup.micro_batch
        yield "--micro-batch-size 1", dataclasses.replace(setup, micro_batch=1, num_microbatches=passes)
    if not setup.loss_chunk and setup.tokens > 1024:
        yield "--loss-compute-mode chunk", dataclasses.replace(setup, loss_chunk=1024)
    if setup.lora_rank and not setup.quantized:
        yield "--qlora", dataclasses.replace(setup, quantized=True)
    if not setup.lora_rank:
        yield "--lora-r 16 (LoRA)", dataclasses.replace(setup, lora_rank=16)
