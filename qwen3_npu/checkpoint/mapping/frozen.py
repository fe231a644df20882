"""Which weights --freeze-include and --freeze-exclude freeze. No torch.

The patterns are those of MindFormers' `freeze_include` and `freeze_exclude` (fnmatch: *, ?, [abc]); the names are
Hugging Face's, so that they mean the same in every layout. Megatron joins some of them to one tensor (q, k and v; gate
and up; the experts of a layer), which is trained or frozen as a whole.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math

from qwen3_npu.args.lora import FreezeArgs
from qwen3_npu.checkpoint.mapping.source import listed
from qwen3_npu.checkpoint.mapping.table import hf_shapes, shards
from qwen3_npu.distributed.layout import Rank, single_layout
from qwen3_npu.errors import UsageError, did_you_mean
from qwen3_npu.model.arch import Qwen3Arch


def frozen_weights(arch: Qwen3Arch, args: FreezeArgs) -> frozenset[str]:
    """The Hugging Face names of the weights that are not trained.

    Raises:
        UsageError: a pattern matches nothing, a part of a joined tensor, or nothing is left to train.
    """
    if not args.on:
        return frozenset()
    names = set(hf_shapes(arch))
    include = args.freeze_include or ["*"]
    frozen = set().union(*(_matches(names, pattern, "--freeze-include", arch) for pattern in include))
    for pattern in args.freeze_exclude:
        spared = _matches(names, pattern, "--freeze-exclude", arch)
        if not spared & set().union(*(fnmatch.filter(names, pattern) for pattern in include)):
            raise UsageError(
                f"--freeze-exclude {pattern}: --freeze-include freezes nothing that it matches; drop the pattern"
            )
        frozen -= spared
    layout = dataclasses.replace(single_layout(arch), stacked_experts=True)  # as a training holds them
    for shard in shards(arch, layout, Rank(0, 0, 0, 0)):
        joined = {piece.hf for piece in shard.slices}
        if joined & frozen and not joined <= frozen:
            raise UsageError(
                f"--freeze-include freezes {listed(joined & frozen, 2)} and not {listed(joined - frozen, 2)}, which "
                f"are one tensor here; freeze or train them together"
            )
    if frozen >= names:
        raise UsageError("--freeze-include freezes every weight, so nothing is trained; give --freeze-exclude")
    return frozenset(frozen)


def frozen_share(arch: Qwen3Arch, frozen: frozenset[str]) -> float:
    """The frozen weights' share of all weights, from 0 to 1."""
    sizes = {name: math.prod(shape) for name, shape in hf_shapes(arch).items()} if frozen else {"": 1}
    return sum(sizes[name] for name in frozen) / sum(sizes.values())


def _matches(names: set[str], pattern: str, flag: str, arch: Qwen3Arch) -> set[str]:
    found = set(fnmatch.filter(names, pattern))
    if not found:
        tied = arch.tie_word_embeddings and pattern.startswith("lm_head")
        hint = "; the output layer is model.embed_tokens.weight here" if tied else did_you_mean(pattern, names)
        raise UsageError(
            f"{flag} {pattern} matches no weight of {arch}{hint}; names are Hugging Face's, as in "
            f"model.layers.0.self_attn.q_proj.weight"
        )
    return found
