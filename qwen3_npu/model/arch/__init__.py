"""The architecture of a model: facts, family, rotary embedding, and reading them from files. No torch.

architecture.py    Qwen3Arch, and what follows from it
facts.py           one row per fact: config.json's key, Megatron's argument, type and range
families/          one row per family: biases, norms, names, transformers' defaults
rope.py            rotary embedding and its scaling
hf_config.py       config.json, both ways
megatron.py        Megatron's arguments, both ways
"""

from __future__ import annotations

from qwen3_npu.model.arch.architecture import Qwen3Arch, flops_per_token, parameter_count
from qwen3_npu.model.arch.hf_config import from_hf_config, read_hf_config, to_hf_config

__all__ = ["Qwen3Arch", "flops_per_token", "from_hf_config", "parameter_count", "read_hf_config", "to_hf_config"]
