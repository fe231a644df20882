"""Megatron checkpoints in the torch format, read by regions of the Hugging Face tensors they hold. No torch.

<root>/latest_checkpointed_iteration.txt
<root>/iter_0000001/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt    {'args', 'model' or 'model0'.., 'iteration', ...}
<root>/config.json and tokenizer files                           carried along (ours; others' checkpoints lack them)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen3_npu.checkpoint.cuts import Piece, Region
from qwen3_npu.checkpoint.mg_args import arch_from_args, layout_from_args
from qwen3_npu.checkpoint.pt_reader import PtFile, TensorRef
from qwen3_npu.checkpoint.tensors import DType, sizes, slices
from qwen3_npu.checkpoint.weights import EMBEDDING, Shard, hf_shapes, shards
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch, from_hf_config, read_hf_config

TRACKER, WEIGHTS = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
# Entries of a model's state dict that are not weights.
_NOT_WEIGHTS = ("_extra_state", "inv_freq")


def iteration_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def read_tracker(root: Path) -> str | None:
    """What the tracker file says: an iteration, "release", or None if there is no such file."""
    try:
        return (root / TRACKER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def checkpoint_folder(root: str | Path, iteration: int | None = None) -> Path:
    """The `iter_*` (or `release`) folder to load.

    Args:
        root: the checkpoint's folder, or an `iter_*` folder itself.
        iteration: which one; the tracker's if None.

    Raises:
        UsageError: nothing to load there.
    """
    root = Path(root)
    if root.name.startswith("iter_") and any(root.glob("mp_rank_*")):
        return root
    if iteration is not None:
        name = iteration_name(iteration)
    else:
        tracked = read_tracker(root)
        if tracked is None:
            raise UsageError(f"{root} is not a Megatron checkpoint: it has no {TRACKER}")
        if tracked != "release" and not tracked.isdigit():
            raise UsageError(f"{root / TRACKER} says {tracked!r}; an iteration number or 'release' is expected")
        name = "release" if tracked == "release" else iteration_name(int(tracked))
    if not (root / name).is_dir():
        there = ", ".join(sorted(p.name for p in root.glob("iter_*"))) or "none"
        raise UsageError(f"{root / name} does not exist; iterations there: {there}")
    return root / name


class _Place(NamedTuple):
    """Where a piece of a Hugging Face tensor lies."""

    piece: Piece
    shard: Shard
    rank: Rank


Models = Callable[[dict[str, Any], int, int], dict[str, Any]]


def weights_of(content: dict[str, Any], chunk: int, chunks: int) -> dict[str, Any]:
    """The state dict of one of `chunks` virtual pipeline chunks."""
    return content["model" if chunks == 1 else f"model{chunk}"]


class ShardedTensors:
    """Tensors of a known layout in one file per rank, read as regions of Hugging Face tensors. Files open on demand.

    Args:
        models: content of a file, chunk, number of chunks -> the dict of tensors in it.
        prefer: a rank whose file is tried first for what several ranks hold.
    """

    def __init__(
        self,
        folder: Path,
        file: str,
        arch: Qwen3Arch,
        layout: Layout,
        models: Models = weights_of,
        prefer: Rank | None = None,
    ) -> None:
        self.folder, self.file, self.arch, self.layout, self.models = folder, file, arch, layout, models
        ranks = sorted(layout.ranks(), key=lambda rank: rank != prefer)  # stable: the preferred one first
        self.opened: dict[Rank, PtFile] = {}
        self.places: dict[str, dict[Region, list[_Place]]] = {name: {} for name in hf_shapes(arch)}
        for rank in ranks:
            for shard in shards(arch, layout, rank):
                for piece in shard.pieces:
                    if not piece.padding:
                        self.places[piece.hf].setdefault(piece.source, []).append(_Place(piece, shard, rank))

    def open(self, rank: Rank) -> PtFile:
        """One rank's file, opened once."""
        if rank not in self.opened:
            path = self.folder / self.layout.folder(rank) / self.file
            if not path.is_file():
                raise UsageError(f"{path} does not exist; the checkpoint's args say {self.layout}")
            self.opened[rank] = PtFile(path)
        return self.opened[rank]

    def _tensor(self, place: _Place) -> TensorRef | None:
        content = self.open(place.rank).content
        return self.models(content, place.shard.chunk, self.layout.virtual).get(place.shard.name)

    def _holder(self, name: str, source: Region) -> tuple[_Place, TensorRef]:
        """The first rank that has this piece: replicas are the same, and of some only one rank writes its copy."""
        for place in self.places[name][source]:
            tensor = self._tensor(place)
            if tensor is not None:
                if tensor.shape != place.shard.shape:
                    raise UsageError(
                        f"{self.open(place.rank).path}: {place.shard.name} has shape {tensor.shape}; "
                        f"{place.shard.shape} expected for layout {self.layout}"
                    )
                return place, tensor
        raise UsageError(f"{self.folder}: no file holds {name}")

    def dtype(self, name: str) -> DType:
        place, tensor = self._holder(name, next(iter(self.places[name])))
        if tensor.dtype is None:
            raise UsageError(f"{self.open(place.rank).path}: {place.shard.name} is not float32, float16 or bfloat16")
        return tensor.dtype

    def read(self, name: str, region: Region) -> np.ndarray:
        """A part of one Hugging Face tensor, put together from the shards that hold it."""
        out = np.empty(sizes(region), self.dtype(name).carrier)
        for source in self.places[name]:
            common = _intersect(region, source)
            if common is not None:
                inside = tuple((a - o, b - o) for (a, b), (o, _) in zip(common, region, strict=True))
                out[slices(inside)] = self._read_piece(*self._holder(name, source), common)
        return out

    def _read_piece(self, place: _Place, tensor: TensorRef, wanted: Region) -> np.ndarray:
        piece = place.piece
        offsets = [(a - o, b - o) for (a, b), (o, _) in zip(wanted, piece.source, strict=True)]
        if piece.transposed:
            offsets.reverse()
        lead = len(piece.target) - len(offsets)
        target = piece.target[:lead] + tuple(
            (o + a, o + b) for (a, b), (o, _) in zip(offsets, piece.target[lead:], strict=True)
        )
        data = self.open(place.rank).read(tensor, place.shard.view, target)
        data = data.reshape(data.shape[lead:])
        return data.T if piece.transposed else data

    def close(self) -> None:
        for file in self.opened.values():
            file.close()


