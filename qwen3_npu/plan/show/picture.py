"""A verdict as a picture: memory of each stage against the device, a step by kind, and the stages over time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_npu.errors import UsageError
from qwen3_npu.plan.device import GIB
from qwen3_npu.plan.show.schedule import timeline
from qwen3_npu.plan.verdict import PlanVerdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colour = tuple[float, float, float, float]  # red, green, blue, opacity
_SHOWN = 3  # times the pipeline's stages: micro-batches of the timeline


def plot(verdict: PlanVerdict, path: Path) -> None:
    """Write a PNG.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from None
    figure, axes = pyplot.subplot_mosaic(
        [["memory", "time"], ["stages", "stages"]], figsize=(13, 9), layout="constrained"
    )
    colours = [pyplot.get_cmap("tab20")(number) for number in range(20)]
    _memory(axes["memory"], verdict, colours)
    _time(axes["time"], verdict, colours)
    _stages(axes["stages"], verdict, colours)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"--plot {path} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def _memory(axes: Axes, verdict: PlanVerdict, colours: Sequence[Colour]) -> None:
    names = [str(number) for number in range(len(verdict.stages))]
    bottom = [0.0] * len(names)
    for number, (kind, _) in enumerate(verdict.stages[0].rows()):
        heights = [getattr(stage, kind) / GIB for stage in verdict.stages]
        if any(heights):
            axes.bar(names, heights, bottom=bottom, label=kind, color=colours[number])
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.axhline(verdict.device.memory / GIB, color="black", label=verdict.device.name)
    axes.axhline(verdict.limit / GIB, color="black", linestyle=":", label="usable")
    axes.set(title="Memory of one rank of each pipeline stage", ylabel="GiB", xlabel="stage")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)


def _time(axes: Axes, verdict: PlanVerdict, colours: Sequence[Colour]) -> None:
    left = 0.0
    for number, (kind, value) in enumerate(verdict.time.rows()):
        if value > 0.002 * verdict.time.total:
            label = f"{kind} {value:.2f} s ({100 * value / verdict.time.total:.0f} %)"
            axes.barh(["step"], [value], left=left, label=label, color=colours[number])
            left += value
    axes.set(title=f"One optimizer step, slowest stage: {verdict.time.total:.2f} s", xlabel="seconds")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def _stages(axes: Axes, verdict: PlanVerdict, colours: Sequence[Colour]) -> None:
    """Forward and backward passes of all stages; the white space between them is the bubble."""
    setup, time = verdict.setup, verdict.time
    whole = (time.total - time.bubble - time.data - time.optimizer) / setup.num_microbatches
    again = time.recompute / setup.num_microbatches
    forward = (whole - again) / 3  # backward computes two products for each one
    shown = min(setup.num_microbatches, _SHOWN * setup.pipeline)
    few = dataclasses.replace(setup, num_microbatches=shown)
    for one in timeline(few, forward, whole - forward):
        colour = colours[2 * (one.chunk % 5) + (0 if one.is_forward else 1)]
        axes.barh(one.stage, one.end - one.start, left=one.start, color=colour, edgecolor="white", linewidth=0.3)
    axes.invert_yaxis()
    kinds = "dark: forward, light: backward" + (", a colour for each chunk" if setup.virtual > 1 else "")
    title = f"Stages over time ({kinds}), {shown} of {setup.num_microbatches} micro-batches; white is the bubble"
    axes.set(title=title, xlabel="seconds", ylabel="stage", yticks=range(setup.pipeline))
