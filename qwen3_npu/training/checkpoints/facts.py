"""The settings that a training stores in its checkpoints, by Megatron's names, for comparison when it is resumed."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
from pathlib import Path

import torch.distributed as dist

from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.data.train.data_path import blend
from qwen3_npu.training.prepare.plan import TrainingPlan
from qwen3_npu.training.prepare.taught import taught

_WHOLE = 2**24  # bytes of a file that is digested whole; of a larger one, parts from all of it
_PARTS, _PART = 256, 2**16


def facts(args: PretrainArgs, plan: TrainingPlan) -> dict[str, object]:
    """Entries of the saved args, plain values. Every rank must call this: rank 0 reads the data."""
    data, arch = args.data, plan.arch
    prefixes, weights = blend(data.data_path)
    digests = [[data_digest(prefix) for prefix in prefixes] if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(digests, 0)
    coefficient = args.train.moe_aux_loss_coeff
    found = {
        **dataclasses.asdict(args.train),
        **dataclasses.asdict(args.optimizer),
        **dataclasses.asdict(args.freeze),
        "seed": args.runtime.seed,
    }
    names = ("split", "shuffle", "reset_attention_mask", "reset_position_ids", "eod_mask_loss")
    found |= {name: getattr(data, name) for name in names}
    if args.lora.on:
        ours = ("lora_dropout", "qlora", "qlora_embedding", "qlora_double_quant")
        found |= {name: getattr(args.lora, name) for name in ours}
    if data.is_preference:
        found |= dataclasses.asdict(args.preference)
    return {
        **found,
        "global_batch_size": plan.global_batch,
        "moe_aux_loss_coeff": arch.router_aux_loss_coef if coefficient is None else coefficient,
        "stage": "sft" if data.is_instruction else data.stage,
        "data_path": list(data.data_path),
        "data_weights": "by size" if weights is None else weights,
        "data_digest": digests[0],
        **taught(args),
    }


def data_digest(prefix: str) -> str:
    """A digest of the token files of one prefix; for large files of their sizes and 16 MiB of samples."""
    paths = [Path(prefix + suffix) for suffix in (".bin", ".idx")]
    if not paths[0].is_file():  # instructions: a pair for each of ids, labels, ...
        every = glob.glob(glob.escape(prefix) + "_packed_*_document.*")
        paths = sorted(Path(name) for name in every if name.endswith((".bin", ".idx")))
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        found.update(f"{path.suffix} {size} ".encode())
        with open(path, "rb") as file:
            if size <= _WHOLE:
                found.update(file.read())
            else:
                for part in range(_PARTS):
                    file.seek((size - _PART) * part // (_PARTS - 1))
                    found.update(file.read(_PART))
    return found.hexdigest()[:32]
