"""A training's checkpoints: take up what is there, save, finish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3_npu import log
from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint import resume, training_state
from qwen3_npu.checkpoint.training_state import Position, Trained


def prepare(args: CheckpointArgs) -> None:
    """Look at the folders before anything costly. Raises: UsageError: --save cannot be written."""
    if args.save:
        training_state.check_writable(args.save)


class Saver:
    """Loads and saves what is trained. Every rank must call every method.

    Args:
        extra: further entries of the saved args.
        config: folder whose config.json and tokenizer files are carried along.
    """

    def __init__(
        self, trained: Trained, args: CheckpointArgs, lora: LoraArgs, extra: dict[str, Any], config: Path | None
    ) -> None:
        self.trained, self.args, self.lora, self.extra, self.config = trained, args, lora, extra, config

    def load(self) -> Position:
        """Weights and, when resuming, everything else. Raises: UsageError: see `resume.load`."""
        return resume.load(self.trained, self.args, self.lora.lora_load)

    def save(self, position: Position) -> None:
        """A checkpoint of this step in --save."""
        folder = training_state.save(
            self.trained, position, self.args, self.extra, self.config, updates_only=self.lora.lora_ckpt_filter
        )
        log.info(f"saved: {folder}")

    def finish(self) -> None:
        """After the last step."""
