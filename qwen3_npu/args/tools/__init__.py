"""Flags of the tools: `python -m qwen3_npu.doctor`, `.parity` and `.plan`."""
