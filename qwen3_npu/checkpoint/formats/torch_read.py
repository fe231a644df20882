"""Megatron checkpoints in the torch format, read by regions of the Hugging Face tensors they hold. No torch.

<root>/latest_checkpointed_iteration.txt
<root>/iter_0000001/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt    {'args', 'model' or 'model0'.., 'iteration', ...}
<root>/config.json and tokenizer files                           carried along (ours; others' checkpoints lack them)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, Region
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile, TensorRef
from qwen3_npu.checkpoint.folders import COMMON, TORCH, TORCH_DIST, StoredModel
from qwen3_npu.checkpoint.formats.dist_keys import FUSED_NORMS
from qwen3_npu.checkpoint.formats.megatron_args import (
    OWN_FLAGS,
    arch_from_args,
    layout_from_args,
    lora_from_args,
    own_dtypes,
)
from qwen3_npu.checkpoint.mapping.source import Contents, ShardReader, SliceLocation, check_tensors, is_lora, listed
from qwen3_npu.checkpoint.mapping.table import EMBEDDING, Shard, shards
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch, from_hf_config, read_hf_config
from qwen3_npu.model.arch.megatron import check_trained
from qwen3_npu.numbers import is_count, number_list
from qwen3_npu.schema import integer

# Sizes of the layout in the args, and the least that they can be; 0 experts' ranks: not said.
_SIZES = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 0}
_SIZES |= {"expert_tensor_parallel_size": 0, "virtual_pipeline_model_parallel_size": 0, "padded_vocab_size": 0}
_MOST_RANKS = 2**24
WEIGHTS, OPTIMIZER = "model_optim_rng.pt", "optimizer.pt"
# Entries of a model's state dict that are not weights.
_NOT_WEIGHTS = ("_extra_state", "inv_freq")

Models = Callable[[dict[str, Any], int, int], dict[str, Any]]
Table = Callable[[Layout, Rank], Iterator[Shard]]


def weights_of(content: dict[str, Any], chunk: int, chunks: int) -> dict[str, Any]:
    """The state dict of one of `chunks` virtual pipeline chunks. Raises: UsageError: it is not there."""
    name = "model" if chunks == 1 else f"model{chunk}"
    if name not in content:
        there = ", ".join(key for key in content if key.startswith("model")) or "no model"
        raise UsageError(f"a {WEIGHTS} holds {there}, and its arguments mean {name}; save it again with both alike")
    return content[name]


class ShardedTensors(ShardReader[Rank]):
    """Tensors of a known layout in one file per rank, read as regions of Hugging Face tensors. Files open on demand.

    Args:
        models: content of a file, chunk, number of chunks -> the dict of tensors in it.
        prefer: a rank whose file is tried first for what several ranks hold.
        table: the tensors of a rank; by default a model's weights.
    """

    def __init__(
        self,
        folder: Path,
        file: str,
        arch: Qwen3Arch,
        layout: Layout,
        *,
        models: Models = weights_of,
        prefer: Rank | None = None,
        table: Table | None = None,
    ) -> None:
        self.folder, self.file, self.arch, self.layout, self.models = folder, file, arch, layout, models
        self.table: Table = table or (lambda layout, rank: shards(arch, layout, rank))
        self.opened: dict[Rank, PtFile] = {}
        ranks = sorted(layout.ranks(), key=lambda rank: rank != prefer)  # stable: the preferred one first
        super().__init__(((rank, shard) for rank in ranks for shard in self.table(layout, rank)), str(folder))

    def open(self, rank: Rank) -> PtFile:
        """One rank's file, opened once."""
        if rank not in self.opened:
            path = self.folder / self.layout.folder(rank) / self.file
            if not path.is_file():
                raise UsageError(f"{path} does not exist; the checkpoint's args say {self.layout}")
            self.opened[rank] = open_file(path)
        return self.opened[rank]

    def find(self, holder: SliceLocation) -> TensorRef | None:
        file = self.open(holder.where)
        tensor = self.models(file.content, holder.shard.chunk, self.layout.virtual).get(holder.shard.name)
        if tensor is not None and not isinstance(tensor, TensorRef):
            raise UsageError(f"{file.path}: {holder.shard.name} is no tensor")
        if tensor is not None and tensor.shape != holder.shard.shape:
            raise UsageError(
                f"{file.path}: {holder.shard.name} has shape {tensor.shape}; {holder.shard.shape} expected for layout "
                f"{self.layout}"
            )
        return tensor

    def stored_dtype(self, holder: SliceLocation, tensor: TensorRef) -> DType:
        if tensor.dtype is None:
            path = self.open(holder.where).path
            raise UsageError(f"{path}: {holder.shard.name} is not float32, float16 or bfloat16")
        return tensor.dtype

    def read_stored(self, holder: SliceLocation, tensor: TensorRef, region: Region) -> np.ndarray:
        return self.open(holder.where).read(tensor, holder.shard.view, region)

    def close(self) -> None:
        for file in self.opened.values():
            file.close()


