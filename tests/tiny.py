"""Small random models and data: those of the parity check."""

from qwen3_npu.parity.tiny import DENSE, arch, write_instructions, write_model, write_tokens

__all__ = ["DENSE", "arch", "write_instructions", "write_model", "write_tokens"]
