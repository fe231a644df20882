"""Qwen3 training on Megatron-Core: Ascend NPU, CUDA and CPU, one code."""

import sys

__version__ = "0.1.0"

if sys.version_info < (3, 10):  # noqa: UP036  # an older Python reads this file only: no newer syntax here
    sys.stderr.write("error: %s is Python %d.%d" % (sys.executable, *sys.version_info[:2]))  # noqa: UP031
    sys.stderr.write("; use Python 3.10, 3.11 or 3.12\n")
    raise SystemExit(2)
