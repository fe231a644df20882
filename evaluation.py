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
    from qwen3_npu.inference.start import start

    ready = start(args, parsed.notes, args.evaluate.output_dir)
    if ready is None:
        return
    platform, plan = ready
    from qwen3_npu.distributed.failure import recorded
    from qwen3_npu.evaluation.run import run

    with recorded():
        run(platform, args, plan)


if __name__ == "__main__":
    cli.run("evaluation.py", main)
