"""Which parameters are matrices of a layer, how they are sharded, and the orthogonal update of one.

Newton-Schulz iteration and its coefficients: https://kellerjordan.github.io/posts/muon/ (torch.optim.Muon's, too).
Scales and the separate q, k and v: megatron-core 0.16.1 (optimizer/muon.py), which needs emerging-optimizers, a package
for newer Pythons.

Under tensor parallelism a matrix is gathered, and every rank computes the same update and takes its shard of it. The
complete matrix must be orthogonal, not its shards; so the layout does not change what is learned.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.args.training import OptimizerArgs

_A, _B, _C = 3.4445, -4.7750, 2.0315
_LEAST_NORM = 1e-7
_OUT, _IN = 1, 2  # dimensions of [matrices, out, in]
# Parts of a parameter's name -> the dimension over which tensor parallelism shards it.
_LINEARS = {"linear_qkv": _OUT, "linear_proj": _IN, "linear_fc1": _OUT, "linear_fc2": _IN, "router": None}
_ADAPTERS = {"lora_A": _IN, "lora_B": _OUT}  # the one of the two that has its linear's dimension
_EXPERTS = {
    "weight1": _OUT,
    "weight1_lora_a": None,
    "weight1_lora_b": _OUT,
    "weight2": _IN,
    "weight2_lora_a": _IN,
    "weight2_lora_b": None,
}


@dataclasses.dataclass(frozen=True)
class LayerMatrix:
    """A parameter as one or several matrices [out, in], one after the other in memory.

    Attributes:
        out, inner: sizes of this rank's shard of one of them; `inner` is the width of its input.
        sharded: dimension of [matrices, out, in] that is sharded over the group; None: each rank has the complete one.
        expert: each matrix belongs to an expert and is stored as [in, out].
        heads: rows of queries, keys and values of each key/value head (of the fused linear_qkv), which are three
            matrices; empty: one.
    """

    out: int
    inner: int
    sharded: int | None = None
    expert: bool = False
    heads: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Elements of this rank's shard of one matrix."""
        return self.out * self.inner

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that hold the shards."""
        if self.expert:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()

    def apart(self, stored: torch.Tensor) -> torch.Tensor:
        """Matrices in the order of memory as [matrices, out, in], a view."""
        if self.expert:
            return stored.view(-1, self.inner, self.out).mT
        return stored.view(-1, self.out, self.inner)


def layer_matrix(
    name: str, parameter: torch.Tensor, config: TransformerConfig, *, split_qkv: bool
) -> LayerMatrix | None:
    """The matrices of a parameter; None if AdamW updates it: norms, biases, magnitudes (DoRA), embedding, output layer,
    rewards."""
    if ".layers." not in name or parameter.dim() != 2:
        return None
    rows, columns = parameter.shape
    *_, module, kind = name.removesuffix(".default.weight").split(".")
    if module == "experts":
        if kind not in _EXPERTS:
            return None
        experts = (config.num_moe_experts or 1) // parallel_state.get_expert_model_parallel_world_size()
        inner = rows if kind.startswith("weight1") else rows // experts
        return LayerMatrix(parameter.numel() // (experts * inner), inner, _EXPERTS[kind], True)
    sharded = _LINEARS[module]
    if kind in _ADAPTERS and sharded != _ADAPTERS[kind]:
        sharded = None
    heads: tuple[int, ...] = ()
    if module == "linear_qkv" and split_qkv and kind != "lora_A":
        size = config.kv_channels
        heads = (config.num_attention_heads // config.num_query_groups * size, size, size)
    return LayerMatrix(rows, columns, sharded, heads=heads)


def orthogonal(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """The same singular vectors with singular values near 1 (0.7 to 1.2); [matrices, out, in], in the dtype given."""
    x = matrices.mT if matrices.shape[_OUT] > matrices.shape[_IN] else matrices
    x = x / x.norm(dim=(_OUT, _IN), keepdim=True).clamp(min=_LEAST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if matrices.shape[_OUT] > matrices.shape[_IN] else x


def scale(mode: str, rows: int, columns: int) -> float:
    """The factor of an orthogonal update (--muon-scale-mode)."""
    by_mode = {
        "spectral": max(rows, columns),
        "shape_scaling": max(1.0, rows / columns),
        "unit_rms_norm": rows / columns,
    }
    return by_mode[mode] ** 0.5


def update_of(momentum: torch.Tensor, matrix: LayerMatrix, args: OptimizerArgs) -> torch.Tensor:
    """This rank's shard of the update of one or several matrices, in the shape and dtype given.

    Every rank of `matrix.group` must call it.

    Args:
        momentum: of this rank's shard, in the order of memory; it is gathered and iterated in its dtype.
    """
    local = matrix.apart(momentum)
    ranks = matrix.group.size() if matrix.sharded is not None else 1
    whole = local
    if ranks > 1:
        assert matrix.sharded is not None
        shards = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(ranks)]
        dist.all_gather(shards, local.contiguous(), group=matrix.group)
        whole = torch.cat(shards, dim=matrix.sharded)
    done = _updated(whole, matrix, args)
    if ranks > 1:
        assert matrix.sharded is not None
        done = done.chunk(ranks, dim=matrix.sharded)[matrix.group.rank()]
    return (done.mT if matrix.expert else done).reshape(momentum.shape)


def _updated(whole: torch.Tensor, matrix: LayerMatrix, args: OptimizerArgs) -> torch.Tensor:
    """The update of whole matrices [matrices, out, in]."""

    def one(part: torch.Tensor) -> torch.Tensor:
        factor = scale(args.muon_scale_mode, part.shape[_OUT], part.shape[_IN]) * args.muon_extra_scale_factor
        return orthogonal(part, args.muon_num_ns_steps) * factor

    if not matrix.heads:
        return one(whole)
    width = whole.shape[_IN]
    grouped = whole.view(-1, sum(matrix.heads), width).split(matrix.heads, dim=1)
    parts = [one(part.reshape(1, -1, width)).view(part.shape) for part in grouped]
    return torch.cat(parts, dim=1).view(whole.shape)
