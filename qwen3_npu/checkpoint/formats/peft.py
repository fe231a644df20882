"""PEFT adapter directories: `adapter_config.json` and `adapter_model.safetensors`. No torch.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. A MoE model's expert projections have names of
their own (`...mlp.experts.E.gate_proj.lora_A.weight`), as in published weights; peft fuses them itself on loading
where transformers does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.args.lora import LORA_TARGETS
from qwen3_npu.checkpoint.binary.dtypes import DType, Region, sizes
from qwen3_npu.checkpoint.binary.safetensors_read import SafetensorsFile
from qwen3_npu.checkpoint.formats.folders import ADAPTER_CONFIG
from qwen3_npu.checkpoint.mapping.lora import Contents, Lora, peft_shapes
from qwen3_npu.checkpoint.mapping.source import check_tensors
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Fields of a LoraConfig that change what the adapter computes, and the values under which it is plain LoRA.
_PLAIN = {
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "target_parameters": (None, []),
    "exclude_modules": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
}


def peft_config(lora: Lora, base: str | None) -> dict[str, Any]:
    """The adapter_config.json of an adapter for the model in folder `base`; what it does not say is peft's default."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "target_modules": [projection for target in lora.targets for projection in LORA_TARGETS[target]],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
    }


class PeftReader:
    """A PEFT adapter's tensors (one side of conversions; see `source.py`).

    Projections that it lacks but a Megatron adapter joins to one that it has (k beside q and v) read as zeros.

    Attributes:
        contents: the adapter, with the Megatron names of its targets.
        projections: the Hugging Face projections that it has.
    """

    format = "peft"

    def __init__(self, folder: str | Path, arch: Qwen3Arch) -> None:
        """Open it and check it against the model that it is for.

        Raises:
            UsageError: a file is missing or truncated, it is not plain LoRA, or it is another model's.
        """
        self.folder, self.arch = Path(folder), arch
        config = _read_config(self.folder)
        self.projections, lora = _lora(config, str(self.folder / ADAPTER_CONFIG))
        self.contents = Contents(arch, base=False, lora=lora)
        if not (self.folder / ADAPTER_WEIGHTS).is_file():
            other = "; it has adapter_model.bin: save it as safetensors" if any(self.folder.glob("*.bin")) else ""
            raise UsageError(f"{self.folder} holds no {ADAPTER_WEIGHTS}{other}")
        self.file = SafetensorsFile(self.folder / ADAPTER_WEIGHTS)
        self.shapes = peft_shapes(arch, lora)
        wanted = {name: shape for name, shape in self.shapes.items() if self.has(name)}
        found = {name: self.file.shape(name) for name in self.file.header}
        check_tensors(
            found, wanted, str(self.folder / ADAPTER_WEIGHTS), f"rank {lora.r} on {self.projections} of {arch}"
        )

    def has(self, name: str) -> bool:
        """Whether a tensor is in the file, rather than zeros."""
        return name.split(".")[-3] in self.projections

    def dtype(self, name: str) -> DType:
        return self.file.dtype(name if self.has(name) else next(iter(self.file.header)))

    def read(self, name: str, region: Region) -> np.ndarray:
        """A part of one tensor, in its own dtype (bfloat16 as uint16)."""
        if self.has(name):
            return self.file.read(name, region)
        return np.zeros(sizes(region), self.dtype(name).carrier)

    def check(self) -> None:
        """Nothing is left to check: opening did."""

    def close(self) -> None:
        self.file.close()

    def __str__(self) -> str:
        return f"PEFT, {self.contents}"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UsageError(f"{path}: peft_type LORA expected")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise UsageError(f"{path}: {name} {config[name]!r} is not supported; only plain LoRA is")
    return config


def _lora(config: dict[str, Any], where: str) -> tuple[list[str], Lora]:
    known = {projection: target for target, projections in LORA_TARGETS.items() for projection in projections}
    named = config.get("target_modules") or []
    if isinstance(named, str) or not set(named) <= known.keys():
        raise UsageError(f"{where}: target_modules {named!r} not supported; a list of {', '.join(known)} is")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, (int, float)):
        raise UsageError(f"{where}: r {r!r} and lora_alpha {alpha!r}: a number of at least 1 and a number expected")
    if config.get("use_rslora"):
        alpha *= r**0.5  # it scales by alpha / sqrt(r)
    targets = tuple(target for target in LORA_TARGETS if any(known[name] == target for name in named))
    return [name for name in known if name in named], Lora(r, float(alpha), targets)
