"""`python -m qwen3_npu.doctor`: every finding on made-up facts, and the real thing on this machine."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_npu.args.tools.doctor import DoctorArgs
from qwen3_npu.doctor.checks import diagnose
from qwen3_npu.doctor.findings import BLOCKER, WARNING, print_findings
from qwen3_npu.doctor.hosts import look_at_hosts, read_hostfile
from qwen3_npu.doctor.machine import Facts, _cann, _copies
from qwen3_npu.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30
NPU = Facts(
    python=(3, 11),
    machine="aarch64",
    packages={"torch": "2.7.1", "torch-npu": "2.7.1.post4", "megatron-core": "0.16.1"},
    requirements=["torch>=2.7,<2.14", "megatron-core==0.16.1"],
    missing=[],
    copies={},
    environment={"ASCEND_HOME_PATH": "/cann"},
    torch_cuda=None,
    torch_npu=True,
    wrong_apex=False,
    set_env=["/usr/local/Ascend/cann/set_env.sh"],
    cann="9.0.0",
    driver="25.2",
    npu_smi=True,
    devices={"kind": "npu", "name": "Ascend910B2", "count": 8, "memory": [[60 * GIB, 61 * GIB]] * 8},
    wanted=8,
    all_reduce={"answer": "0.4 ms for 16 MiB"},
    taken_ports=[],
)


def bad(**changes: object) -> list[tuple[str, str, str]]:
    """(level, about, text and remedy) of what is not ok."""
    found = diagnose(dataclasses.replace(NPU, **changes))
    return [(f.level, f.about, f"{f.text} -> {f.remedy}") for f in found if f.level != "ok"]


def test_a_good_machine_has_no_complaint() -> None:
    assert bad() == []


TLS = "ImportError: /env/lib/libgomp-d22c30c5.so.1.0.0: cannot allocate memory in static TLS block"
CASES = [
    ({"python": (3, 13)}, BLOCKER, "python", "use Python 3.10, 3.11 or 3.12"),
    ({"requirements": None}, WARNING, "packages", "pip install -e ."),
    (
        {"requirements": None, "missing": ["torch", "numpy"]},
        BLOCKER,
        "packages",
        "missing: torch, numpy -> in the project",
    ),
    (
        {"copies": {"megatron.core": ["/src/Megatron-LM/megatron", "/env/lib/python3.11/site-packages/megatron"]}},
        BLOCKER,
        "imports",
        "imported from /src/Megatron-LM/megatron, and is also in /env/lib",
    ),
    ({"copies": {"qwen3_npu": ["/a", "/b"]}}, WARNING, "imports", "qwen3_npu is imported from /a, and is also in /b"),
    ({"requirements": ["peft>=0.1"]}, BLOCKER, "peft", "pip install 'peft>=0.1'"),
    ({"requirements": ["megatron-core==0.12.1"]}, BLOCKER, "megatron-core", "0.16.1 is installed, ==0.12.1 is needed"),
    ({"torch_npu": False}, BLOCKER, "torch_npu", "an NPU driver but torch_npu is not installed"),
    ({"packages": NPU.packages | {"torch": "2.13.0"}}, BLOCKER, "torch_npu", "built for torch 2.7.1; torch 2.13.0"),
    ({"torch_cuda": "12.6"}, BLOCKER, "torch", "2.7.1 is built for CUDA 12.6; torch_npu needs the CPU build"),
    ({"torch_npu": False}, BLOCKER, "torch_npu", "pip install torch==2.7.1 torch_npu==2.7.1.post4 --extra-index-url"),
    ({"torch_npu": False, "cann": None}, BLOCKER, "torch_npu", "docs/npu.md has the table"),
    ({"environment": {}}, BLOCKER, "CANN", "in this shell -> source /usr/local/Ascend/cann/set_env.sh"),
    (
        {"environment": {}, "set_env": []},
        BLOCKER,
        "CANN",
        "/cann/set_env.sh or /usr/local/Ascend/ascend-toolkit/set_env.sh",
    ),
    ({"cann": "8.1.RC1"}, BLOCKER, "CANN", "8.1.RC1 is not supported"),
    ({"cann": None}, WARNING, "CANN", "no version file"),
    ({"cann": "8.3.RC1"}, WARNING, "CANN", "published for torch_npu 2.7.1.post4 is 9.0.0"),
    ({"packages": NPU.packages | {"torch-npu": "2.7.1.post9"}}, WARNING, "CANN", "no published pair"),
    ({"driver": None, "npu_smi": False}, BLOCKER, "driver", "install the driver"),
    (
        {"devices": {"error": TLS}, "all_reduce": None},
        BLOCKER,
        "devices",
        "LD_PRELOAD=/env/lib/libgomp-d22c30c5.so.1.0.0",
    ),
    (
        {"devices": {"error": "ModuleNotFoundError: No module named 'torch'"}, "all_reduce": None},
        BLOCKER,
        "devices",
        "install torch",
    ),
    ({"devices": {"error": "ImportError: libhccl.so: cannot open"}}, BLOCKER, "devices", "set_env.sh"),
    (
        {"devices": {"error": "RuntimeError: Failed to load the backend extension: torch_npu."}},
        BLOCKER,
        "devices",
        "source /usr/local/Ascend/cann/set_env.sh",
    ),
    ({"wanted": 16}, BLOCKER, "devices", "set NPUS_PER_NODE=8, or look at ASCEND_RT_VISIBLE_DEVICES"),
    (
        {"devices": NPU.devices | {"memory": [[60 * GIB, 61 * GIB], [20 * GIB, 61 * GIB]]}},
        WARNING,
        "memory",
        "device 1: 21.5 GB of 65.5 GB free",
    ),
    ({"all_reduce": {"error": "DistBackendError: timeout"}}, BLOCKER, "all-reduce", "HCCL_SOCKET_IFNAME"),
    ({"all_reduce": {"answer": "wrong sum"}}, BLOCKER, "all-reduce", "faulty"),
    ({"wrong_apex": True}, WARNING, "apex", "pip uninstall apex"),
    ({"taken_ports": [6000, 25810]}, WARNING, "ports", "in use: 6000, 25810"),
]


@pytest.mark.parametrize(("changes", "level", "about", "words"), CASES, ids=[f"{c[2]}: {c[3]}" for c in CASES])
def test_finding(changes: dict, level: str, about: str, words: str) -> None:
    (found,) = bad(**changes)
    assert found[:2] == (level, about)
    assert words in found[2]


def test_exit_status_and_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_findings(diagnose(NPU)) == 0
    assert print_findings(diagnose(dataclasses.replace(NPU, wrong_apex=True))) == 0
    capsys.readouterr()
    assert print_findings(diagnose(dataclasses.replace(NPU, wanted=16))) == 1
    report = capsys.readouterr().out
    assert "-> set NPUS_PER_NODE=8" in report
    assert "1 blockers, 0 warnings" in report


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("version.cfg", "# version: 1.0\nversion=[7.8.0.1.231:8.3.RC1]"),
        ("compiler/version.info", "Version=8.3.RC1\nversion_dir=8.3.RC1"),
    ],
)
def test_the_version_of_cann_is_read(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert _cann({"ASCEND_HOME_PATH": str(tmp_path)}) == "8.3.RC1"
    assert _cann({"ASCEND_HOME_PATH": str(tmp_path / "nothing")}) is None


@pytest.fixture
def ssh(tmp_path: Path) -> str:
    """A command like ssh, to hosts "good", "late" (clock 100 s behind), "apart" (no shared folder) and "closed"."""
    program = tmp_path / "fake_ssh"
    program.write_text(
        "#!/bin/bash\n"
        "host=$1; shift\n"
        "case $host in\n"
        "closed) echo 'Permission denied' >&2; exit 255;;\n"
        "late) echo $(($(date +%s) - 100)).5 shared;;\n"
        'apart) bash -c "$*" | sed s/shared/apart/;;\n'
        '*) bash -c "$*";;\n'
        "esac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_hosts(ssh: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# a cluster\ngood slots=8\nlate\n\napart  # new\nclosed\n")
    assert read_hostfile(str(hosts)) == ["good", "late", "apart", "closed"]
    shared = tmp_path / "shared"
    shared.mkdir()
    found = look_at_hosts(DoctorArgs(hostfile=str(hosts), shared_dir=str(shared), ssh=ssh))
    said = {(f.about, f.level): f"{f.text} -> {f.remedy}" for f in found}
    assert set(said) == {("good", "ok"), ("late", WARNING), ("apart", "ok"), ("apart", BLOCKER), ("closed", BLOCKER)}
    assert "100 s off" in said["late", WARNING] or "99 s off" in said["late", WARNING]
    assert "does not see" in said["apart", BLOCKER]
    assert "Permission denied -> make" in said["closed", BLOCKER]
    assert list(shared.iterdir()) == [], "the file that was looked for is gone again"


def test_a_missing_hostfile_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_hostfile(str(tmp_path / "nothing"))


def test_on_this_machine() -> None:
    environment = os.environ | {"NPUS_PER_NODE": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qwen3_npu.doctor", "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "all-reduce" in result.stdout, result.stdout + result.stderr
    assert "ms for 16 MiB" in result.stdout
    assert result.returncode == ("BLOCKER" in result.stdout)
    result = subprocess.run([*command, "--devise", "x"], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 2
    assert "did you mean --device?" in result.stderr


def bare_python(folder: Path) -> dict[str, str]:
    """Variables with which `python -S -E` finds nothing but its own library and this project."""
    return {"PATH": os.environ["PATH"], "HOME": str(folder)}


def test_a_bare_python_is_told_what_to_install(tmp_path: Path) -> None:
    # -S: without site-packages; -E: without PYTHONPATH. The project is found from its folder.
    command = [sys.executable, "-S", "-E", "-m", "qwen3_npu.doctor", "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, env=bare_python(tmp_path), cwd=ROOT)
    assert "Traceback" not in result.stderr + result.stdout
    assert result.returncode == 1
    assert re.search(r"BLOCKER +packages .*missing: torch, megatron[.-]core, numpy", result.stdout)
    assert "pip install -e ." in result.stdout


_HELP = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run = runpy.run_path if name.endswith(".py") else runpy.run_module
            run(name, run_name="__main__")
    except SystemExit as stop:
        print(name, stop.code)
sys.argv = "pretrain_gpt.py --model qwen3-0.6b --from-scratch --lr 1 --data-path x --train-iters 1".split()
runpy.run_path("pretrain_gpt.py", run_name="__main__")
"""


def test_a_bare_python_shows_every_help_and_names_the_first_missing_package(tmp_path: Path) -> None:
    programs = sorted(path.name for path in ROOT.glob("*.py"))
    programs += [f"qwen3_npu.{path.parent.name}" for path in sorted((ROOT / "qwen3_npu").glob("*/__main__.py"))]
    command = [sys.executable, "-S", "-E", "-c", _HELP, *programs]
    result = subprocess.run(command, capture_output=True, text=True, env=bare_python(tmp_path), cwd=ROOT)
    assert result.stdout.splitlines() == [f"{name} 0" for name in programs], result.stderr
    assert len(programs) == 13
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.endswith(f"is not installed in {sys.executable}; python -m qwen3_npu.doctor lists what to install")


def test_a_second_megatron_on_the_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "__init__.py").touch()
    found = _copies([*sys.path, str(tmp_path)])["megatron.core"]
    assert "site-packages" in found[0], "the one that is imported comes first"
    assert found[1:] == [str(tmp_path / "megatron")]
    assert "megatron.core" not in _copies(sys.path)
