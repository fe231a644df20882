"""Micro-batches of full samples, as a traced step reads them."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from qwen3_npu.data.train.batches import AnswerTokens, MicroBatch
from qwen3_npu.distributed.launch import World
from qwen3_npu.model.sequence import TokenSequence
from qwen3_npu.training.loop import Trainer


def answers_of(trainer: Trainer) -> int:
    """Texts of a micro-batch: both answers of a pair; kto: the answer, and its prompt with another's answer."""
    return trainer.args.train.micro_batch_size * (2 if trainer.args.data.is_preference else 1)


def rows_of(trainer: Trainer) -> int:
    """Rows of a micro-batch: packed samples are laid one after the other."""
    return 1 if trainer.args.data.reset_attention_mask else answers_of(trainer)


def full_batch(trainer: Trainer, world: World) -> MicroBatch:
    """A micro-batch without padding; every packed sample is one document."""
    train, data, arch = trainer.args.train, trainer.args.data, trainer.plan.arch
    samples, rows, length = answers_of(trainer), rows_of(trainer), train.seq_length
    shape = rows, samples // rows * length // trainer.args.parallel.context_parallel_size
    tokens = torch.zeros(shape, dtype=torch.long, device=world.device)
    boundaries = tuple(range(0, samples * length + 1, length)) if data.reset_attention_mask else None
    positions = torch.zeros(shape, dtype=torch.long, device=world.device)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    answers = None
    if last and data.is_preference:
        text = torch.ones(shape, device=world.device)
        desirable = torch.ones(samples // 2, device=world.device) if data.stage == "kto" else None
        answers = AnswerTokens(torch.zeros_like(tokens), text, samples, desirable)
    return MicroBatch(
        tokens if first else None,
        tokens if last else None,
        torch.ones(shape, device=world.device) if last else None,
        TokenSequence(positions, boundaries, arch.rope, trainer.dtype),
        think_mask=None,
        amounts=torch.zeros(3, device=world.device) if last else None,
        supervised=float(samples * length),
        answers=answers,
    )
