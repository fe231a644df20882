"""Check a machine before a training: versions, devices, collectives, nodes. `python -m qwen3_npu.doctor`."""
