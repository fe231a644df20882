#!/usr/bin/env python3
"""Generate text with a Qwen3 model: from prompts, a file of prompts, in a chat, or for clients of OpenAI's API."""

from qwen3_npu import cli
from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs
from qwen3_npu.inference.start import start


def main() -> None:
    start(
        "inference.py",
        str(__doc__),
        InferenceArgs,
        groups=GROUPS,
        foreign=FOREIGN,
        work="qwen3_npu.inference.run",
    )


if __name__ == "__main__":
    cli.run("inference.py", main)
