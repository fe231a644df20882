"""Results of one process. The parity check runs this in a separate process: reference.py FOLDER DEVICE BATCH."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from qwen3_npu.args.parallel import RuntimeArgs
from qwen3_npu.parity.rows import PER_DOCUMENT
from qwen3_npu.parity.tiny import arch, write_instructions, write_model
from qwen3_npu.platform import select_platform

STEPS, LENGTH = 2, 64


def write_inputs(folder: Path) -> None:
    """Write models and data of all rows."""
    for model in ("untied", "tied", "moe"):
        write_model(folder / model, arch(model))
    write_instructions(folder / "single", count=64)
    write_instructions(folder / "packed", pack=LENGTH, count=64)


def base_flags(folder: Path, device: str, batch: int, model: str, *, packed: bool) -> list[str]:
    """Flags of all rows with one model and form of data."""
    data = folder / ("packed" if packed else "single")
    flags = ["--stage", "sft", "--load", str(folder / model), "--data-path", str(data), "--device", device]
    flags += ["--seq-length", str(LENGTH), "--global-batch-size", str(batch), "--train-iters", str(STEPS)]
    flags += ["--lr", "1e-3", "--lr-decay-style", "constant", "--clip-grad", "0", "--adam-eps", "1e-4"]
    flags += ["--eval-iters", "0", "--split", "1,0,0", *(PER_DOCUMENT if packed else [])]
    return [*flags, "--moe-aux-loss-coeff", "0.02", "--moe-z-loss-coeff", "0.01"] if model == "moe" else flags


def file_name(model: str, packed: bool) -> str:
    return f"reference_{model}{'_packed' * packed}"


def main(folder: Path, device: str, batch: int, wanted: list[str]) -> None:
    """Args: wanted: names of `file_name`."""
    platform = select_platform(device)
    platform.activate()
    from qwen3_npu.distributed.launch import process_group
    from qwen3_npu.parity.measure import measure, trainer

    with process_group(platform, RuntimeArgs()) as world:
        for model in ("untied", "tied", "moe"):
            for packed in (False, True):
                name = file_name(model, packed)
                if name not in wanted:
                    continue
                with trainer(platform, world, base_flags(folder, device, batch, model, packed=packed)) as made:
                    measured = measure(made, STEPS)
                np.savez(folder / f"{name}.npz", allow_pickle=False, **measured.gradients)
                (folder / f"{name}.json").write_text(json.dumps([step.loss for step in measured.steps]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
