"""torch_npu's fused operations. Signatures as in `kernels/reference.py`.

Semantics are those of torch_npu's own documentation of each operation (`help(torch_npu.npu_fusion_attention)` and so
on). Only arguments that torch_npu 2.7.1 and 2.13.0 both have are used. Checked against the real torch_npu's dispatcher
and argument checks with emulated kernels; never run on an NPU.

s = sequence (queries), t = sequence (keys), b = batch, n = query heads, g = key/value heads, d = head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch_npu
from torch.utils.weak import WeakTensorKeyDictionary

from qwen3_npu.kernels import npu_gradients, reference

# What each kernel calls, so that a torch_npu that is too old is refused at the start and not in the first step.
_NEEDS = {
    "attention": ("npu_fusion_attention", "npu_fused_infer_attention_score"),
    "decode_attention": ("npu_fused_infer_attention_score",),
    "attention_block": ("npu_fusion_attention",),
    "attention_block_backward": ("npu_fusion_attention_grad",),
    "rms_norm": ("npu_rms_norm", "npu_rms_norm_backward"),
    "add_rms_norm": ("npu_add_rms_norm", "npu_rms_norm_backward"),
    "add_weight_gradient": ("npu_grouped_matmul_add_",),
    "rotary": ("npu_rotary_mul",),
    "swiglu": ("npu_swiglu",),
    "grouped_matmul": ("npu_grouped_matmul", "npu_grouped_matmul_add_"),
    "permute": ("npu_moe_token_permute_with_routing_map",),
    "unpermute": ("npu_moe_token_unpermute_with_routing_map",),
    "gather_product": ("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"),
}
_INFERENCE = (torch.bfloat16, torch.float16)  # dtypes of the inference operation
# sparse_mode: no mask; causal, where the last query sees the last key ("rightDownCausal").
_ALL, _CAUSAL = 0, 3
_INFINITE = 2147483647


def why_no_kernel(operation: str) -> str | None:
    """Why an operation's kernel cannot be used with the installed torch_npu; None if it can."""
    missing = [name for name in _NEEDS.get(operation, ()) if not hasattr(torch_npu, name)]
    return f"torch_npu {torch_npu.__version__} has no {' and no '.join(missing)}" if missing else None


@functools.cache
def _compressed_mask(device: torch.device) -> torch.Tensor:
    """The compressed mask of causal sparse modes, instead of one of the sequence's size: [2048, 2048]; True: masked."""
    with torch.inference_mode(False):  # generation may make it first, and training needs a tensor that autograd accepts
        return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


def _fusion_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    cu_seqlens: Sequence[int] | None,
    dropout: float = 0.0,
    softmax_layout: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [s, b, n, d], and maximum and sum of the softmax, float32: [b, n, s, 8], or of documents [s, n, 8].

    The latter are in that order only with softmax_layout "TND".
    """
    layout, ends = _layout(cu_seqlens, q.shape[1])
    outputs = torch_npu.npu_fusion_attention(
        _to(layout, q),
        _to(layout, k),
        _to(layout, v),
        q.shape[2],
        layout,
        # Without a mask the operation ignores sparse_mode and attends to everything.
        atten_mask=_compressed_mask(q.device) if causal else None,
        scale=scale,
        keep_prob=1.0 - dropout,
        next_tockens=0 if causal else _INFINITE,
        sparse_mode=_CAUSAL if causal else _ALL,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        softmax_layout=softmax_layout,
    )
    return outputs[0].view(q.shape), outputs[1], outputs[2]


def _layout(cu_seqlens: Sequence[int] | None, batch: int) -> tuple[str, list[int] | None]:
    """The operation's layout, and the ends of the documents: cumulative, without the leading 0.

    Values are a slice of qkv's product. BSND and TND have a dimension of heads, so the slice is passed without a copy;
    SBH needs a copy. With more than one row, BSND itself would need one.
    """
    if cu_seqlens is None or len(cu_seqlens) == 2:
        return "BSND" if batch == 1 else "SBH", None
    return "TND", list(cu_seqlens[1:])


def _softmax_layout(cu_seqlens: Sequence[int] | None, batch: int) -> str:
    return "TND" if _layout(cu_seqlens, batch)[0] == "TND" else ""


def _to(layout: str, x: torch.Tensor) -> torch.Tensor:
    if layout == "BSND":
        return x.transpose(0, 1)
    return x.flatten(2) if layout == "SBH" else x.flatten(0, 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cu_seqlens: Sequence[int] | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """npu_fusion_attention; for the last positions of a longer sequence the inference operation (16 bit only)."""
    if k.shape[0] > q.shape[0] and not torch.is_grad_enabled() and q.dtype in _INFERENCE:
        return _last_positions(q, k, v, scale)
    return _fusion_attention(q, k, v, scale=scale, causal=True, cu_seqlens=cu_seqlens, dropout=dropout)[0]


def _last_positions(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    many = q.shape[0] > 1  # one query sees every key; its branch of the operation takes no mask
    out, _ = torch_npu.npu_fused_infer_attention_score(
        q.transpose(0, 1).contiguous(),
        k.transpose(0, 1).contiguous(),
        v.transpose(0, 1).contiguous(),
        atten_mask=_compressed_mask(q.device) if many else None,
        num_heads=q.shape[2],
        num_key_value_heads=k.shape[2],
        scale=scale,
        input_layout="BSND",
        sparse_mode=_CAUSAL if many else _ALL,
    )
    return out.transpose(0, 1)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    lengths: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """npu_fused_infer_attention_score, 16 bit only, over whole slots: it reads as many keys as `lengths` say."""
    if q.dtype not in _INFERENCE:
        return reference.decode_attention(q, k, v, visible, lengths=lengths, scale=scale)
    out, _ = torch_npu.npu_fused_infer_attention_score(
        q.unsqueeze(2),
        k,
        v,
        actual_seq_lengths_kv=list(lengths),
        num_heads=q.shape[1],
        num_key_value_heads=k.shape[1],
        scale=scale,
        input_layout="BNSD",
    )
    return out.squeeze(2)


def attention_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, cu_seqlens: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block by npu_fusion_attention, whose softmax maximum and sum give the log-sum-exp."""
    causal, order = cu_seqlens is not None, _softmax_layout(cu_seqlens, q.shape[1])
    out, largest, total = _fusion_attention(
        q, k, v, scale=scale, causal=causal, cu_seqlens=cu_seqlens, softmax_layout=order
    )
    lse = largest[..., 0] + total[..., 0].log()  # the last dimension holds eight copies
    return out, lse.unsqueeze(1) if lse.dim() == 2 else lse.permute(2, 0, 1)


