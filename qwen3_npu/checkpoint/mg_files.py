"""Megatron checkpoints in the torch format, read by regions of the Hugging Face tensors they hold. No torch.

<root>/latest_checkpointed_iteration.txt
<root>/iter_0000001/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt    {'args', 'model' or 'model0'.., 'iteration', ...}
<root>/config.json and tokenizer files                           carried along (ours; others' checkpoints lack them)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen3_npu.checkpoint.cuts import Piece, Region
from qwen3_npu.checkpoint.mg_args import arch_from_args, layout_from_args
from qwen3_npu.checkpoint.pt_reader import PtFile, TensorRef
from qwen3_npu.checkpoint.tensors import DType, sizes, slices
from qwen3_npu.checkpoint.weights import Shard, hf_shapes, shards
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


class MegatronReader:
    """The Hugging Face tensors that a Megatron checkpoint holds (one side of conversions; see `source.py`)."""

    def __init__(self, root: str | Path, iteration: int | None = None, hf_config: str | Path | None = None) -> None:
        """Open every rank's file and check that the tensors of its layout are there.

        Args:
            hf_config: folder of the config.json that says the architecture; by default the one in the checkpoint, or
                the arguments saved with the weights.

        Raises:
            UsageError: a file, folder or tensor is missing, damaged or of another shape.
        """
        self.root = Path(root)
        self.folder = checkpoint_folder(root, iteration)
        first = self._first_file()
        self.args: argparse.Namespace = first.content.get("args", argparse.Namespace())
        self.arch = self._architecture(hf_config)
        self.layout = self._layout(first)
        first.close()
        self.shapes = hf_shapes(self.arch)
        self.files = {rank: PtFile(self._path(rank)) for rank in self.layout.ranks()}
        self.places: dict[str, list[_Place]] = {name: [] for name in self.shapes}
        seen: set[tuple[str, Region]] = set()
        for rank, file in self.files.items():
            expected = list(shards(self.arch, self.layout, rank))
            _check(file, expected, self.layout)
            for shard in expected:
                for piece in shard.pieces:
                    # Replicated tensors are read from the first rank that has them.
                    if not piece.padding and (piece.hf, piece.source) not in seen:
                        seen.add((piece.hf, piece.source))
                        self.places[piece.hf].append(_Place(piece, shard, rank))

    def _first_file(self) -> PtFile:
        paths = sorted(self.folder.glob(f"mp_rank_*/{WEIGHTS}"))
        if not paths:
            raise UsageError(f"{self.folder} holds no mp_rank_*/{WEIGHTS}")
        file = PtFile(paths[0])
        if not isinstance(file.content, dict) or not any(k in file.content for k in ("model", "model0")):
            raise UsageError(f"{paths[0]} has no 'model'; it is not a Megatron checkpoint")
        return file

    def _architecture(self, hf_config: str | Path | None) -> Qwen3Arch:
        folder = Path(hf_config) if hf_config else self.root
        if hf_config or (folder / "config.json").is_file():
            return from_hf_config(read_hf_config(folder), str(folder / "config.json"))
        return arch_from_args(self.args, str(self.folder))

    def _layout(self, first: PtFile) -> Layout:
        virtual = sum(1 for key in first.content if key.startswith("model") and key[5:].isdigit())
        names = [name for key in _model_keys(first.content) for name in first.content[key]]
        embedding = next(
            (
                first.content[k][n]
                for k in _model_keys(first.content)
                for n in first.content[k]
                if "word_embeddings" in n
            ),
            None,
        )
        if embedding is None:
            raise UsageError(f"{first.path} has no word embedding; it is not the first pipeline stage of a GPT model")
        tensor = getattr(self.args, "tensor_model_parallel_size", 1)
        return layout_from_args(
            self.args,
            self.arch,
            padded_vocab_size=embedding.shape[0] * tensor,
            virtual=max(virtual, 1),
            stacked_experts=not any("local_experts" in name for name in names),
        )

    def _path(self, rank: Rank) -> Path:
        path = self.folder / self.layout.folder(rank) / WEIGHTS
        if not path.is_file():
            raise UsageError(f"{path} does not exist; the checkpoint's args say {self.layout}")
        return path

    def dtype(self, name: str) -> DType:
        place = self.places[name][0]
        return self._tensor(place).dtype

    def _tensor(self, place: _Place) -> TensorRef:
        return model_dict(self.files[place.rank].content, place.shard.chunk, self.layout)[place.shard.name]

    def read(self, name: str, region: Region) -> np.ndarray:
        """A part of one Hugging Face tensor, put together from the shards that hold it."""
        out = np.empty(sizes(region), self.dtype(name).carrier)
        for place in self.places[name]:
            common = _intersect(region, place.piece.source)
            if common is not None:
                inside = tuple((a - o, b - o) for (a, b), (o, _) in zip(common, region, strict=True))
                out[slices(inside)] = self._read_piece(place, common)
        return out

    def _read_piece(self, place: _Place, wanted: Region) -> np.ndarray:
        piece = place.piece
        offsets = [(a - o, b - o) for (a, b), (o, _) in zip(wanted, piece.source, strict=True)]
        if piece.transposed:
            offsets.reverse()
        lead = len(piece.target) - len(offsets)
        target = piece.target[:lead] + tuple(
            (o + a, o + b) for (a, b), (o, _) in zip(offsets, piece.target[lead:], strict=True)
        )
        data = self.files[place.rank].read(self._tensor(place), place.shard.view, target)
        data = data.reshape(data.shape[lead:])
        return data.T if piece.transposed else data

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _model_keys(content: dict[str, Any]) -> list[str]:
    return [key for key in content if key == "model" or (key.startswith("model") and key[5:].isdigit())]


def model_dict(content: dict[str, Any], chunk: int, layout: Layout) -> dict[str, Any]:
    """The state dict of one virtual chunk."""
    return content["model" if layout.virtual == 1 else f"model{chunk}"]


def _intersect(a: Region, b: Region) -> Region | None:
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _check(file: PtFile, expected: list[Shard], layout: Layout) -> None:
    """Every tensor that the layout puts on this rank is there, of its shape, and no other."""
    for chunk in range(layout.virtual):
        wanted = {shard.name: shard for shard in expected if shard.chunk == chunk}
        found = model_dict(file.content, chunk, layout)
        found = {name: value for name, value in found.items() if not name.endswith(_NOT_WEIGHTS)}
        for what, names in (("missing", wanted.keys() - found.keys()), ("not expected", found.keys() - wanted.keys())):
            if names:
                listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise UsageError(f"{file.path}: tensors {what} for layout {layout}: {listed}")
        for name, shard in wanted.items():
            if not isinstance(found[name], TensorRef) or found[name].shape != shard.shape:
                shape = getattr(found[name], "shape", "no tensor")
                raise UsageError(f"{file.path}: {name} has shape {shape}; {shard.shape} expected for layout {layout}")
