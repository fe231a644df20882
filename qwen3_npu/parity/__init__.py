"""Does this machine compute the same, whatever the layout of a training? `python -m qwen3_npu.parity` tells."""
