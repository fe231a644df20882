"""Does this machine compute the same, however a training is cut? `python -m qwen3_npu.parity` tells."""