class MegatronReader(ShardedTensors):
    """What a Megatron checkpoint in the torch format holds (one side of conversions; see `source.py`).

    Attributes:
        contents: which tensors: a model's, an adapter's, or both.
    """

    format = TORCH

    def __init__(
        self,
        found: StoredModel,
        hf_config: str | Path | None = None,
        prefer: Rank | None = None,
        lora_alpha: float | None = None,
        *,
        ignored: Collection[str] = (),
    ) -> None:
        """Read architecture, layout and contents.

        Args:
            hf_config: folder of the config.json that says the architecture; by default the one in the checkpoint, or
                the arguments saved with the weights.
            lora_alpha: of an adapter whose checkpoint does not say it.
            ignored: arguments saved with the weights that are ignored (--ignore-args).

        Raises:
            UsageError: it is no checkpoint, or does not say which model it holds.
        """
        folder = found.folder
        first = _first_file(folder)
        self.args = saved_args(first, ignored)
        arch = architecture(found.home, hf_config, self.args)
        virtual = max(
            1, sum(1 for k in first.content if isinstance(k, str) and k.startswith("model") and is_count(k[5:]))
        )
        tensors = _tensors(first, range(virtual), virtual) | _first_layers(folder, virtual)
        lora = lora_from_args(self.args, tensors, lora_alpha, str(folder))
        self.contents = Contents(arch, base=not all(map(is_lora, tensors)), lora=lora)
        layout = _layout(tensors, self.args, self.contents, virtual, path=first.path)
        first.close()
        super().__init__(folder, WEIGHTS, arch, layout, prefer=prefer, table=self.contents.shards)
        self.own = own_dtypes(self.args, self.contents.shapes(), str(folder))

    def check(self) -> None:
        """Open every file and check names and shapes of all tensors.

        Raises:
            UsageError: a file or tensor is missing, damaged, of another shape, or not expected.
        """
        for rank in self.layout.ranks():
            file, expected = self.open(rank), list(self.table(self.layout, rank))
            for chunk in range(self.layout.virtual):
                wanted = {shard.name: shard.shape for shard in expected if shard.chunk == chunk}
                found = _tensors(file, [chunk], self.layout.virtual)
                check_tensors(found, wanted, str(file.path), f"layout {self.layout}")

    def saved_layout(self) -> Layout:
        """The layout in which it was saved."""
        return self.layout

    def __str__(self) -> str:
        return f"torch, {self.layout}, {self.contents}"


def architecture(root: Path, hf_config: str | Path | None, args: argparse.Namespace) -> Qwen3Arch:
    """The model's architecture: from config.json, else from the checkpoint's arguments."""
    config = Path(hf_config or root)
    if hf_config or (config / "config.json").exists():
        arch = from_hf_config(read_hf_config(config), str(config / "config.json"))
        check_trained(vars(args), arch, str(root), OWN_FLAGS)
        return arch
    return arch_from_args(args, str(root))


def saved_args(file: PtFile, ignored: Collection[str] = ()) -> argparse.Namespace:
    """The arguments in a file, without the names in `ignored`.

    Raises:
        UsageError: it is not a Megatron checkpoint's.
    """
    content = _content(file)
    said, found = vars(content.get("args") or argparse.Namespace()), argparse.Namespace()
    vars(found).update({name: value for name, value in said.items() if name not in ignored})
    for name, least in _SIZES.items():
        if (value := vars(found).pop(name, None)) is not None:  # what is None is not said
            vars(found)[name] = integer(value, f"{file.path}: {name}", least=least, most=_MOST_RANKS)
    for name in ("noop_layers", "num_layer_list"):
        number_list(getattr(found, name, None))
    return found


def checkpoint_args(found: StoredModel) -> tuple[argparse.Namespace, str]:
    """The arguments saved in a checkpoint of either format, and the file they are in."""
    first = PtFile(found.folder / COMMON) if found.format == TORCH_DIST else _first_file(found.folder)
    first.close()
    return saved_args(first), str(first.path)


def _content(file: PtFile) -> dict[str, Any]:
    content = file.content
    if not isinstance(content, dict) or not isinstance(content.get("args") or argparse.Namespace(), argparse.Namespace):
        raise UsageError(f"{file.path} is no dict with args; it is not a Megatron checkpoint")
    return content


