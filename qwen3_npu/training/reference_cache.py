"""The reference's log-probabilities in a file beside the data: computed once, for any layout, resumable.

<cache>/reference_<digest>.npy    float32 [pairs of all data sets, 2]: chosen and rejected answer; NaN: not computed yet

The digest names the data (by their indexes), the reference's files, the length of samples and the dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from qwen3_npu import log
from qwen3_npu.data.train.batches import MicroBatch
from qwen3_npu.errors import UsageError
from qwen3_npu.files import replacing
from qwen3_npu.progress import Progress
from qwen3_npu.training.reference import Reference, Samples

_EVERY = 20  # steps between writes


class KnownReference:
    """Log-probabilities from memory.

    Attributes:
        values: float32 [pairs, 2] of all data sets.
        starts: prefix -> the first row of its pairs.
    """

    def __init__(self, values: np.ndarray, starts: dict[str, int], device: torch.device) -> None:
        self.values, self.starts, self.device = values, starts, device

    def rows(self, samples: Samples) -> list[int]:
        """The rows of pairs."""
        return [self.starts[prefix] + number for prefix, number in samples]

    def log_probs(
        self, batches: Sequence[Iterator[MicroBatch]], samples: Sequence[Samples], **sizes: int
    ) -> list[torch.Tensor]:
        """See `Reference`; `batches` are not used."""
        found = [self.values[self.rows(one)].reshape(-1) for one in samples]
        if any(np.isnan(one).any() for one in found):
            raise AssertionError("a pair was not computed before the training")
        return [torch.from_numpy(one).to(self.device) for one in found]


def digest_of(*parts: object) -> str:
    """The digest in the name of the file."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def identity(folder: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a model's files, which change when the files do."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def cached(
    reference: Callable[[], Reference],
    path: Path,
    starts: dict[str, int],
    total: int,
    *,
    at_most: int,
    steps: Iterator[tuple[Callable[[], list[Iterator[MicroBatch]]], Sequence[Samples], Sequence[Samples]]],
    device: torch.device,
    **sizes: int,
) -> KnownReference:
    """Read known log-probabilities, compute the missing ones, and store them. Every rank must call this.

    Args:
        reference: opened only if something is missing.
        starts, total: first row of each prefix, and number of rows.
        at_most: number of pairs that the training reads, repeated ones included.
        steps: steps of the training: a function that makes this rank's micro-batches, their samples, and the samples
            of all ranks.
    """
    known = KnownReference(_read(path, total), starts, device)
    missing = int(np.isnan(known.values[:, 0]).sum())
    log.info(f"reference: {path}: {total - missing} of {total} pairs are known")
    opened: Reference | None = None
    found: dict[int, tuple[float, float]] = {}
    asked: set[int] = set()  # equal on all ranks, since they must run the same steps
    with Progress("reference log-probabilities", min(missing, at_most), {"pairs": ""}) as progress:
        for number, (batches, mine, everyone) in enumerate(steps):
            rows = [row for samples in everyone for row in known.rows(samples)]
            new = {row for row in rows if np.isnan(known.values[row, 0])} - asked
            if not new:
                continue
            asked |= new
            opened = opened or reference()
            for samples, values in zip(mine, opened.log_probs(batches(), mine, **sizes), strict=False):
                pairs = values.reshape(-1, 2).tolist()
                found |= {row: (pair[0], pair[1]) for row, pair in zip(known.rows(samples), pairs, strict=True)}
            progress.add(pairs=len(new))
            if number % _EVERY == _EVERY - 1:
                found = _share(found, known.values, path)
    _share(found, known.values, path)
    return known


def _read(path: Path, total: int) -> np.ndarray:
    """The file's values on every rank; rank 0 reads."""
    held: list[np.ndarray | str | None] = [None]
    if dist.get_rank() == 0:
        held[0] = np.full((total, 2), np.nan, np.float32)
        if path.is_file():
            try:
                values = np.load(path, allow_pickle=False)
                whole = values.shape == (total, 2) and values.dtype == np.float32
            except (OSError, ValueError, EOFError):
                whole = False
            held[0] = values if whole else f"{path} is damaged; delete it, it will be computed again"
    dist.broadcast_object_list(held, 0)
    if isinstance(held[0], str):
        raise UsageError(held[0])
    assert held[0] is not None
    return held[0]


def _share(found: dict[int, tuple[float, float]], values: np.ndarray, path: Path) -> dict[int, tuple[float, float]]:
    """Copy the results of the last stages to `values` on all ranks, and write them to disk. Returns an empty dict."""
    everyone: list[dict[int, tuple[float, float]]] = [{} for _ in range(dist.get_world_size())]
    sends_for_copy = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0
    dist.all_gather_object(everyone, found if sends_for_copy else {})
    for part in everyone:
        for row, pair in part.items():
            values[row] = pair
    if dist.get_rank() == 0 and any(everyone):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, binary=True) as file:
            np.save(file, values)
    return {}
