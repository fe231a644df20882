"""Return to a checkpoint of this training in the running processes."""

from __future__ import annotations

from qwen3_npu.checkpoint.training.save import Position
from qwen3_npu.data.text.encoder import open_encoder
from qwen3_npu.data.text.tokenizer import start_loading
from qwen3_npu.errors import Stopped
from qwen3_npu.training.checkpoints.saving import Saver
from qwen3_npu.training.feed import Feed
from qwen3_npu.training.guard import NanGuard
from qwen3_npu.training.spikes.guard import SpikeGuard, TokenDecoder
from qwen3_npu.watch import here


def decoder(folder: str | None) -> TokenDecoder | None:
    """A function from ids to text, by the tokenizer of a folder."""
    return open_encoder(start_loading(folder, threads=1)).decode if folder else None


def go_back(spikes: SpikeGuard, guard: NanGuard, saver: Saver, feed: Feed, *, position: Position, why: str) -> Position:
    """Load a checkpoint from before `position`, the last good one. Returns its position. Every rank must call this.

    Raises:
        Stopped: see `SpikeGuard.way_back`.
    """
    with here.during("save"):
        saver.finish()
        position = saver.load_own(spikes.way_back(position, saver.own, why))
    feed.forget()
    spikes.detector.rewind(position.iteration)
    guard.in_a_row = 0
    return position


def corrupted(spikes: SpikeGuard, problem: str, step: int) -> str:
    """The reason for a rollback when memory is damaged after `step`. Raises: Stopped: rollback is not switched on."""
    if spikes.rolls_back:
        return f"silent corruption: {problem}"
    raise Stopped(
        f"step {step}: silent corruption: {problem}; nothing is saved; take that device away and go on from the "
        f"last checkpoint"
    )
