"""PEFT adapter directories: `adapter_config.json` and `adapter_model.safetensors`. No torch.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. A MoE model's expert projections have names of
their own (`...mlp.experts.E.gate_proj.lora_A.weight`), as in published weights; peft fuses them itself on loading
where transformers does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from qwen3_npu.args.lora import ALL_TARGETS
from qwen3_npu.checkpoint.binary.dtypes import F32, DType, Region, convert_dtype, full, row_blocks, sizes, to_float32
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile
from qwen3_npu.checkpoint.folders import ADAPTER_CONFIG
from qwen3_npu.checkpoint.mapping.lora import MAGNITUDE, PEFT_SCORE, Lora, is_a, peft_module, peft_shapes
from qwen3_npu.checkpoint.mapping.peft_adapter import has_head, read_adapter
from qwen3_npu.checkpoint.mapping.source import Contents, Source
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.schema import read_record

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_OF_EXPERTS = {"linear_fc1", "linear_fc2"}


def peft_config(lora: Lora, base: str | None, arch: Qwen3Arch) -> dict[str, object]:
    """The adapter_config.json of an adapter for the model in folder `base`; absent fields have peft's defaults."""
    head = {"modules_to_save": ["score"]} if arch.reward else {}
    alpha, is_stabilized = lora.alpha, lora.is_stabilized
    if is_stabilized and arch.is_moe and set(lora.targets) & _OF_EXPERTS:
        # vLLM 0.23 scales adapters of experts by lora_alpha / r whatever use_rslora says.
        alpha, is_stabilized = lora.scale * lora.r, False
    return {
        **head,
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if arch.reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        **_targets(lora, arch),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_dora": lora.is_dora,
        "use_rslora": is_stabilized,
    }


def _targets(lora: Lora, arch: Qwen3Arch) -> dict[str, object]:
    """`target_modules`: projections, projections of some layers, or the full name of each module."""
    projections = [projection for target in lora.targets for projection in ALL_TARGETS[target]]
    if not lora.layers:
        return {"target_modules": projections}
    of_layers = {layers for _, layers in lora.layers}
    if len(of_layers) == 1 and len(lora.layers) == len(lora.targets):
        return {"target_modules": projections, "layers_to_transform": list(of_layers.pop())}
    return {"target_modules": sorted({peft_module(name) for name in peft_shapes(arch, lora) if name != PEFT_SCORE})}


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
        self.folder = Path(folder)
        config = read_record(self.folder / ADAPTER_CONFIG)
        arch = self.arch = dataclasses.replace(arch, reward=has_head(config))
        if not (self.folder / ADAPTER_WEIGHTS).exists():
            other = "; it has adapter_model.bin: save it as safetensors" if any(self.folder.glob("*.bin")) else ""
            raise UsageError(f"{self.folder} holds no {ADAPTER_WEIGHTS}{other}")
        self.file = SafetensorsFile(self.folder / ADAPTER_WEIGHTS)
        shapes = {name: self.file.shape(name) for name in self.file.header}
        self.adapter = read_adapter(config, shapes, arch, str(self.file.path))
        self.projections = self.adapter.projections
        self.contents = Contents(arch, base=False, lora=self.adapter.lora)
        self.shapes = peft_shapes(arch, self.adapter.lora)
        for name in self.shapes:
            self.dtype(name)  # an error now rather than after hours

    def has(self, name: str) -> bool:
        """Whether a tensor is in the file, rather than zeros."""
        return name in self.adapter.parts

    def dtype(self, name: str) -> DType:
        if name == PEFT_SCORE or name.endswith(MAGNITUDE):
            return self.file.dtype(name)
        if not self.has(name):
            return self.file.dtype(next(iter(self.file.header)))
        part = self.adapter.parts[name]
        return self.file.dtype(part.stored) if part.factor == 1 else F32

    def read(self, name: str, region: Region) -> np.ndarray:
        """A part of one tensor, in its own dtype (bfloat16 as uint16)."""
        if name == PEFT_SCORE:
            return self.file.read(name, region)
        if name.endswith(MAGNITUDE):
            return self.file.read(name, region)
        out = np.zeros(sizes(region), self.dtype(name).carrier)
        if not self.has(name):
            return out
        part = self.adapter.parts[name]
        axis = 0 if is_a(name) else 1  # the side of the rank
        first, last = region[axis][0], min(region[axis][1], part.rank)
        if first >= last:
            return out
        ((top, bottom), (left, right)) = region
        if axis == 0:
            data = self.file.read(part.stored, ((part.row + first, part.row + last), (left, right)))
            out[: last - first] = data
            return out
        columns = (first * part.experts, last * part.experts)
        data = self.file.read(part.stored, ((part.row + top, part.row + bottom), columns))[
            :, part.expert :: part.experts
        ]
        if part.factor != 1:
            data = to_float32(data, self.file.dtype(part.stored)) * np.float32(part.factor)
        out[:, : last - first] = data
        return out

    def check(self) -> None:
        """Opening has checked everything."""

    def check_carried(self, base: Source) -> None:
        """Check the embedding that peft saves beside an adapter on it, since peft loads it in place of the base's.

        Raises:
            UsageError: it is not the base's.
        """
        for stored, name in self.adapter.carried.items():
            dtype, region = self.file.dtype(stored), full(self.file.shape(stored))
            if len(region) != 2 or region[1][1] != self.arch.hidden_size or region[0][1] < self.arch.vocab_size:
                raise UsageError(
                    f"{self.file.path}: {stored} has shape {self.file.shape(stored)}, which is not {name}'s"
                )
            for block in row_blocks(((0, self.arch.vocab_size), region[1]), 4):
                ours, theirs = self.file.read(stored, block), base.read(name, block)
                if not np.array_equal(ours, convert_dtype(theirs, base.dtype(name), dtype)):
                    raise UsageError(
                        f"{self.file.path} holds a {name} of its own, which is not that of the base; save the adapter "
                        f"with peft's save_embedding_layers=False, or merge it with peft"
                    )

    def close(self) -> None:
        self.file.close()

    def __str__(self) -> str:
        return f"PEFT, {self.contents}"
