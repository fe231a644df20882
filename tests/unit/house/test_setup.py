"""tests/setup.sh: which environment is used, and what is installed there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_npu.cli import REQUIRED

ROOT = Path(__file__).resolve().parents[3]

# An interpreter whose site-packages is a folder of the test; its pip writes down what it is asked for.
_PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" = "-m pip" ]; then
    echo "$@" >> {log}
    while [ $# -gt 0 ]; do
        if [ "$1" = -c ]; then cat "$2" >> {log}; fi
        shift
    done
    exit 0
fi
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin" && cp "{bare}" "$3/bin/python"
    exit 0
fi
PYTHONPATH={site} exec {real} -S "$@"
"""


def interpreter(folder: Path, log: Path, **versions: str) -> Path:
    """A python in which these distributions are installed, torch and torch_npu without their files' content."""
    site = folder / "site"
    site.mkdir(parents=True)
    for name, version in versions.items():
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("raise ImportError('CANN is not in this shell')")
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    path = folder / "bin" / "python"
    path.parent.mkdir()
    path.write_text(_PYTHON.format(log=log, site=site, real=sys.executable, bare=path))
    path.chmod(0o755)
    return path


def set_up(root: Path, **variables: str) -> tuple[str, str]:
    """(what tests/setup.sh prints, the python that is used), for a copy of the project's three files in `root`."""
    result = run_setup(root, **variables)
    assert result.returncode == 0, result.stderr
    said, _, python = result.stdout.rstrip().rpartition("\n")
    return said, python


def run_setup(root: Path, **variables: str) -> subprocess.CompletedProcess:
    (root / "tests").mkdir(exist_ok=True)
    for name in ("tests/setup.sh", "constraints.txt", "pyproject.toml"):
        (root / name).write_text((ROOT / name).read_text())
    script = "source tests/setup.sh; qwen3_npu_setup dev pytest; echo; echo $PYTHON"
    variables = {"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"], **variables}
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=variables, cwd=root)


@pytest.mark.parametrize("variable", ["CONDA_PREFIX", "VIRTUAL_ENV"])
def test_an_active_environment_with_torch_is_used_and_keeps_its_torch(variable: str, tmp_path: Path) -> None:
    log = tmp_path / "pip.log"
    python = interpreter(tmp_path / "env", log, torch="2.7.1", torch_npu="2.7.1.post4", numpy="1.26.4")
    said, used = set_up(tmp_path, **{variable: str(tmp_path / "env")})
    assert used == str(python)
    assert "its torch stays as it is" in said
    asked = log.read_text().splitlines()
    assert f"-e {tmp_path}[dev]" in asked[0]
    assert {"torch==2.7.1", "torch-npu==2.7.1.post4", "numpy==1.26.4"} <= set(asked)
    assert not any(line.startswith("torch==2.13") or line.startswith("numpy==2.") for line in asked)
    assert any(line.startswith("pytest==") for line in asked), "what is not there comes as the tests had it"
    assert not (tmp_path / ".venv").exists()


def test_where_nothing_is_missing_nothing_is_installed(tmp_path: Path) -> None:
    log = tmp_path / "pip.log"
    names = [name.split(".")[0] for name in REQUIRED] + ["pytest"]
    interpreter(tmp_path / "env", log, **dict.fromkeys(names, "2.13"))
    (tmp_path / "env" / "site" / "megatron" / "__init__.py").unlink()
    (tmp_path / "env" / "site" / "megatron" / "core").mkdir()
    set_up(tmp_path, VIRTUAL_ENV=str(tmp_path / "env"))
    assert not log.exists()
    (tmp_path / "env" / "site" / "xxhash" / "__init__.py").unlink()
    (tmp_path / "env" / "site" / "xxhash").rmdir()
    set_up(tmp_path, VIRTUAL_ENV=str(tmp_path / "env"))
    assert f"-e {tmp_path}[dev]" in log.read_text()


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"torch": "2.6.0"}, "torch 2.6.0; torch>=2.7,<2.14 is needed"),
        ({"torch": "2.14.0+cpu"}, "torch 2.14.0+cpu; torch>=2.7,<2.14 is needed"),
        ({"torch": "2.7.1", "megatron_core": "0.12.1"}, "megatron-core 0.12.1; megatron-core==0.16.1 is needed"),
    ],
)
def test_what_would_have_to_be_replaced_is_named_and_left(versions: dict, words: str, tmp_path: Path) -> None:
    interpreter(tmp_path / "env", tmp_path / "pip.log", **versions)
    result = run_setup(tmp_path, VIRTUAL_ENV=str(tmp_path / "env"))
    assert (result.returncode, result.stdout) == (1, "")
    assert f" has {words}. Install that there, or activate another" in result.stderr
    assert not (tmp_path / "pip.log").exists()


def test_python_may_be_a_path_from_here_and_must_exist(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "env", tmp_path / "pip.log", torch="2.7.1")
    assert set_up(tmp_path, PYTHON="env/bin/python")[1] == str(python)
    result = run_setup(tmp_path, PYTHON="env/bin/python9")
    assert (result.returncode, result.stderr) == (1, "error: PYTHON=env/bin/python9: no such program\n")


def test_without_torch_an_environment_of_the_projects_own_is_made(tmp_path: Path) -> None:
    log = tmp_path / "pip.log"
    bare = interpreter(tmp_path / "env", log)
    said, used = set_up(tmp_path, PYTHON=str(bare))
    assert used == str(tmp_path / ".venv" / "bin" / "python")
    assert "installing into" in said
    assert "torch==2.13.0" in log.read_text().splitlines()
