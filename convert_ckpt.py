#!/usr/bin/env python3
"""Convert Qwen3 weights between Hugging Face directories and Megatron checkpoints; reshard, merge or export LoRA."""

from qwen3_npu import cli, log
from qwen3_npu.args.convert import FOREIGN, ConvertArgs, LegacyConvertArgs, LoraConvertArgs, TargetArgs


def main() -> int:
    log.setup()
    groups = (ConvertArgs, TargetArgs, LoraConvertArgs, LegacyConvertArgs)
    parsed = cli.parse("convert_ckpt.py", __doc__, groups, FOREIGN)
    for note in parsed.notes:
        log.info(note)
    from qwen3_npu.checkpoint.convert.run import convert

    return convert(*parsed.groups, given=parsed.given)


if __name__ == "__main__":
    cli.run("convert_ckpt.py", main)
