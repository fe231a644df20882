"""What inference.py and evaluation.py do before their own work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_npu import log
from qwen3_npu.args.evaluation import EvaluationArgs
from qwen3_npu.args.inference import InferenceArgs
from qwen3_npu.distributed import environment
from qwen3_npu.files import check_writable
from qwen3_npu.inference.plan import InferencePlan, plan_inference

if TYPE_CHECKING:  # it imports torch, which --dry-run does without
    from qwen3_npu.platform.base import Platform


def start(
    args: InferenceArgs | EvaluationArgs, notes: Sequence[str], output_dir: str
) -> tuple[Platform, InferencePlan] | None:
    """InferencePlan and say what will be done, and make the device ready; None if --dry-run asks for no more.

    Args:
        notes: of the flags.

    Raises:
        UsageError: something does not fit, or --output-dir cannot be written.
    """
    _, world_size, _ = environment.ranks()
    plan = plan_inference(args.model, args.shape, args.parallel, args.weights, args.prompts, world_size)
    for line in [*plan.describe(args.weights), *notes]:
        log.info(line)
    if args.runtime.dry_run:
        return None
    from qwen3_npu.platform import select

    platform = select(args.runtime.device)
    platform.activate()
    check_writable(Path(output_dir), "--output-dir")
    return platform, plan
