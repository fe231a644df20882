"""Read the state of a training beside the weights from a checkpoint, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3_npu.checkpoint.binary.torch_zip_read import PtArchive, PtFile
from qwen3_npu.checkpoint.formats.dist_keys import random_key, state_prefix
from qwen3_npu.checkpoint.formats.dist_read import DistReader
from qwen3_npu.checkpoint.formats.torch_read import OPTIMIZER, MegatronReader, ShardedTensors
from qwen3_npu.checkpoint.mapping.source import Contents, Source
from qwen3_npu.distributed.layout import Rank


class TorchState:
    """The training state in a checkpoint in the torch format; `DistState` has the same methods for torch_dist."""

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
        """Optimizer steps made."""
        file = PtFile(self._first)
        file.close()
        return file.content["step"]

    def optimizer(self, key: str, contents: Contents, rank: Rank) -> Source:
        """One of `optimizer_state.KEYS` of every trained parameter."""

        def models(content: dict[str, Any], chunk: int, chunks: int) -> dict[str, Any]:
            return content["state"][key].get(chunk, {})

        opened = ShardedTensors(
            self.folder, OPTIMIZER, contents.arch, self.layout, models=models, prefer=rank, table=contents.shards
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


class DistState:
    """The training state in a checkpoint in the torch_dist format; see `TorchState`."""

    def __init__(self, reader: DistReader) -> None:
        self.weights = reader
        self.folder, self.layout, self.common = reader.folder, reader.saved_layout(), reader.common

    @property
    def has_optimizer(self) -> bool:
        return "optimizer_step" in self.common and any(
            k.startswith(state_prefix("param")) for k in self.weights.everything
        )

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.common["optimizer_step"]

    def optimizer(self, key: str, contents: Contents, rank: Rank) -> Source:
        """One of `optimizer_state.KEYS` of every trained parameter."""
        return self.weights.under(state_prefix(key))

    def random(self, rank: Rank) -> tuple[dict[str, Any], PtArchive] | None:
        """States of the random generators of one rank, and the archive that their tensors are in."""
        key = random_key(self.layout, rank)
        if key not in self.weights.objects:
            return None
        archive = self.weights.object(key)
        return archive.content, archive

    def close(self) -> None:
        self.weights.close()
