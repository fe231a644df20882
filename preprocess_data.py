#!/usr/bin/env python3
"""Turn raw text and conversations into Megatron's indexed datasets (.bin and .idx)."""

from qwen3_npu import cli, log
from qwen3_npu.args.preprocess import FOREIGN, GROUPS, PreprocessArgs


def main() -> int:
    log.setup()
    parsed = cli.parse("preprocess_data.py", __doc__, GROUPS, FOREIGN)
    for note in parsed.notes:
        log.info(note)
    from qwen3_npu.data.preprocess import preprocess

    return preprocess(PreprocessArgs(*parsed.groups))


if __name__ == "__main__":
    cli.run("preprocess_data.py", main)
