"""A training's state in the torch format: files of each model rank, read back in any layout.

<root>/iter_0000010/mp_rank_.../model_optim_rng.pt   weights, args, schedule, random state
                               /optimizer.pt         float32 weights and moments, of the parameters' shapes
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3_npu.checkpoint.binary.torch_zip_read import PtArchive, PtFile
from qwen3_npu.checkpoint.formats.torch_read import WEIGHTS, MegatronReader, ShardedTensors
from qwen3_npu.checkpoint.mapping.lora import Contents
from qwen3_npu.checkpoint.mapping.source import Source
from qwen3_npu.checkpoint.training import optimizer_state
from qwen3_npu.checkpoint.training.live import Snapshot, write_content
from qwen3_npu.distributed.layout import Rank

OPTIMIZER = "optimizer.pt"


def write(snapshot: Snapshot, stage: Path) -> tuple[list[str], Any]:
    """Make the files of one model rank; their names."""
    folder = snapshot.layout.folder(snapshot.rank)
    (stage / folder).mkdir()
    virtual = snapshot.layout.virtual
    keys = ["model"] if virtual == 1 else [f"model{chunk}" for chunk in range(virtual)]
    content: dict[str, Any] = snapshot.common | {key: {} for key in keys}
    for (chunk, name), tensor in snapshot.parameters.items():
        content[keys[chunk]][name] = tensor
    if snapshot.random is not None:
        content["rng_state"] = snapshot.random
    write_content(stage / folder / WEIGHTS, content)
    names = [f"{folder}/{WEIGHTS}"]
    if snapshot.optimizer is not None:
        state: dict[str, dict[int, dict[str, Any]]] = {key: {} for key in optimizer_state.KEYS}
        for (chunk, name), tensors in snapshot.optimizer.items():
            for key, tensor in tensors.items():
                state[key].setdefault(chunk, {})[name] = tensor
        write_content(stage / folder / OPTIMIZER, {"step": snapshot.step, "state": state})
        names.append(f"{folder}/{OPTIMIZER}")
    return names, None


def finish(snapshot: Snapshot, stage: Path, notes: list[Any]) -> list[str]:
    """Files that belong to all ranks: none."""
    return []


class TorchState:
    """What a checkpoint holds of a training; `dist_files.DistState` answers the same for the other format."""

    def __init__(self, reader: MegatronReader) -> None:
        self.weights = reader
        self.folder, self.layout = reader.folder, reader.layout
        self.common: dict[str, Any] = reader.open(next(reader.layout.ranks())).content
        self._opened: list[ShardedTensors | PtFile] = []

    @property
    def has_optimizer(self) -> bool:
        return self._first.is_file()

    @property
    def _first(self) -> Path:
        return self.folder / self.layout.folder(next(self.layout.ranks())) / OPTIMIZER

    @property
    def step(self) -> int:
        """Updates made."""
        file = PtFile(self._first)
        file.close()
        return file.content["step"]

    def optimizer(self, key: str, contents: Contents, rank: Rank) -> Source:
        """One of `optimizer_state.KEYS` of every trained parameter."""

        def models(content: dict[str, Any], chunk: int, chunks: int) -> dict[str, Any]:
            return content["state"][key].get(chunk, {})

        opened = ShardedTensors(
            self.folder, OPTIMIZER, contents.arch, self.layout, models, prefer=rank, table=contents.shards
        )
        self._opened.append(opened)
        return opened  # type: ignore[return-value]

    def random(self, rank: Rank) -> tuple[dict[str, Any], PtArchive] | None:
        """States of the random generators of one rank, and the archive that their tensors are in."""
        file = self.weights.open(rank)
        return (file.content["rng_state"], file) if "rng_state" in file.content else None

    def close(self) -> None:
        for opened in (self.weights, *self._opened):
            opened.close()
