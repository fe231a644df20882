"""The common start of inference.py and evaluation.py: flags, plan, device, then the program's own work."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qwen3_npu import cli, log
from qwen3_npu.args.evaluation import EvaluationArgs
from qwen3_npu.args.inference import InferenceArgs
from qwen3_npu.distributed import environment


def start(
    prog: str,
    description: str,
    make: Callable[..., InferenceArgs | EvaluationArgs],
    *,
    groups: Sequence[type],
    foreign: Mapping[str, cli.Foreign],
    work: str,
) -> None:
    """Parse the flags, print the plan, prepare the device and run; with --dry-run only print the plan.

    Args:
        make: groups of flags -> the program's flags.
        work: module whose `run(platform, args, plan)` does the work; imported late, because it imports torch.

    Raises:
        UsageError: something does not fit, or --output-dir cannot be written.
    """
    rank, world_size, _ = environment.ranks()
    log.setup(rank, world_size)
    parsed = cli.parse(prog, description, groups, foreign)
    args = make(*parsed.groups)
    if isinstance(args, InferenceArgs):
        args.check()
    from qwen3_npu.inference.plan import plan_inference

    plan = plan_inference(
        args.model,
        args.shape,
        args.parallel,
        args.weights,
        prompts=args.prompts,
        world_size=world_size,
        scores=args.scores,
    )
    for line in [*plan.describe(args.weights), *parsed.notes]:
        log.info(line)
    if args.runtime.dry_run:
        log.info(plan.memory_in_words(bf16=args.weights.bf16))
        return
    from qwen3_npu.files import check_writable
    from qwen3_npu.platform import select_platform

    platform = select_platform(args.runtime.device)
    platform.activate()
    if args.output_dir is not None:
        check_writable(Path(args.output_dir), "--output-dir")
    from qwen3_npu.distributed.failure import recorded

    with recorded():
        importlib.import_module(work).run(platform, args, plan)
