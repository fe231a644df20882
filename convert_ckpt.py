#!/usr/bin/env python3
"""Convert Qwen3 weights between Hugging Face directories and Megatron checkpoints."""

from qwen3_npu import cli, log
from qwen3_npu.args.convert import FOREIGN, ConvertArgs, LegacyConvertArgs, TargetArgs


def main() -> None:
    log.setup()
    parsed = cli.parse("convert_ckpt.py", __doc__, (ConvertArgs, TargetArgs, LegacyConvertArgs), FOREIGN)
    for note in parsed.notes:
        log.info(note)
    from qwen3_npu.checkpoint.convert import convert

    convert(*parsed.groups)


if __name__ == "__main__":
    cli.run("convert_ckpt.py", main)
