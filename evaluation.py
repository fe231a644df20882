#!/usr/bin/env python3
"""Evaluate a Qwen3 model on MMLU, CMMLU, C-Eval, GSM8K, BoolQ, or conversations of your own."""

from qwen3_npu import cli
from qwen3_npu.args.evaluation import FOREIGN, GROUPS, EvaluationArgs
from qwen3_npu.inference.start import start


def main() -> None:
    start(
        "evaluation.py",
        str(__doc__),
        EvaluationArgs,
        groups=GROUPS,
        foreign=FOREIGN,
        work="qwen3_npu.evaluation.run",
    )


if __name__ == "__main__":
    cli.run("evaluation.py", main)
