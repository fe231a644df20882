"""npu_fusion_attention, its gradient and the inference operation, by the mathematics of torch_npu's documentation.

What the documentation demands of the arguments is demanded here; what it allows and our code does not use is refused.
Inputs and outputs lie on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sim import dropout

_INFINITE = 2**31 - 1
_TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
_UNUSED = {"pse": None, "padding_mask": None, "inner_precise": 0, "prefix": None, "sink": None}
_UNUSED |= {"dropout_mask": None, "pre_tockens": _INFINITE}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def only_defaults(given: dict[str, Any], defaults: dict[str, Any]) -> None:
    for name, value in defaults.items():
        if given.get(name, value) != value:
            raise NotImplementedError(f"{name}={given[name]!r} is not emulated")


def _masked(s: int, t: int, sparse_mode: int, mask: torch.Tensor | None) -> torch.Tensor | None:
    """[s, t], True where a score is hidden."""
    if mask is None:
        require(sparse_mode == 0, f"sparse_mode {sparse_mode} without atten_mask is ignored: full attention")
        return None
    require(sparse_mode in (2, 3), f"sparse_mode {sparse_mode} with a mask is not emulated")
    require(mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}, not bool or uint8")
    require(tuple(mask.shape[-2:]) == (2048, 2048), f"sparse_mode {sparse_mode} needs a [2048, 2048] atten_mask")
    require(torch.equal(mask.reshape(2048, 2048).bool(), _TRIANGLE), "atten_mask must be triu(ones, 1): 1 hides")
    offset = t - s if sparse_mode == 3 else 0
    return torch.arange(t)[None] > torch.arange(s)[:, None] + offset


def _segments(
    tensors: list[torch.Tensor], heads: int, layout: str, q_ends: list[int] | None, k_ends: list[int] | None
) -> Iterator[list[torch.Tensor]]:
    """[b, heads, length, d] of each document, or of everything; tensors 1 and 2 are key and value."""
    if layout == "SBH":
        d = tensors[0].shape[-1] // heads
        yield [x.unflatten(2, (-1, d)).permute(1, 2, 0, 3).float() for x in tensors]
        return
    if layout == "BSND":
        yield [x.transpose(1, 2).float() for x in tensors]
        return
    starts = [0, *q_ends[:-1]], [0, *k_ends[:-1]]
    for q_range, k_range in zip(zip(starts[0], q_ends, strict=True), zip(starts[1], k_ends, strict=True), strict=True):
        ranges = [k_range if i in (1, 2) else q_range for i in range(len(tensors))]
        yield [x[a:b].transpose(0, 1)[None].float() for x, (a, b) in zip(tensors, ranges, strict=True)]


def _back(parts: list[torch.Tensor], layout: str, like: torch.Tensor) -> torch.Tensor:
    """The reverse of `_segments` for results."""
    if layout == "SBH":
        return parts[0].permute(2, 0, 1, 3).flatten(2).to(like.dtype)
    if layout == "BSND":
        return parts[0].transpose(1, 2).to(like.dtype)
    return torch.cat([part[0].transpose(0, 1) for part in parts]).to(like.dtype)


def _stored(parts: list[torch.Tensor], layout: str, softmax_layout: str) -> torch.Tensor:
    """Softmax statistics [b, n, s, 1] as the operation gives them: eight copies.

    TND without softmax_layout has the order NTD, within the shape of TND.
    """
    if layout != "TND":
        return parts[0].expand(*parts[0].shape[:-1], 8).contiguous()
    tnd = torch.cat([part[0].transpose(0, 1) for part in parts]).expand(-1, -1, 8).contiguous()
    return tnd if softmax_layout == "TND" else tnd.transpose(0, 1).contiguous().view(tnd.shape)


def _loaded(stored: torch.Tensor, layout: str, softmax_layout: str) -> torch.Tensor:
    """Statistics as [b, n, s, 1] or [s, n, 1]."""
    require(stored.dtype == torch.float32 and stored.shape[-1] == 8, "softmax_max and softmax_sum: float32, [..., 8]")
    if layout == "TND" and softmax_layout != "TND":
        s, n, _ = stored.shape
        stored = stored.view(n, s, 8).transpose(0, 1)
    return stored[..., :1]


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, layout: str, given: dict[str, Any]) -> None:
    only_defaults(given, _UNUSED)
    require(layout in ("SBH", "BSND", "TND"), f"layout {layout} is not emulated")
    require(q.dtype == k.dtype == v.dtype, f"query, key and value differ: {q.dtype}, {k.dtype}, {v.dtype}")
    q_ends, k_ends = given.get("actual_seq_qlen"), given.get("actual_seq_kvlen")
    if layout != "TND":
        fits = q.shape[-1] % heads == 0 if layout == "SBH" else q.shape[2] == heads and heads % k.shape[2] == 0
        require(fits and q_ends is None and k_ends is None, f"{layout}: heads or lengths do not fit")
        return
    for ends, x in ((q_ends, q), (k_ends, k)):
        require(bool(ends) and ends[0] > 0, f"lengths are cumulative without a leading 0, not {ends}")
        require(ends == sorted(ends) and ends[-1] == x.shape[0], f"lengths {ends} of {x.shape[0]} tokens")
    require(q.shape[1] == heads and heads % k.shape[1] == 0, "TND: head_num does not fit")


def _scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, given: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masked scores, and k and v for every query head."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    masked = _masked(q.shape[2], k.shape[2], given.get("sparse_mode", 0), given.get("atten_mask"))
    return scores if masked is None else scores.masked_fill(masked, float("-inf")), k, v


def _dropped(weights: torch.Tensor, given: dict[str, Any], segment: int, *, is_new: bool = False) -> torch.Tensor:
    """Dropout of weights, or of their gradients: the same positions for the same seed."""
    keep = given.get("keep_prob", 1.0)
    if keep == 1.0:
        return weights
    mask = dropout.kept(weights.shape, keep, given["seed"] + segment)
    return weights * (dropout.note(mask) if is_new else mask) / keep


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_num: int, input_layout: str, **given: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]:
    """npu_fusion_attention."""
    _check(q, k, v, head_num, input_layout, given)
    ends = given.get("actual_seq_qlen"), given.get("actual_seq_kvlen")
    outs, maxima, sums, keys = [], [], [], []
    for qs, ks, vs in _segments([q, k, v], head_num, input_layout, *ends):
        scores, _, vs = _scores(qs, ks, vs, given.get("scale", 1.0), given)
        largest = scores.amax(-1, keepdim=True)
        exponentials = (scores - largest).exp()
        total = exponentials.sum(-1, keepdim=True)
        outs.append(_dropped(exponentials / total, given, len(outs), is_new=True) @ vs)
        maxima.append(largest)
        sums.append(total)
        keys.append(scores.shape[-1])
    order = given.get("softmax_layout", "")
    stored = _stored(maxima, input_layout, order), _stored(sums, input_layout, order)
    drops = given.get("keep_prob", 1.0) < 1.0
    numels = sum(largest.numel() * length for largest, length in zip(maxima, keys, strict=True)) if drops else 0
    return _back(outs, input_layout, q), *stored, torch.empty(0, dtype=q.dtype), given.get("seed", 0), 0, numels


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dy: torch.Tensor, head_num: int, input_layout: str, **given: Any
) -> tuple[torch.Tensor, ...]:
    """npu_fusion_attention_grad; from the statistics and the output that it is given, as the real one."""
    _check(q, k, v, head_num, input_layout, given)
    for name, value in (("dy", dy), ("attention_in", given["attention_in"])):
        require(value.dtype == q.dtype and value.shape == q.shape, f"{name} must be as query, {q.dtype}")
    ends = given.get("actual_seq_qlen"), given.get("actual_seq_kvlen")
    order, scale = given.get("softmax_layout", ""), given.get("scale_value", 1.0)
    largest, total = (_loaded(given[name], input_layout, order) for name in ("softmax_max", "softmax_sum"))
    parts: list[list[torch.Tensor]] = [[], [], []]
    start = 0
    for qs, ks, vs, ds, outs in _segments([q, k, v, dy, given["attention_in"]], head_num, input_layout, *ends):
        groups, length = ks.shape[1], qs.shape[2]
        scores, k_all, v_all = _scores(qs, ks, vs, scale, given)
        if input_layout == "TND":
            statistics = [x[start : start + length].transpose(0, 1)[None] for x in (largest, total)]
            start += length
        else:
            statistics = [largest, total]
        weights = (scores - statistics[0]).exp() / statistics[1]
        segment = len(parts[0])
        d_weights = _dropped(ds @ v_all.transpose(-1, -2), given, segment)
        d_scores = weights * (d_weights - (ds * outs).sum(-1, keepdim=True)) * scale
        dk, dv = d_scores.transpose(-1, -2) @ qs, _dropped(weights, given, segment).transpose(-1, -2) @ ds
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
        for part, value in zip(parts, (d_scores @ k_all, dk, dv), strict=True):
            part.append(value)
    dq, dk, dv = (_back(part, input_layout, like) for part, like in zip(parts, (q, k, v), strict=True))
    return dq, dk, dv, torch.empty(0), torch.empty(0)


def infer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_fused_infer_attention_score."""
    known = {
        "atten_mask",
        "actual_seq_lengths_kv",
        "num_heads",
        "num_key_value_heads",
        "scale",
        "input_layout",
        "sparse_mode",
    }
    if unknown := {name for name in given if given[name] is not None} - known:
        raise NotImplementedError(f"{unknown} are not emulated")
    layout, mask = given.get("input_layout"), given.get("atten_mask")
    require(layout in ("BSND", "BNSD"), f"layout {layout} is not emulated")
    require(q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype, f"no {q.dtype} in inference")
    require(all(x.is_contiguous() for x in (q, k, v)), "inputs must be contiguous")
    heads_first = [x.transpose(1, 2) if layout == "BSND" else x for x in (q, k, v)]
    query, key, value = (x.float() for x in heads_first)
    heads = given.get("num_heads", 1), given.get("num_key_value_heads", 0)
    require(query.shape[1] == heads[0] and key.shape[1] == (heads[1] or heads[0]), f"heads {heads} do not fit")
    hidden = None
    if query.shape[2] == 1:  # sparse_mode has no effect then
        given["sparse_mode"] = 0
    if given.get("sparse_mode", 0) == 0 and mask is not None:  # a whole mask
        require(query.shape[2] == 1, "a whole mask with several queries is not emulated")
        require(tuple(mask.shape) == (len(query), 1, 1, key.shape[2]), f"a mask of shape {tuple(mask.shape)}")
        hidden = given.pop("atten_mask")
    lengths = given.get("actual_seq_lengths_kv")
    if lengths is not None:
        require(mask is None and query.shape[2] == 1, "lengths with a mask or several queries are not emulated")
        require(len(lengths) == len(query) and all(0 < n <= key.shape[2] for n in lengths), f"lengths {lengths}")
        hidden = (torch.arange(key.shape[2]) >= torch.tensor(lengths)[:, None])[:, None, None]
    scores, _, value = _scores(query, key, value, given.get("scale", 1.0), given)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    out = (scores.softmax(-1) @ value).to(q.dtype)
    return out.transpose(1, 2) if layout == "BSND" else out, torch.zeros(1)
