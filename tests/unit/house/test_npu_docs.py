"""docs/npu.md says what the code does."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qwen3_npu import cli
from qwen3_npu.args.pretrain import GROUPS
from qwen3_npu.doctor.checks import PAIRS
from qwen3_npu.kernels import OPERATIONS
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


def test_the_users_environment_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"HCCL_CONNECT_TIMEOUT": "60", "ASCEND_LAUNCH_BLOCKING": "1"}
    monkeypatch.setattr(os, "environ", environment)
    set_environment()
    assert environment["HCCL_CONNECT_TIMEOUT"] == "60"
    assert "TASK_QUEUE_ENABLE" not in environment
    assert environment["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"


def test_files_and_flags_exist() -> None:
    parser = cli.build_parser("test", "", GROUPS, {})
    known = {option for action in parser._actions for option in action.option_strings}
    for path in (ROOT / "docs" / "npu.md", ROOT / "README_CN.md"):
        text = path.read_text()
        for script in set(re.findall(r"examples/[\w/.+-]+\.sh", text)):
            if not re.search(r"generate|evaluate", script):
                assert (ROOT / script).is_file(), script
    for flag in ("--kernels", "--kernel-overrides", "--deterministic", "--no-load-rng", "--loss-compute-mode"):
        assert flag in known
        assert flag in DOCS
    assert "attention" in OPERATIONS
