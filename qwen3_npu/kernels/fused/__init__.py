"""Triton kernels of one pass each, which `kernels/cuda.py` offers. They compute in float32, whatever the inputs are."""
