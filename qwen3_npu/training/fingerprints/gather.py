"""Gather the records of all ranks, and write those of a training to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from qwen3_npu import log
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.distributed.context_parallel import SHARD_INDICES
from qwen3_npu.training.fingerprints.files import Recording, write
from qwen3_npu.training.fingerprints.msprobe import MsprobeRecorder
from qwen3_npu.training.fingerprints.recorder import Noted, StepRecorder

OTHER = "@"  # begins the names of what further ranks computed again: @rank|...
TRAINING = "training"  # the case of a real training


def follow_tokens(recorder: StepRecorder, args: PretrainArgs) -> None:
    """Tell the recorder which tokens of a sequence this rank has, since the parts of ranks are summed."""
    if args.data.variable_seq_lengths:
        return
    length, parallel = args.train.seq_length, args.parallel
    rows = torch.arange(length)
    if (context := parallel_state.get_context_parallel_world_size()) > 1:
        indices = SHARD_INDICES[parallel.context_parallel_algo]
        rows = indices(length, context, parallel_state.get_context_parallel_rank())
        recorder.groups.append(parallel_state.get_context_parallel_group())
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    if parallel.sequence_parallel and tensor > 1:
        rows = rows.chunk(tensor)[parallel_state.get_tensor_model_parallel_rank()]
        recorder.groups.append(parallel_state.get_tensor_model_parallel_group())
    if recorder.groups:
        recorder.rows = rows, length


def gathered(mine: Noted, *, everyones: bool = False) -> Noted | None:
    """The records of all ranks on rank 0; None elsewhere. Every rank must call this.

    Only one rank of each pipeline stage is kept.

    Args:
        everyones: also keep the recomputed records of the other ranks; for a few ranks only.
    """
    data_parallel = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    is_first = not data_parallel and not parallel_state.get_tensor_model_parallel_rank()
    if not everyones and not is_first:
        return None
    group = None if everyones else parallel_state.get_pipeline_model_parallel_group()
    own = parallel_state.get_pipeline_model_parallel_rank(), is_first, mine
    everyone = [own] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    if dist.get_rank():
        return None
    names: list[str] = []
    rows: list[np.ndarray] = []

    def add(noted: Noted, kept: np.ndarray, prefix: str = "") -> None:
        names.extend(prefix + noted.names[i] for i in np.flatnonzero(kept))
        rows.append(noted.rows[kept])

    stages = sorted(((stage, noted) for stage, first, noted in everyone if first), key=lambda pair: pair[0])
    for backward in (False, True) if len(stages) > 1 else (None,):
        for stage, noted in reversed(stages) if backward else stages:
            if backward is not None:  # what backward calls is in no module
                noted = noted._replace(names=[name.replace("||", f"|stage {stage}|") for name in noted.names])
            add(noted, np.array([backward is None or ("|backward|" in name) == backward for name in noted.names], bool))
    for rank, (_, first, noted) in enumerate(everyone):
        if not first:
            add(noted, ~np.isnan(noted.rows[:, -1]), f"{OTHER}{rank}|")
    raised = next((noted.raised for _, _, noted in everyone if noted.raised), None)
    return Noted(names, np.concatenate(rows), raised)


def fingerprinting(args: PretrainArgs, device: str) -> StepRecorder | None:
    """The recorder of --fingerprint-interval: `fingerprints/step_N.npz` in --tensorboard-dir, or `msprobe/stepN`."""
    interval, folder = args.report.fingerprint_interval, args.report.tensorboard_dir
    if not interval or folder is None:
        return None

    def due(step: int) -> bool:
        return step % interval == 0 or step == 1

    if args.report.fingerprint_format == "msprobe":
        return MsprobeRecorder(due, Path(folder) / "msprobe")

    def keep(step: int, mine: Noted) -> None:
        noted = gathered(mine)
        if noted is None:
            return
        facts = {"torch": torch.__version__, "device": device, "kernels": args.runtime.kernels}
        parallel = args.parallel
        layout = f"TP {parallel.tensor_model_parallel_size}, PP {parallel.pipeline_model_parallel_size}, "
        layout += f"CP {parallel.context_parallel_size}, {'bf16' if args.train.bf16 else 'fp32'}"
        path = Path(folder) / "fingerprints" / f"step_{step:07d}.npz"
        try:
            write(path, Recording(layout=layout, cases={TRAINING: noted}, **facts))
        except OSError as error:
            log.info(f"warning: {path} is not written: {error}")

    return StepRecorder(due, keep)
