#!/usr/bin/env python3
"""Generate text with a Qwen3 model: from prompts, a file of prompts, or in a chat."""

from qwen3_npu import cli, log
from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs
from qwen3_npu.distributed import environment


def main() -> None:
    rank, world_size, _ = environment.ranks()
    log.setup(rank, world_size)
    parsed = cli.parse("inference.py", __doc__, GROUPS, FOREIGN)
    args = InferenceArgs(*parsed.groups)
    from qwen3_npu.inference.plan import check_output, make_plan

    plan = make_plan(args.model, args.shape, args.parallel, args.weights, args.prompts, world_size)
    for line in plan.describe(args.weights) + parsed.notes:
        log.info(line)
    if args.runtime.dry_run:
        return
    from qwen3_npu.platform import select

    platform = select(args.runtime.device)
    platform.activate()
    from qwen3_npu.distributed.failure import recorded
    from qwen3_npu.inference.run import run

    check_output(args.generate.output_dir)
    with recorded():
        run(platform, args, plan)


if __name__ == "__main__":
    cli.run("inference.py", main)
