"""Picture of a verdict: stacked memory of each stage against the device, and a step's time by kind."""

from __future__ import annotations

from pathlib import Path

from qwen3_npu.errors import UsageError
from qwen3_npu.plan.device import GIB
from qwen3_npu.plan.verdict import Verdict


def plot(verdict: Verdict, path: Path) -> None:
    """Write a PNG. Raises: UsageError: matplotlib is not installed, or the file cannot be written."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from None
    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    names = [f"stage {number}" for number in range(len(verdict.stages))]
    bottom = [0.0] * len(names)
    for kind, _ in verdict.stages[0].rows():
        heights = [getattr(stage, kind) / GIB for stage in verdict.stages]
        memory.bar(names, heights, bottom=bottom, label=kind)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    memory.axhline(verdict.device.memory / GIB, color="black", label=f"{verdict.device.name}")
    memory.axhline(verdict.limit / GIB, color="black", linestyle=":", label="usable")
    memory.set(title="Memory of one rank of each pipeline stage", ylabel="GiB")
    memory.legend(fontsize="small", ncols=2)
    left = 0.0
    for kind, value in verdict.time.rows():
        if value > 0.002 * verdict.time.total:
            label = f"{kind} {value:.2f} s ({100 * value / verdict.time.total:.0f} %)"
            time.barh(["step"], [value], left=left, label=label)
            left += value
    time.set(title=f"One optimizer step, slowest stage: {verdict.time.total:.2f} s", xlabel="seconds")
    time.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"--plot {path} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)