def attention_block_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    cu_seqlens: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its gradients. The operation needs exp(score - maximum) / sum only: maximum = lse and sum = 1 are as good."""
    causal = cu_seqlens is not None
    layout, ends = _layout(cu_seqlens, q.shape[1])
    largest = lse.squeeze(1) if layout == "TND" else lse.permute(1, 2, 0)
    largest = largest.unsqueeze(-1).expand(*largest.shape, 8).contiguous()
    dq, dk, dv, *_ = torch_npu.npu_fusion_attention_grad(
        _to(layout, q),
        _to(layout, k),
        _to(layout, v),
        _to(layout, grad.to(q.dtype)),
        q.shape[2],
        layout,
        atten_mask=_compressed_mask(q.device) if causal else None,
        softmax_max=largest,
        softmax_sum=torch.ones_like(largest),
        attention_in=_to(layout, out.to(q.dtype)),
        scale_value=scale,
        next_tockens=0 if causal else _INFINITE,
        sparse_mode=_CAUSAL if causal else _ALL,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        softmax_layout=_softmax_layout(cu_seqlens, q.shape[1]),
    )
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


add_weight_gradient = npu_gradients.add_weight_gradient
rms_norm, add_rms_norm, rotary = npu_gradients.rms_norm, npu_gradients.add_rms_norm, npu_gradients.rotary


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """npu_swiglu; it, too, gates with the first half."""
    return torch_npu.npu_swiglu(x, dim=-1)


def weighted_swiglu(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """npu_swiglu, and a multiplication."""
    return (swiglu(x) * weights.unsqueeze(-1)).to(x.dtype)


def grouped_matmul(counts: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """npu_grouped_matmul with one output; groups are told by the cumulative rows, which stay on the device."""
    ends = group_ends(counts)

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # No rows, but gradients of the right shape.
        return npu_gradients.GroupedMatmul.apply(x, weight, ends) if x.shape[0] else x @ weight[0]

    return product


def add_grouped_gradient(x: torch.Tensor, grad: torch.Tensor, counts: torch.Tensor, total: torch.Tensor) -> None:
    """npu_grouped_matmul_add_ (16-bit factors, float32 sum), or npu_grouped_matmul and an addition."""
    if x.shape[0]:
        npu_gradients.add_grouped_gradient(x, grad, group_ends(counts), total)


# Counts of a layer and micro-batch -> where the groups' rows end; forward and backward share it.
_ENDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def group_ends(counts: torch.Tensor) -> torch.Tensor:
    """Where each group's rows end, int64 on the device."""
    if counts not in _ENDS:
        _ENDS[counts] = _ends_of(counts)
    return _ENDS[counts]


def _ends_of(counts: torch.Tensor) -> torch.Tensor:
    """As `group_ends`.

    A 910B computes a cumulative sum of int64 on its own CPU, not on its cores (CANN's cumsum). So the two 32-bit halves
    are summed separately; the upper ones are 0.
    """
    if counts.device.type == "cpu":  # with a capacity the counts are constants; a copy from pinned memory does not wait
        counts = counts.pin_memory().to(f"npu:{torch_npu.npu.current_device()}", non_blocking=True)
    return counts.view(torch.int32).view(-1, 2).cumsum(0, dtype=torch.int32).view(torch.int64).flatten()


def permute(
    tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """npu_moe_token_permute_with_routing_map. torch_npu 2.7 wants the router's weights in the tokens' dtype."""
    if torch_npu.__version__.startswith("2.7."):
        probs = probs.to(tokens.dtype)
    return torch_npu.npu_moe_token_permute_with_routing_map(tokens, routing_map, probs=probs, num_out_tokens=rows)


def unpermute(rows: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    """npu_moe_token_unpermute_with_routing_map, with the indices of its own permute."""
    return torch_npu.npu_moe_token_unpermute_with_routing_map(rows, indices, [tokens, rows.shape[1]])


def gather_product(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, *, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_all_gather_base_mm: x [rows, in] of all ranks times weight [in, out], and if `keep` the gathered x."""
    product, gathered = torch_npu.npu_all_gather_base_mm(
        x.contiguous(), weight, _communicator(group), group.size(), gather_index=0, gather_output=keep
    )
    return product, gathered


def product_scatter(x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """npu_mm_reduce_scatter_base: x [n rows, in] times weight [in, out], summed; this rank's [rows, out]."""
    return torch_npu.npu_mm_reduce_scatter_base(
        x.contiguous(), weight, _communicator(group), group.size(), reduce_op="sum"
    )


def _communicator(group: dist.ProcessGroup) -> str:
    """HCCL's name of a group."""
    backend: Any = group._get_backend(torch.device("npu"))
    return str(backend.get_hccl_comm_name(dist.get_global_rank(group, group.rank())))
