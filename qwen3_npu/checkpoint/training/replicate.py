"""--save-per-node: every node's disk gets the complete checkpoint, so it can be read as usual, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from qwen3_npu.distributed import environment

_CHUNK = 16 << 20  # bytes sent at once
_PARTS = "integrity."  # a rank's files are announced by the one that begins so


class NodeDisks:
    """The first rank of each node, which keeps that node's copy. Every rank must make one, and call every method.

    Attributes:
        is_first: of its node.
    """

    def __init__(self) -> None:
        self.nodes: list[int] = [0] * dist.get_world_size()  # of each rank
        dist.all_gather_object(self.nodes, environment.node())
        self.firsts = [self.nodes.index(node) for node in dict.fromkeys(self.nodes)]
        self.is_first = dist.get_rank() in self.firsts
        self.group = dist.new_group(self.firsts, backend="gloo")

    def beside(self, ranks: Sequence[int]) -> list[int]:
        """The given ranks that are on this rank's node."""
        return [rank for rank in ranks if self.nodes[rank] == self.nodes[dist.get_rank()]]

    def replicate(self, stage: Path, *, is_whole: bool) -> None:
        """Send the files in this node's staging folder to the other nodes, and receive theirs, in a separate group.

        Args:
            is_whole: all ranks of this node have written; else no node sends anything.

        Raises:
            OSError: after the exchange, if any node could not read or write a file.
        """
        if not self.is_first:
            return
        mine = sorted(path for path in stage.rglob("*") if path.is_file())
        mine.sort(key=lambda path: path.name.startswith(_PARTS))
        named = [(str(path.relative_to(stage)), path.stat().st_size) for path in mine] if is_whole else None
        everyones: list[list[tuple[str, int]] | None] = [None for _ in self.firsts]
        dist.all_gather_object(everyones, named, group=self.group)
        missing = [first for first, files in zip(self.firsts, everyones, strict=True) if files is None]
        if missing:
            raise OSError(f"the node of rank {missing[0]} has not written its files")
        problem = None
        for first, files in zip(self.firsts, everyones, strict=True):
            for name, size in files or ():
                try:
                    self._send(stage / name, size, first)
                except OSError as error:
                    problem = problem or str(error)
        problems: list[str | None] = [None for _ in self.firsts]
        dist.all_gather_object(problems, problem, group=self.group)
        for first, said in zip(self.firsts, problems, strict=True):
            if said is not None:
                raise OSError(f"on the node of rank {first}: {said}")

    def _send(self, path: Path, size: int, first: int) -> None:
        """Send one file in chunks. After an error the chunks continue, so that no node waits for ever."""
        is_mine, problem = first == dist.get_rank(), None
        file = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "rb" if is_mine else "wb")
        except OSError as error:
            problem = error
        for start in range(0, size, _CHUNK):
            chunk = torch.zeros(min(_CHUNK, size - start), dtype=torch.uint8)
            if is_mine and file is not None and problem is None:
                held = np.frombuffer(file.read(len(chunk)), np.uint8)
                chunk[: len(held)] = torch.from_numpy(held.copy())
            dist.broadcast(chunk, first, group=self.group)
            if not is_mine and file is not None and problem is None:
                try:
                    file.write(chunk.numpy().tobytes())
                except OSError as error:
                    problem = error
        if file is not None:
            file.close()
        if problem is not None:
            raise problem
