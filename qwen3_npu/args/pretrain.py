"""Flags of `pretrain_gpt.py`."""

from __future__ import annotations

import typing

from qwen3_npu.args.model import ModelArgs, ShapeArgs
from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs
from qwen3_npu.args.training import CheckpointArgs, DataArgs, ExitArgs, OptimizerArgs, ReportArgs, TrainArgs


class PretrainArgs(typing.NamedTuple):
    """The groups of flags."""

    model: ModelArgs
    shape: ShapeArgs
    parallel: ParallelArgs
    runtime: RuntimeArgs
    train: TrainArgs
    optimizer: OptimizerArgs
    data: DataArgs
    checkpoint: CheckpointArgs
    exits: ExitArgs
    report: ReportArgs


GROUPS = tuple(typing.get_type_hints(PretrainArgs).values())
