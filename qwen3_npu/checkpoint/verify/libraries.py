"""Open files of checkpoints with torch itself. Names in their pickles that hold no tensors are not imported."""

from __future__ import annotations

import collections
import enum
import pickle
import types
from pathlib import Path
from typing import Any

import torch

from qwen3_npu.errors import UsageError, printable

# Norms under the names that Transformer Engine gives them, and their own.
NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def failed(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be read by its own library: {printable(str(error))[:200]}")


class _Ignored:
    """Placeholder for any object that holds no tensors."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...


def _member(of: object, name: str) -> object:
    """`getattr` in the metadata: some versions of Python pickle the member of an enumeration with it."""
    return of[name] if isinstance(of, enum.EnumMeta) else _Ignored()


class _Metadata(pickle.Unpickler):
    """Builds what torch.distributed.checkpoint describes tensors with."""

    def find_class(self, module: str, name: str) -> object:
        ours = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        if (ours and "." not in name) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) in (
            ("torch", "Size"),
            ("collections", "OrderedDict"),
            ("torch.serialization", "_get_layout"),
        ):
            return super().find_class(module, name)
        return _member if (module, name) == ("builtins", "getattr") else _Ignored


class _Tensors(pickle.Unpickler):
    """Builds tensors and the dicts that hold them."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return getattr(torch._utils, name)
        if module == "collections" and name in ("OrderedDict", "defaultdict"):
            return getattr(collections, name)
        if (module, name) == ("argparse", "Namespace"):
            return types.SimpleNamespace
        return dict if name == "dict" else _Ignored


def dist_metadata(path: Path) -> Any:
    """torch.distributed.checkpoint's `Metadata` in a file."""
    try:
        with open(path, "rb") as file:
            return _Metadata(file).load()
    except Exception as error:
        raise failed(path, error) from None


def _content(path: Path) -> dict[str, Any]:
    # The file was opened by the reader before, which refuses all that is not plain data.
    pickles = types.SimpleNamespace(Unpickler=_Tensors, load=pickle.load, __name__="tensors")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=pickles)
    except Exception as error:
        raise failed(path, error) from None


def saved_arguments(path: Path) -> dict[str, Any]:
    """The arguments that a file of a Megatron checkpoint holds."""
    return vars(_content(path)["args"])


def torch_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a rank's file, mapped into memory: `model.NAME` (`model0.NAME`, ..), norms under their names."""
    found: dict[str, torch.Tensor] = {}
    for key, model in _content(path).items():
        if isinstance(key, str) and key.startswith("model") and isinstance(model, dict):
            for name, tensor in model.items():
                for fused, own in NORMS.items():
                    name = name.removesuffix(fused) + own if name.endswith(fused) else name
                if isinstance(tensor, torch.Tensor) and not name.endswith("_extra_state"):
                    found[f"{key}.{name}"] = tensor
    return found
