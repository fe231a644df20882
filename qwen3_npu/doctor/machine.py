"""Collect facts about this machine. Nothing is judged here; code that may crash runs in a separate process."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from qwen3_npu.args.tools.doctor import DoctorArgs
from qwen3_npu.cli import REQUIRED

# Where CANN and the driver write their versions.
_CANN_FILES = ("version.cfg", "compiler/version.info", "runtime/version.info", "toolkit/version.info")
_DRIVER = Path("/usr/local/Ascend/driver/version.info")
# Where CANN's set_env.sh lies, in newer releases and in older ones.
SET_ENV = ("/usr/local/Ascend/cann/set_env.sh", "/usr/local/Ascend/ascend-toolkit/set_env.sh")
# With a second copy on the path it is unclear which one is used.
_SINGLE = ("megatron.core", "torch", "torch_npu", "mindspeed", "transformers", "qwen3_npu")

_DEVICES = """
import json, sys
from qwen3_npu.platform import select_platform
platform = select_platform(sys.argv[1])
import torch
library = {"npu": getattr(torch, "npu", None), "cuda": torch.cuda}.get(platform.name)
count = library.device_count() if library else 0
memory = [list(library.mem_get_info(i)) for i in range(count)]
print("FACTS" + json.dumps({"kind": platform.name, "name": platform.device_name(), "count": count, "memory": memory}))
"""
_ALL_REDUCE = """
import time, torch
import torch.distributed as dist
from qwen3_npu.args.parallel import RuntimeArgs
from qwen3_npu.distributed.launch import process_group
from qwen3_npu.platform import select_platform
import sys
platform = select_platform(sys.argv[1])
with process_group(platform, RuntimeArgs(distributed_timeout_minutes=1)) as world:
    tensor = torch.full((2**22,), world.rank + 1.0, device=world.device)
    dist.all_reduce(tensor)
    platform.synchronize()
    wrong = (tensor != world.size * (world.size + 1) / 2).any().item()
    start = time.perf_counter()
    dist.all_reduce(tensor)
    platform.synchronize()
    if world.rank == 0:
        print("FACTS" + ("wrong sum" if wrong else f"{(time.perf_counter() - start) * 1e3:.1f} ms for 16 MiB"))
"""


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts.

    Attributes:
        packages: distribution -> version, for those that are installed.
        requirements: of this project, as in pyproject.toml; None if it is not installed.
        missing: missing modules that trainings import.
        copies: module -> its folders on the path, if there are several; the imported one first.
        environment: the variables of the process.
        torch_cuda: the CUDA version that torch is built for; None without.
        torch_npu: whether it is installed; only `devices` imports it.
        wrong_apex: a package `apex` is installed that is not NVIDIA's or Ascend's.
        set_env: the usual places of CANN's set_env.sh where there is one.
        cann, driver: versions from their files; None without such a file.
        npu_smi: whether the tool is on the PATH.
        devices: kind, name, count, memory [free, total] bytes each; or {"error": text}.
        wanted: number of devices of a training, if given.
        all_reduce: its output; {"error": text} inside; None if it was not run.
        taken_ports: ports that a job needs and that are in use.
    """

    python: tuple[int, int]
    machine: str
    packages: dict[str, str]
    requirements: list[str] | None
    missing: list[str]
    copies: dict[str, list[str]]
    environment: dict[str, str]
    torch_cuda: str | None
    torch_npu: bool
    wrong_apex: bool
    set_env: list[str]
    cann: str | None
    driver: str | None
    npu_smi: bool
    devices: dict[str, Any]
    wanted: int | None
    all_reduce: dict[str, str] | None
    taken_ports: list[int]


