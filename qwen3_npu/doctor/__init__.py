"""Look at a machine before a training does: versions, devices, collectives, nodes. `python -m qwen3_npu.doctor`."""
