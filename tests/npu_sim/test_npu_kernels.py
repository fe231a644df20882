"""Kernels of the simulated NPU: torch_npu's real calls, checked by its host code, give what the reference gives."""

from __future__ import annotations

import pytest

from worlds import CaseFailed, World

# Errors in the kernels' use, and who must notice. Each has happened to somebody.
MUTATIONS = {
    "mask inverted": ("device=device).triu(1)", "device=device).tril()", "attention"),
    "mask dropped": (
        "atten_mask=_compressed_mask(q.device) if causal else None,\n        scale=",
        "scale=",
        "attention",
    ),
    "sparse_mode 0": ("_ALL, _CAUSAL = 0, 3", "_ALL, _CAUSAL = 0, 0", "attention"),
    "leftUpCausal": ("_ALL, _CAUSAL = 0, 3", "_ALL, _CAUSAL = 0, 2", "attention, last positions"),
    "scale dropped": ("        scale=scale,\n        keep_prob", "        keep_prob", "attention"),
    "leading 0 in the lengths": ("list(cu_seqlens[1:])", "list(cu_seqlens)", "attention, packed"),
    "lengths not cumulative": (
        "list(cu_seqlens[1:])",
        "[b - a for a, b in zip(cu_seqlens, cu_seqlens[1:])]",
        "attention, packed",
    ),
    "statistics in another order": ('return "TND" if', 'return "" if', "attention block, packed"),
    "gradient without scale": ("        scale_value=scale,\n", "", "attention block, full"),
    "swiglu halves swapped": (
        "torch_npu.npu_swiglu(x, dim=-1)",
        "torch_npu.npu_swiglu(torch.cat(x.chunk(2, -1)[::-1], -1), dim=-1)",
        "swiglu",
    ),
    "epsilon lost": ("npu_rms_norm(x, weight, epsilon=eps)", "npu_rms_norm(x, weight)", "rms_norm, another epsilon"),
    "epsilon of the sum lost": (
        "weight, epsilon=eps)\n        ctx.save_for_backward(total",
        "weight)\n        ctx.save_for_backward(total",
        "add_rms_norm",
    ),
    "gradient of the sum lost": ("        dx.add_(grad_total)\n", "", "add_rms_norm"),
    "weight gradient turned": (
        "_add_products(total.unsqueeze(0), grad, x,",
        "_add_products(total.unsqueeze(0), x, grad,",
        "add_weight_gradient, bf16",
    ),
    "weight gradient not added": (
        "total.add_(gradient)",
        "total.copy_(gradient)",
        "rms_norm, into the sum",
    ),
    "rotated the same way back": ("_NEGATED[sin] = -sin", "_NEGATED[sin] = sin", "rotary"),
    "rotary of the other kind": (
        '(x, cos, sin, rotary_mode="half"',
        '(x, cos, sin, rotary_mode="interleave"',
        "rotary",
    ),
    "counts instead of ends": (".cumsum(0, dtype=torch.int32)", "", "grouped_matmul"),
    "weights not turned for dx": ("weight.transpose(1, 2)", "weight", "grouped_matmul"),
    "gradient of weights by rows": (
        "dw = _grouped(x.t(), grad, ends, group_type=2)",
        "dw = _grouped(x, grad, ends, group_type=0)",
        "grouped_matmul",
    ),
    "no router weights": ("probs=probs, num_out_tokens", "num_out_tokens", "permute and unpermute"),
    "decoding without heads": ("        num_key_value_heads=k.shape[2],\n", "", "decode, one query"),
    "keys of other sequences": ("list(lengths)", "[max(lengths)] * len(lengths)", "decode from a cache, lengths"),
    "dropout ignored": ("        keep_prob=1.0 - dropout,\n", "", "attention, dropout"),
    "dy in float32": ("_to(layout, grad.to(q.dtype))", "_to(layout, grad)", "attention block, 16 bits"),
    "attention_in in float32": ("_to(layout, out.to(q.dtype))", "_to(layout, out)", "attention block, 16 bits"),
    "router weights in float32": ('startswith("2.7.")', 'startswith("none")', "permute, torch_npu 2.7"),
    "a mask for one query": ("many = q.shape[0] > 1", "many = True", "decode, one query"),
}


def wrong(results: dict[str, float | str]) -> dict[str, float | str]:
    """The kernels that raised or differ; decoding and one block are in bfloat16."""
    return {
        name: result
        for name, result in results.items()
        if isinstance(result, str)
        or not result <= (2e-2 if name.startswith(("decode", "attention block, 16")) else 5e-6)
    }


def test_operators_of_mindspeed_are_called_as_documented(npu_worlds: dict[int, World]) -> None:
    assert not wrong(npu_worlds[1].run("kernel_cases.mindspeed_differences"))


def test_forward_and_backward_equal_the_reference(npu_worlds: dict[int, World]) -> None:
    results = npu_worlds[1].run("kernel_cases.kernel_differences")
    assert len(results) == 28
    assert wrong(results) == {}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_call_is_noticed(name: str, npu_worlds: dict[int, World]) -> None:
    old, new, noticed_by = MUTATIONS[name]
    assert noticed_by in wrong(npu_worlds[1].run("kernel_cases.kernel_differences", change=(old, new)))