class MegatronReader(ShardedTensors):
    """The weights of a Megatron checkpoint (one side of conversions; see `source.py`)."""

    def __init__(
        self,
        root: str | Path,
        iteration: int | None = None,
        hf_config: str | Path | None = None,
        prefer: Rank | None = None,
    ) -> None:
        """Find out architecture and layout.

        Args:
            hf_config: folder of the config.json that says the architecture; by default the one in the checkpoint, or
                the arguments saved with the weights.

        Raises:
            UsageError: not a checkpoint, or it does not say what it is.
        """
        folder = checkpoint_folder(root, iteration)
        first = _first_file(folder)
        self.args: argparse.Namespace = first.content.get("args", argparse.Namespace())
        config = Path(hf_config or root)
        if hf_config or (config / "config.json").is_file():
            arch = from_hf_config(read_hf_config(config), str(config / "config.json"))
        else:
            arch = arch_from_args(self.args, str(folder))
        layout = _layout(first, self.args, arch)
        first.close()
        super().__init__(folder, WEIGHTS, arch, layout, prefer=prefer)

    def check(self) -> None:
        """Open every file and check names and shapes of all tensors.

        Raises:
            UsageError: a file or tensor is missing, damaged, of another shape, or not expected.
        """
        for rank in self.layout.ranks():
            _check(self.open(rank), list(shards(self.arch, self.layout, rank)), self.layout)


def checkpoint_args(root: str | Path, iteration: int | None = None) -> tuple[argparse.Namespace, str]:
    """The arguments saved in a checkpoint, and the file they are in."""
    first = _first_file(checkpoint_folder(root, iteration))
    first.close()
    return first.content.get("args", argparse.Namespace()), str(first.path)


def _first_file(folder: Path) -> PtFile:
    paths = sorted(folder.glob(f"mp_rank_*/{WEIGHTS}"))
    if not paths:
        raise UsageError(f"{folder} holds no mp_rank_*/{WEIGHTS}")
    file = PtFile(paths[0])
    if not isinstance(file.content, dict) or not any(k in file.content for k in ("model", "model0")):
        raise UsageError(f"{paths[0]} has no 'model'; it is not a Megatron checkpoint")
    return file


def _layout(first: PtFile, args: argparse.Namespace, arch: Qwen3Arch) -> Layout:
    virtual = max(1, sum(1 for key in first.content if key.startswith("model") and key[5:].isdigit()))
    tensors = {name: t for chunk in range(virtual) for name, t in weights_of(first.content, chunk, virtual).items()}
    embedding = tensors.get(EMBEDDING.megatron)
    if embedding is None:
        raise UsageError(f"{first.path} has no word embedding; it is not the first pipeline stage of a GPT model")
    return layout_from_args(
        args,
        arch,
        padded_vocab_size=embedding.shape[0] * getattr(args, "tensor_model_parallel_size", 1),
        virtual=virtual,
        stacked_experts=not any("local_experts" in name for name in tensors),
    )


def _intersect(a: Region, b: Region) -> Region | None:
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _check(file: PtFile, expected: list[Shard], layout: Layout) -> None:
    """Every tensor that the layout puts on this rank is there, of its shape, and no other."""
    for chunk in range(layout.virtual):
        wanted = {shard.name: shard for shard in expected if shard.chunk == chunk}
        found = weights_of(file.content, chunk, layout.virtual)
        found = {name: value for name, value in found.items() if not name.endswith(_NOT_WEIGHTS)}
        for what, names in (("missing", wanted.keys() - found.keys()), ("not expected", found.keys() - wanted.keys())):
            if names:
                listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise UsageError(f"{file.path}: tensors {what} for layout {layout}: {listed}")
        for name, shard in wanted.items():
            if not isinstance(found[name], TensorRef) or found[name].shape != shard.shape:
                shape = getattr(found[name], "shape", "no tensor")
                raise UsageError(f"{file.path}: {name} has shape {shape}; {shard.shape} expected for layout {layout}")
