"""docs/npu.md says what the code does."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qwen3_npu.doctor.checks import PAIRS
from qwen3_npu.platform.npu import ENVIRONMENT, PEAK_FLOPS, set_environment

ROOT = Path(__file__).resolve().parents[3]
DOCS = (ROOT / "docs" / "npu.md").read_text()


def test_environment_and_versions() -> None:
    for name, (value, _) in ENVIRONMENT.items():
        assert re.search(rf"\| {name} \| {re.escape(value)}( |\()", DOCS), name
    for torch_npu, cann in PAIRS.items():
        assert re.search(rf"\| {re.escape(torch_npu)} \| [\d.]+ \| {re.escape(cann)} \|", DOCS), torch_npu
    assert "never run" in (ROOT / "qwen3_npu" / "kernels" / "npu.py").read_text()
    assert set(PEAK_FLOPS.values()) == {354e12}


def test_variables_that_scripts_for_npus_carry_are_explained() -> None:
    # Those of the documents that users of MindSpeed-LLM and MindFormers come with.
    names = (
        "GLOO_SOCKET_IFNAME HCCL_LOGIC_SUPERPOD_ID HCCL_WHITELIST_DISABLE ASCEND_SLOG_PRINT_TO_STDOUT COMBINED_ENABLE"
    )
    names += " HCCL_NPU_SOCKET_PORT_RANGE HCCL_PORT_RANGE CPU_AFFINITY_CONF STREAMS_PER_DEVICE"
    for name in names.split():
        assert re.search(rf"^\| [^|]*\b{name}\b[^|]*\|", DOCS, re.M), name
    for words in (
        "parity --device npu        # the first thing to run",
        "not supported",
        "Atlas 800I A2",
        "8.1 and older",
    ):
        assert words in DOCS


def test_both_places_of_set_env_are_named() -> None:
    for place in ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit"):
        for text in (DOCS, (ROOT / "README_CN.md").read_text()):
            assert place in text
    assert "{cann,ascend-toolkit}/set_env.sh" in (ROOT / "docker" / "Dockerfile.npu").read_text()


def test_the_users_environment_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"HCCL_CONNECT_TIMEOUT": "60", "ASCEND_LAUNCH_BLOCKING": "1"}
    monkeypatch.setattr(os, "environ", environment)
    set_environment()
    assert environment["HCCL_CONNECT_TIMEOUT"] == "60"
    assert "TASK_QUEUE_ENABLE" not in environment
    assert environment["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
