"""Each call of torch_npu is one that torch_npu 2.7.1 and 2.13.0 both accept."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from calls import VERSIONS, calls, complaints, schemas

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "".join((ROOT / "qwen3_npu" / "kernels" / name).read_text() for name in ("npu.py", "npu_gradients.py"))
CALLS = list(calls(SOURCE))


def test_every_operation_is_seen() -> None:
    """No call escapes the check, and what is asked for at the start is what is called."""
    called = {call.func.attr for call in CALLS}
    needed = set(re.findall(r'"(npu_\w+)"', SOURCE))
    assert called == needed
    assert len(called) == 14


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.func.attr)
def test_calls_fit_the_schema(call: object, version: str) -> None:
    assert complaints(call, version) == []


@pytest.mark.parametrize(
    ("source", "accepted_by"),
    [
        ("torch_npu.npu_swiglu(x, dim=-1)", VERSIONS),
        ("torch_npu.npu_rotary_mul(x, c, s, rotate=r)", ("2.13.0",)),
        ('torch_npu.npu_fusion_attention(q, k, v, n, "SBH", sink=s)', ("2.13.0",)),
        ('torch_npu.npu_fusion_attention(q, k, v, n, "SBH", next_tokens=0)', ()),
        ('torch_npu.npu_fusion_attention(q, k, v, "SBH", n)', ()),
        ('torch_npu.npu_fusion_attention(q, k, v, 4, layout, sparse_mode="3")', ()),
        ("torch_npu.npu_fusion_attention(q, k, v)", ()),
        ("torch_npu.npu_grouped_matmul([x], [w], None, group_list=g)", ()),
        ("torch_npu.npu_gmm(x, w)", ()),
        ("torch_npu.npu_swiglu(*x)", ()),
    ],
)
def test_the_check_finds_wrong_calls(source: str, accepted_by: tuple[str, ...]) -> None:
    (call,) = calls(source)
    assert tuple(v for v in VERSIONS if not complaints(call, v)) == tuple(accepted_by)


def test_schemas_are_of_both_versions() -> None:
    old, new = (schemas(version) for version in VERSIONS)
    assert set(old) == set(new)
    assert len(new["npu_fusion_attention"].arguments) > len(old["npu_fusion_attention"].arguments)
