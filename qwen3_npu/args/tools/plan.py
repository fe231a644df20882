"""Flags of `python -m qwen3_npu.plan`, and those by which a training's start judges its layout."""

from __future__ import annotations

import dataclasses
import re

from qwen3_npu.args.preference import PREFERENCE_STAGES
from qwen3_npu.cli import flag
from qwen3_npu.errors import UsageError
from qwen3_npu.model.sizes import SIZES

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "G": 2**30}


def byte_count(text: str, name: str) -> float:
    """`64GiB` -> 68719476736. Raises: UsageError: `name` is no number of bytes."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise UsageError(f"{name} {text}: a number of bytes such as 64GiB or 80GB is expected")
    return float(found[1]) * _UNITS[found[2].upper()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerdictArgs:
    """what the launch check plans for"""

    plan_device: str | None = flag(
        None, metavar="NAME", help="device to plan memory and time for, e.g. 910B-64G; default: 910B-64G in a dry run"
    )
    device_memory: str | None = flag(None, metavar="SIZE", help="its memory, if other than published, e.g. 61GiB")
    fit: str = flag(
        "warn", choices=["warn", "error"], help="whether a layout that is too large is an error or a warning"
    )
    device_table: str | None = flag(None, metavar="FILE", help="constants that `plan --learn` found on this cluster")

    def __post_init__(self) -> None:
        if self.device_memory is not None:
            byte_count(self.device_memory, "--device-memory")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArgs:
    """what to plan"""

    model: str | None = flag(None, choices=sorted(SIZES), help="a published size")
    hf_dir: str | None = flag(None, metavar="DIR", help="folder of a config.json, instead of --model")
    shape_json: str | None = flag(None, metavar="FILE", help="sizes of any decoder (docs/planning.md), instead")
    devices: int = flag(8, minimum=1, help="devices")
    device: str = flag("910B-64G", metavar="NAME", help="kind of device; an unknown name lists the known ones")
    device_memory: str | None = flag(None, metavar="SIZE", help="its memory, if other than published, e.g. 61GiB")
    device_table: str | None = flag(None, metavar="FILE", help="constants that --learn found on this cluster")
    seq_length: int = flag(4096, minimum=1, unit="tokens", help="tokens of a sample")
    global_batch_size: int = flag(64, minimum=1, unit="samples", help="samples per optimizer step")
    inference: bool = flag(
        False, help="plan inference.py and evaluation.py: how many requests of --seq-length tokens fit each layout"
    )
    stage: str = flag(
        "pt", choices=["pt", "sft", *PREFERENCE_STAGES], help="pretraining, fine-tuning, or learning from preferences"
    )
    lora_r: int = flag(0, minimum=0, help="rank of adapters; 0: all weights are trained")
    qlora: bool = flag(False, help="with --lora-r: the frozen linears are in 4 bits")
    qlora_double_quant: bool = flag(False, help="with --qlora: their scales are in 8 bits")
    pack: bool = flag(False, help="instruction data is packed, so no token is padding")
    trace: bool = flag(
        False,
        help="also run the real step of one rank of each stage of the first layout, on tensors without data (needs "
        "torch); with flags of pretrain_gpt.py, of the layout that they say, without a search: "
        "python -m qwen3_npu.plan --trace --devices 256 --ranks 0,37 FLAGS",
    )
    top: int = flag(10, minimum=1, help="layouts to show")
    json: bool = flag(False, help="print JSON")
    plot: str | None = flag(
        None, metavar="FILE.png", help="picture of the best layout: memory of stages, a step's time"
    )
    learn: str | None = flag(None, metavar="RUN_DIR", help="make a device table from a training's metrics.jsonl")
    output: str = flag("device_table.json", metavar="FILE", help="where --learn writes")

    def __post_init__(self) -> None:
        given = [name for name in ("model", "hf_dir", "shape_json") if getattr(self, name)]
        if self.learn is None and len(given) != 1:
            raise UsageError("give one of --model, --hf-dir and --shape-json")
        if self.trace and (self.inference or self.shape_json or self.learn):
            other = "--inference" if self.inference else "--shape-json" if self.shape_json else "--learn"
            raise UsageError(f"--trace runs a training step of a model of this project; drop {other}")
        if self.device_memory is not None:
            byte_count(self.device_memory, "--device-memory")
        if self.plot is not None and not self.plot.endswith(".png"):
            raise UsageError(f"--plot {self.plot}: a name that ends with .png is expected")
