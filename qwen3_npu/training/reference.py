"""Log-probabilities of a reference model: a frozen copy, or the trained model without its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from qwen3_npu import log
from qwen3_npu.checkpoint.formats.open import open_checkpoint
from qwen3_npu.checkpoint.training.live import load_weights
from qwen3_npu.data.train.batches import MicroBatch
from qwen3_npu.distributed.launch import model_rank
from qwen3_npu.distributed.layout import Layout
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.lora.embedding import LoraEmbedding
from qwen3_npu.model.lora.experts import LoraExperts
from qwen3_npu.model.lora.linear import LoraLinear
from qwen3_npu.training.objective import Outcome
from qwen3_npu.training.preference import log_probs_of
from qwen3_npu.training.step import run_schedule

Samples = Sequence[tuple[str, int]]  # prefix and number in it of each pair of a micro-batch


class Reference(Protocol):
    """Computes the reference's log-probabilities."""

    def log_probs(
        self, batches: Sequence[Iterator[MicroBatch]], samples: Sequence[Samples], **sizes: int
    ) -> list[torch.Tensor]:
        """[answers] float32 of each micro-batch of a step; on the last pipeline stage only, except from a file.

        Every rank must call this.

        Args:
            batches: as for `run_schedule`; they are consumed.
            samples: places of the pairs of each micro-batch.
        """


class _Recorder:
    """An objective that only records log-probabilities."""

    names: Sequence[str] = ()

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, batch: MicroBatch, losses: torch.Tensor) -> Outcome:
        self.seen.append(log_probs_of(batch, losses).answers)
        nothing = losses.new_zeros(())
        return Outcome(nothing, nothing, 0.0, losses.new_zeros(0))


class FrozenCopy:
    """A second model in memory, in the same layout.

    Args:
        chunks: its model chunks on this rank, filled and never trained.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.chunks = chunks
        for chunk in chunks:
            chunk.requires_grad_(False).eval()

    def log_probs(
        self, batches: Sequence[Iterator[MicroBatch]], samples: Sequence[Samples], **sizes: int
    ) -> list[torch.Tensor]:
        """See `Reference`."""
        return _forward(self.chunks, batches, **sizes)


class Untrained:
    """The model before its first training step, when it equals the reference.

    Args:
        chunks: its model chunks on this rank.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.chunks = chunks

    def log_probs(
        self, batches: Sequence[Iterator[MicroBatch]], samples: Sequence[Samples], **sizes: int
    ) -> list[torch.Tensor]:
        """See `Reference`."""
        for chunk in self.chunks:
            chunk.eval()
        found = _forward(self.chunks, batches, **sizes)
        for chunk in self.chunks:
            chunk.train()
        return found


class WithoutAdapter:
    """The trained model with its adapter switched off.

    Args:
        chunks: the model chunks that are trained.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.chunks = chunks

    def log_probs(
        self, batches: Sequence[Iterator[MicroBatch]], samples: Sequence[Samples], **sizes: int
    ) -> list[torch.Tensor]:
        """See `Reference`."""
        with _switched_off(self.chunks):
            return _forward(self.chunks, batches, **sizes)


@contextlib.contextmanager
def _switched_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    adapters = [
        m for chunk in chunks for m in chunk.modules() if isinstance(m, LoraLinear | LoraEmbedding | LoraExperts)
    ]
    for chunk in chunks:
        chunk.eval()
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True
        for chunk in chunks:
            chunk.train()


def _forward(
    chunks: Sequence[torch.nn.Module], batches: Sequence[Iterator[MicroBatch]], **sizes: int
) -> list[torch.Tensor]:
    recorder = _Recorder()
    with torch.no_grad():
        run_schedule(chunks, batches, forward_only=True, objective=recorder, **sizes)
    return recorder.seen


def fill_reference(
    chunks: Sequence[torch.nn.Module], layout: Layout, arch: Qwen3Arch, *, folder: str, step: int | None
) -> None:
    """Load a frozen copy. Every rank must call this.

    Raises:
        UsageError: there is no such model, or its architecture differs from the trained model's.
    """
    source = open_checkpoint(folder, iteration=step)
    if not source.arch.same_weights(arch):
        raise UsageError(f"the reference {folder} is {source.arch}; the model that is trained is {arch}")
    if not source.contents.base or source.contents.lora:
        raise UsageError(f"the reference {folder} holds {source.contents}; merge it with convert_ckpt.py first")
    load_weights(source, layout, model_rank(), chunks)
    source.close()
    log.info(f"reference: {folder} ({source}), a frozen copy in memory")
