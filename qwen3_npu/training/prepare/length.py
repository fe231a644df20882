"""The length of a training: steps, samples, epochs. It is determined before torch is imported."""

from __future__ import annotations

import dataclasses
import math

from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.data.train.data_path import DataFacts
from qwen3_npu.errors import UsageError
from qwen3_npu.progress import human

_MANY_EPOCHS = 10.0  # without --epochs


def settled(args: PretrainArgs, global_batch: int, epoch: int | None) -> PretrainArgs:
    """The same arguments with --train-iters in place of --train-samples and --epochs.

    Args:
        epoch: samples in an epoch; None: unknown yet (raw data in a dry run), and --epochs stays.

    Raises:
        UsageError: the training has less than one step, or its schedule has another unit than its length.
    """
    train, optimizer = args.train, args.optimizer
    _check_schedule(args)
    if train.train_iters is not None or (train.epochs is not None and epoch is None):
        return args
    if train.train_samples is not None:  # as Megatron: whole steps, the schedule by samples
        steps = train.train_samples // global_batch
        if steps == 0:
            raise UsageError(f"--train-samples {train.train_samples} is less than one step of {global_batch} samples")
        decay = optimizer.lr_decay_samples or train.train_samples
        optimizer = dataclasses.replace(optimizer, lr_decay_samples=decay)
    else:
        assert train.epochs is not None
        assert epoch is not None
        steps = math.ceil(train.epochs * epoch / global_batch)
    train = dataclasses.replace(train, train_iters=steps, train_samples=None, epochs=None)
    return args._replace(train=train, optimizer=optimizer)


def _check_schedule(args: PretrainArgs) -> None:
    """Check that the schedule has the same unit as the length, as in Megatron."""
    by_samples = args.train.train_samples is not None
    optimizer = args.optimizer
    given = {
        "--lr-decay-iters": not by_samples or not optimizer.lr_decay_iters,
        "--lr-warmup-iters": not by_samples or not optimizer.lr_warmup_iters,
        "--lr-decay-samples": by_samples or not optimizer.lr_decay_samples,
        "--lr-warmup-samples": by_samples or not optimizer.lr_warmup_samples,
    }
    for name, fits in given.items():
        if not fits:
            length = "--train-samples" if by_samples else "--train-iters or --epochs"
            other = name.replace("iters", "samples") if by_samples else name.replace("samples", "iters")
            raise UsageError(f"{name} does not go with {length}; give {other}")


def describe_length(asked: PretrainArgs, steps: int, global_batch: int, facts: DataFacts) -> list[str]:
    """Lines about samples, steps and epochs of the training; warnings begin with "warning: ".

    Args:
        asked: the arguments before `settled`.
    """
    if not facts.samples:
        return []
    seen, per_epoch = steps * global_batch, facts.samples / global_batch
    epochs = seen / facts.samples
    lines = [
        f"data: {human(facts.samples)} samples for training, {per_epoch:.4g} steps per epoch; {steps} steps make "
        f"{epochs:.3g} epochs"
    ]
    if facts.truncated:
        lines.append(
            f"data: {human(facts.truncated)} of {human(facts.samples)} samples are longer than --seq-length "
            f"{asked.train.seq_length}: {human(facts.truncated_tokens, 'tokens')} are truncated"
        )
    if epochs >= _MANY_EPOCHS and asked.train.epochs is None:
        lines.append(
            f"warning: {human(facts.samples)} samples x {steps} steps of {global_batch} = {epochs:.3g} epochs; "
            f"--epochs N says how often each sample shall be seen"
        )
    return lines
