"""Runs that others published: how fast they were (published_runs.txt), or that they ran out of memory
(published_oom.txt). This prints what the plan says of the memory of the second kind.

    python benchmarks/planning/published.py
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qwen3_npu.args.tools.plan import byte_count
from qwen3_npu.model.sizes import SIZES
from qwen3_npu.plan.device import DEVICE_SPECS, GIB, Device
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape, shape_of
from qwen3_npu.plan.verdict import PlanVerdict

FOLDER = Path(__file__).parent
# Models that are not Qwen3: layers, hidden size, FFN, heads, groups, vocabulary.
_OTHERS = {
    "llama2-7b": (32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": (40, 5120, 13824, 40, 40, 32000),
    "llama3-70b": (80, 8192, 28672, 64, 8, 128256),
}


@dataclasses.dataclass(frozen=True)
class Published:
    """One published run.

    Attributes:
        device: of `DEVICE_SPECS`.
        rate: tokens/s of one device; 0: it ran out of memory.
        imbalance: tokens of the busiest expert rank over the mean.
        is_fitted: it decides constants; others are only shown.
        memory: bytes of the device, if other than the table says; 0: as there.
        launched: operations of a micro-batch that another project's host launches; 0: as many as this project's.
    """

    name: str
    device: str
    shape: Shape
    setup: Setup
    rate: float
    imbalance: float = 1.0
    is_fitted: bool = True
    memory: float = 0.0
    launched: float = 0.0

    @property
    def verdict(self) -> PlanVerdict:
        """What the plan says."""
        device: Device = DEVICE_SPECS[self.device]
        if self.memory:
            device = dataclasses.replace(device, memory=self.memory)
        return PlanVerdict(self.shape, self.setup, device)


def _stages(layers: int, pipeline: int, virtual: int = 1) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk; the embedding and the loss count as one layer where the number is two short."""
    chunks = pipeline * virtual
    each = -(-layers // chunks)
    short = each * chunks - layers
    table = [[each] * virtual for _ in range(pipeline)]
    if short == 2:
        table[0][0] -= 1
        table[-1][-1] -= 1
    elif short:
        raise ValueError((layers, pipeline, virtual))
    return tuple(tuple(row) for row in table)


def _shape(model: str) -> Shape:
    if model in SIZES:
        return shape_of(SIZES[model])
    layers, hidden, ffn, heads, groups, vocabulary = _OTHERS[model]
    return Shape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
    )


def _read_row(cells: Sequence[str]) -> Published:
    name, model, device, devices, batch, length, layout, micro, options, last = cells
    device, _, memory = device.partition(":")
    size = {match[1]: int(match[2]) for match in re.finditer(r"(TP|PP|VPP|CP|ETP|EP)(\d+)", layout)}
    tensor, pipeline, context = (size.get(kind, 1) for kind in ("TP", "PP", "CP"))
    shape = _shape(model)
    words = dict(word.partition("=")[::2] for word in options.split())
    data = int(devices) // (tensor * context * pipeline)
    setup = Setup(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=size.get("EP", 1),
        expert_tensor=size.get("ETP", 1),
        layers=_stages(shape.num_layers, pipeline, size.get("VPP", 1)),
        data=data,
        seq_length=int(length),
        micro_batch=int(micro),
        num_microbatches=max(1, int(batch) // (data * int(micro))),
        sequence_parallel=tensor > 1,
        distributed_optimizer="whole_optimizer" not in words,
        swap_optimizer="host_optimizer" in words,
        recompute=shape.num_layers if "full" in words else 0,
        recompute_norm="selective" in words,
        recompute_activation="selective" in words,
        overlap_grads="overlap" in words,
        overlap_params="overlap" in words,
        overlap_tensor="overlap_tensor" in words,
        overlap_experts="overlap_experts" in words,
        two_levels="two_levels" in words or "hybrid" in words,
        sizes_on_device="hybrid" in words,
        packed="packed" in words,
        lora_rank=int(words.get("lora_rank", 0)),
    )
    return Published(
        name.lstrip("!"),
        device,
        shape,
        setup,
        rate=float(last) if re.fullmatch(r"[0-9.]+", last) else 0.0,
        imbalance=float(words.get("imbalance", 1)),
        is_fitted=not name.startswith("!"),
        memory=byte_count(memory, "device") if memory else 0.0,
    )


def read_published(table: str = "published_runs.txt") -> tuple[Published, ...]:
    """The rows of a table of this folder."""
    text = (FOLDER / table).read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return tuple(_read_row([cell.strip() for cell in line.split("|")]) for line in lines[1:])


def main() -> None:
    print(f"{'ran out of memory':<52}{'needed':>12}{'usable':>12}  verdict")
    for row in read_published("published_oom.txt"):
        verdict = row.verdict
        word = "fits" if verdict.fits else "does not fit"
        print(f"{row.name[:51]:<52}{verdict.peak / GIB:>8.1f} GiB{verdict.limit / GIB:>8.1f} GiB  {word}")


if __name__ == "__main__":
    main()
