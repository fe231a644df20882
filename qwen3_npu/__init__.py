"""Qwen3 training on Megatron-Core: Ascend NPU, CUDA and CPU, one code."""

__version__ = "0.1.0"
