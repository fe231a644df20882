"""Flags of `pretrain_gpt.py`."""

from __future__ import annotations

import typing

from qwen3_npu.args.lora import FreezeArgs, LoraArgs
from qwen3_npu.args.model import ModelArgs, ShapeArgs
from qwen3_npu.args.parallel import OverlapArgs, ParallelArgs, RuntimeArgs
from qwen3_npu.args.preference import PreferenceArgs
from qwen3_npu.args.preprocess import InstructionArgs, RecordArgs, TokenizerArgs
from qwen3_npu.args.profile import ProfileArgs
from qwen3_npu.args.tools.plan import VerdictArgs
from qwen3_npu.args.trackers import ReportArgs, TrackerArgs
from qwen3_npu.args.training import CheckpointArgs, DataArgs, ExitArgs, OptimizerArgs, TrainArgs
from qwen3_npu.args.watch import SpikeArgs, WatchArgs


class PretrainArgs(typing.NamedTuple):
    """The groups of flags; `record`, `tokenizer` and `instruction` are for raw files in --data-path."""

    model: ModelArgs
    shape: ShapeArgs
    parallel: ParallelArgs
    overlap: OverlapArgs
    runtime: RuntimeArgs
    train: TrainArgs
    optimizer: OptimizerArgs
    freeze: FreezeArgs
    lora: LoraArgs
    data: DataArgs
    record: RecordArgs
    tokenizer: TokenizerArgs
    instruction: InstructionArgs
    checkpoint: CheckpointArgs
    exits: ExitArgs
    report: ReportArgs
    trackers: TrackerArgs
    profile: ProfileArgs
    watch: WatchArgs
    spikes: SpikeArgs
    verdict: VerdictArgs
    preference: PreferenceArgs


GROUPS = tuple(typing.get_type_hints(PretrainArgs).values())
