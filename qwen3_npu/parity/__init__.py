"""Check that every layout of a training computes the same on this machine: `python -m qwen3_npu.parity`."""