def open_file(path: Path) -> PtFile:
    """Open a rank's file, check the parts that every file has, and rename its weights to this project's names.

    Raises:
        UsageError: it is not a Megatron checkpoint's.
    """
    file = PtFile(path)
    content = _content(file)
    numbered = sorted(k for k in content if isinstance(k, str) and k.startswith("model") and is_count(k[5:]))
    if len(numbered) != len({f"model{i}" for i in range(len(numbered))} & set(numbered)):
        raise UsageError(f"{path} has {listed(numbered)}; model0, model1, ... are expected")
    if numbered and "model" in content:
        raise UsageError(f"{path} has model and {listed(numbered)}: one model or several chunks are expected")
    for key in ("model", *numbered):
        model = content.get(key, {})
        if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
            raise UsageError(f"{path}: {key} is no dict of tensors; it is not a Megatron checkpoint")
        for name in [name for name in model if name.endswith("layer_norm_weight")]:
            for ours, theirs in FUSED_NORMS.items():
                if name.endswith(theirs):
                    own = name.removesuffix(theirs) + ours
                    if own in model:
                        raise UsageError(f"{path}: {listed([own, name])} are one norm under two names; remove one")
                    model[own] = model.pop(name)
    return file


def _first_file(folder: Path) -> PtFile:
    paths = sorted(folder.glob(f"mp_rank_*/{WEIGHTS}"))
    if not paths:
        raise UsageError(f"{folder} holds no mp_rank_*/{WEIGHTS}")
    file = open_file(paths[0])
    if not any(k in file.content for k in ("model", "model0")):
        raise UsageError(f"{paths[0]} has no 'model'; it is not a Megatron checkpoint")
    return file


def _first_layers(folder: Path, virtual: int) -> dict[str, Any]:
    """Name -> shape of the tensors in the first file that has layers; a stage may consist of no-op layers."""
    for path in sorted(folder.glob(f"mp_rank_*/{WEIGHTS}")):
        file = open_file(path)
        file.close()
        tensors = _tensors(file, range(virtual), virtual)
        if any("layers." in name for name in tensors):
            return tensors
    return {}


def _tensors(file: PtFile, chunks: Iterable[int], virtual: int) -> dict[str, Any]:
    """Name -> shape of the tensors in some chunks of a file (None for an object that is no tensor)."""
    return {
        name: getattr(value, "shape", None)
        for chunk in chunks
        for name, value in weights_of(file.content, chunk, virtual).items()
        if not name.endswith(_NOT_WEIGHTS)
    }


def _layout(
    tensors: dict[str, Any], args: argparse.Namespace, contents: Contents, virtual: int, *, path: Path
) -> Layout:
    arch, tensor_parallel = contents.arch, getattr(args, "tensor_model_parallel_size", 1)
    padded = getattr(args, "padded_vocab_size", None) or arch.vocab_size
    if contents.base:
        beside = EMBEDDING.megatron.replace(".weight", ".base_layer.weight")  # where it has an adapter
        embedding = tensors.get(EMBEDDING.megatron, tensors.get(beside))
        if embedding is None:
            raise UsageError(f"{path} has no word embedding; it is not the first pipeline stage of a GPT model")
        padded = embedding[0] * tensor_parallel
    return layout_from_args(
        args,
        arch,
        padded_vocab_size=padded,
        virtual=virtual,
        stacked_experts=not any("local_experts" in name for name in tensors),
        expert_tensor=_expert_tensor(tensors, args, arch),
    )


def _expert_tensor(tensors: dict[str, Any], args: argparse.Namespace, arch: Qwen3Arch) -> int | None:
    """Over how many ranks an expert is sharded, by the shape of a tensor that has the experts' width on one side."""
    width = arch.moe_intermediate_size
    stacked = width * (arch.num_experts // (getattr(args, "expert_model_parallel_size", None) or 1))
    sides = {
        "mlp.experts.weight2": (0, stacked),
        "mlp.experts.weight2_lora_a": (0, stacked),
        "mlp.experts.weight1_lora_b": (1, 2 * stacked),
        "linear_fc2.weight": (1, width),
        "linear_fc2.base_layer.weight": (1, width),
        "linear_fc2.lora_A.default.weight": (1, width),
        "linear_fc1.lora_B.default.weight": (0, 2 * width),
    }
    for name, shape in tensors.items():
        for ending, (axis, size) in sides.items():
            if ".experts." in name and name.endswith(ending) and shape[axis]:
                return size // shape[axis]
    return None