# Faults that show in backward only; all of MUTATIONS were tried by hand (docs/passport.md).
FOUND_BY_PASSPORT = {
    "gradient of the sum lost": ("layers.1.pre_mlp_layernorm", "add_rms_norm", "backward", "gradient of input 1"),
    "weight gradient not added": (
        "layers.0.input_layernorm.weight",
        "rms_norm",
        "backward",
        "gradient of the weight",
    ),
}


def test_a_faulty_kernel_is_named_and_right_ones_are_not(npu_worlds: dict[int, World]) -> None:
    changes = [None, *(MUTATIONS[name][:2] for name in FOUND_BY_PASSPORT)]
    case = "packed bf16"
    said = npu_worlds[1].run("passport_cases.first_operators", cases=[case], changes=changes)
    used, *nothing = said[0][case]
    assert not nothing
    assert used < 0.7
    assert [tuple(one[case][3:7]) for one in said[1:]] == list(FOUND_BY_PASSPORT.values())


def test_the_simulated_device_refuses_what_a_real_one_does(npu_worlds: dict[int, World]) -> None:
    said = npu_worlds[1].run("refusals")
    expected = {
        "devices": "expected all tensors on one device",
        "device numbers": "expected all tensors on one device",
        "matmul of devices": "expected all tensors on one device",
        "head_num": "head_num must > 0",
        "layout": "layout",
        "keep_prob": "keep_prob",
        "sparse_mode": "sparse_mode",
        "rotary_mode": "rotary_mode",
        "inner_precise": "not emulated",
    }
    assert {name: text for name, text in said.items() if expected[name].lower() not in text.lower()} == {}


def test_what_a_devices_own_cpu_would_compute_is_refused_inside_of_a_step(npu_worlds: dict[int, World]) -> None:
    integers = ["cumsum of int64", "topk of int64", "masked_fill of int64"]
    others = ["sort of int64", "scatter of bool", "searchsorted of int64", "__rshift__ of int32", "mul of int16", ""]
    assert npu_worlds[1].run("on_aicpu") == [*integers, "", *others]


def test_waits_of_the_host_are_seen_and_missing_ones_are_told(npu_worlds: dict[int, World]) -> None:
    waits = {"pinned": 0, "pageable": 1, "blocking": 1, "item": 1, "tolist": 1, "event": 0, "stream": 1}
    found = npu_worlds[1].run("waits")
    assert found.pop("unordered").startswith("a copy in a stream that has not waited")
    assert found.pop("given back").startswith("memory is given back to a stream that has not waited")
    assert found.pop("too early") != 3
    assert found == {**waits, "in time": 3, "too early in the first stream": 0, "in time there": 3}


def test_random_numbers_follow_the_devices_generator(npu_worlds: dict[int, World]) -> None:
    first, again, after = npu_worlds[1].run("random_state")
    assert first == again
    assert first != after


COLLECTIVES = {
    "sum": [[30, 32], [30, 32]],
    "max": [[20, 21], [20, 21]],
    "min": [[10, 11], [10, 11]],
    "broadcast": [[20, 21], [20, 21]],
    "all_gather": [[10, 11, 20, 21], [10, 11, 20, 21]],
    "reduce_scatter": [[30], [32]],
    "all_to_all": [[10, 20], [11, 12, 21, 22]],
    "ring": [[20, 21], [10, 11]],
}


def test_collectives(npu_worlds: dict[int, World]) -> None:
    got = npu_worlds[2].run("collectives")
    assert all("cpu" in text for text in got.pop("host tensor"))
    assert got == COLLECTIVES


def test_a_maximum_reduced_as_a_sum_is_noticed(npu_worlds: dict[int, World]) -> None:
    assert npu_worlds[2].run("collectives", maximum="SUM")["max"] != COLLECTIVES["max"]


@pytest.mark.parametrize("frozen", [False, True])
def test_fused_products_are_those_of_whole_matrices(frozen: bool, npu_worlds: dict[int, World]) -> None:
    """Products and exchanges of bfloat16: forward, and the gradients of input and weights."""
    world = npu_worlds[2]
    before = world.run("operation_calls")
    found = world.run("overlap_cases.differences", fused=True, frozen=frozen)
    assert max(found.values()) < 1e-2
    calls = {name: count - before.get(name, 0) for name, count in world.run("operation_calls").items()}
    assert calls["npu_all_gather_base_mm"] == 2  # forward of the first, backward of the second
    assert calls["npu_mm_reduce_scatter_base"] == 1 + int(frozen)


def test_a_fused_gather_that_keeps_nothing_is_noticed(npu_worlds: dict[int, World]) -> None:
    change = ("keep=x is not None)", "keep=False)")
    with pytest.raises(CaseFailed):
        npu_worlds[2].run("overlap_cases.differences", fused=True, change=change)
