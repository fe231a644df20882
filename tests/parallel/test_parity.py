"""The certificate as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_breach_is_named_and_fails() -> None:
    """Rounding makes rows of TP differ by more than a millionth, rows of PP by less."""
    command = [sys.executable, "-m", "qwen3_npu.parity", "--device", "cpu", "--processes", "2"]
    command += ["--rows", "^untied: (PP2|TP2 SP|TP2 PP2)$", "--tolerance", "1e-6"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    lines = {line.split(" loss ")[0].strip(): line for line in done.stdout.splitlines() if " loss " in line}
    assert lines["untied: PP2"].endswith("ok"), done.stdout + done.stderr
    assert "BREACH in model.layers" in lines["untied: TP2 SP"]
    assert "1 rows left out" in done.stdout
    assert "1 of 2 rows differ" in done.stderr
    assert done.returncode == 1


def test_rows_that_do_not_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_npu.parity", "--rows", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--list-rows" in done.stderr
