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
    from qwen3_npu.inference.start import start

    ready = start(args, parsed.notes, args.generate.output_dir)
    if ready is None:
        return
    platform, plan = ready
    from qwen3_npu.distributed.failure import recorded
    from qwen3_npu.inference.run import run

    with recorded():
        run(platform, args, plan)


if __name__ == "__main__":
    cli.run("inference.py", main)
