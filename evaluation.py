#!/usr/bin/env python3
"""Evaluate a Qwen3 model on MMLU, CMMLU, C-Eval, GSM8K, BoolQ, or conversations of your own."""

from qwen3_npu import cli, log
from qwen3_npu.args.evaluation import FOREIGN, GROUPS, EvaluationArgs
from qwen3_npu.distributed import environment


def main() -> None:
    rank, world_size, _ = environment.ranks()
    log.setup(rank, world_size)
    parsed = cli.parse("evaluation.py", __doc__, GROUPS, FOREIGN)
    args = EvaluationArgs(*parsed.groups)
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
    from qwen3_npu.evaluation.run import run

    check_output(args.evaluate.output_dir)
    with recorded():
        run(platform, args, plan)


if __name__ == "__main__":
    cli.run("evaluation.py", main)