def machine_facts(args: DoctorArgs) -> Facts:
    """The facts of this machine."""
    environment = dict(os.environ)
    wanted = args.npus_per_node or (int(environment["NPUS_PER_NODE"]) if "NPUS_PER_NODE" in environment else None)
    devices = _ask([sys.executable, "-c", _DEVICES, args.device])
    answer = json.loads(devices["answer"]) if "answer" in devices else devices
    all_reduce = None
    if args.all_reduce and "error" not in answer:
        processes = wanted or answer["count"] or 2
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        all_reduce = _ask([*launch, "--no-python", sys.executable, "-c", _ALL_REDUCE, answer["kind"]])
    packages = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return Facts(
        python=sys.version_info[:2],
        machine=platform.machine(),
        packages=packages,
        requirements=_requirements(),
        missing=[name for name in REQUIRED if not _has(name)],
        copies=_copies(sys.path),
        environment=environment,
        torch_cuda=_torch_cuda(),
        torch_npu=_has("torch_npu"),
        wrong_apex=_is_wrong_apex(),
        set_env=[path for path in SET_ENV if Path(path).is_file()],
        cann=_cann(environment),
        driver=_version(_DRIVER),
        npu_smi=shutil.which("npu-smi") is not None,
        devices=answer,
        wanted=wanted,
        all_reduce=all_reduce,
        taken_ports=_taken_ports(environment),
    )


def _ask(command: list[str]) -> dict[str, str]:
    """{"answer": its output after FACTS}, or {"error": its last line}."""
    folder = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
    try:
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": "no answer within 3 minutes"}
    found = re.search(r"FACTS(.*)", result.stdout)
    if found and result.returncode == 0:
        return {"answer": found[1]}
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\w+Error\b|static TLS", line)]
    return {"error": (telling or lines or [f"exit status {result.returncode}"])[-1].strip()}


def _requirements() -> list[str] | None:
    try:
        return [r for r in importlib.metadata.requires("qwen3-npu") or [] if "extra ==" not in r]
    except importlib.metadata.PackageNotFoundError:
        return None


def _has(module: str) -> bool:
    """Whether a module can be found. It is not imported (only `megatron`, the parent of `megatron.core`, is)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _copies(path: list[str]) -> dict[str, list[str]]:
    """Modules that lie in several folders of the path, with the folders, the one that is imported first."""
    found = {}
    for module in _SINGLE:
        folders = [Path(entry or ".").resolve().joinpath(*module.split(".")) for entry in path]
        copies = [str(folder.parent) for folder in folders if (folder / "__init__.py").is_file()]
        spec = importlib.util.find_spec(module) if _has(module) else None
        if spec is not None and spec.origin is not None:
            copies.insert(0, str(Path(spec.origin).resolve().parent.parent))
        if len(copies := list(dict.fromkeys(copies))) > 1:
            found[module] = copies
    return found


def _torch_cuda() -> str | None:
    """The CUDA version in torch's version.py, read and not imported; its package says only "2.7.1" on PyPI."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    found = re.search(r"^cuda\b.*= *'([\d.]+)'", file.read_text() if file.is_file() else "", re.M)
    return found[1] if found else None


def _is_wrong_apex() -> bool:
    """PyPI's `apex` is an unrelated web toolkit; NVIDIA's and Ascend's forks have optimizers or amp."""
    if importlib.util.find_spec("apex") is None:
        return False
    return not any(importlib.util.find_spec(f"apex.{part}") for part in ("optimizers", "amp"))


def _cann(environment: dict[str, str]) -> str | None:
    root = environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME")
    if not root:
        return None
    return next((v for name in _CANN_FILES if (v := _version(Path(root, name)))), None)


def _version(path: Path) -> str | None:
    if not path.is_file():
        return None
    # "Version=8.3.RC1", or "version=[7.8.0.1.231:8.3.RC1]", internal version first.
    found = re.search(r"(?im)^\s*version\s*=\s*\[?(?:[^\]\n]*:)?(\d+\.\d[\w.]*)", path.read_text(errors="replace"))
    return found[1] if found else None


def _taken_ports(environment: dict[str, str]) -> list[int]:
    """Ports of torchrun (on the first node) and HCCL that something listens on."""
    ports = [int(environment.get("MASTER_PORT", "6000"))] if environment.get("NODE_RANK", "0") == "0" else []
    base = int(environment.get("HCCL_IF_BASE_PORT", "25809"))
    taken = []
    for port in [*ports, *range(base, base + 16)]:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("", port))
            except OSError:
                taken.append(port)
    return taken
