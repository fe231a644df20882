#!/usr/bin/env python3
"""Turn raw text and conversations into Megatron's indexed datasets (.bin and .idx)."""

import sys

from qwen3_npu import cli, log
from qwen3_npu.args.preprocess import FOREIGN, GROUPS, PreprocessArgs


def main() -> int:
    log.setup()
    # Threads that come back from a library should not wait 5 ms, Python's default, for the one that runs Python.
    sys.setswitchinterval(0.001)
    parsed = cli.parse("preprocess_data.py", __doc__, GROUPS, FOREIGN)
    for note in parsed.notes:
        log.info(note)
    args = PreprocessArgs(*parsed.groups)
    from qwen3_npu.data.text.tokenizer import start_loading

    folder, loading = args.tokenizer.tokenizer_name_or_path, None
    if folder and not args.output.merge_group_keys:
        # Most of a small run's time goes into this: it starts before numpy is imported.
        loading = start_loading(folder, args.tokenizer.tokenizer_backend, args.output.workers)
    from qwen3_npu.data.preprocess.run import preprocess

    return preprocess(args, loading)


if __name__ == "__main__":
    cli.run("preprocess_data.py", main)
