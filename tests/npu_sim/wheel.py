"""The published torch_npu wheel in a folder of its own, and a stub CANN under it.

torch_npu must never be in the environment of the tests: where it is installed and CANN is not, `import torch` fails. So
it lies in a side folder (made once, in the user's cache) that only the simulated processes see.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

VERSION = "2.13.0"
HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qwen3_npu"
# Libraries that torch_npu links or opens; all are the one stub under another name.
LIBRARIES = (
    "ascend_hal hccl acl_op_compiler ge_runner graph atb acl_tdt_channel acl_tdt_queue runtime msprofiler profapi opapi"
)


def why_not() -> str | None:
    """Why the wheel cannot run here; None if it can."""
    if not torch.__version__.startswith(f"{VERSION}"):
        return f"the wheel torch_npu {VERSION} needs torch {VERSION}, not {torch.__version__}"
    if torch.version.cuda is not None:
        return "torch_npu does not load beside a CUDA build of torch"
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return f"the stub is built for Linux on x86_64, not {sys.platform} on {platform.machine()}"
    missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; the stub CANN is compiled for the test"
    return None


def environment() -> dict[str, str]:
    """What a process needs in its environment to import torch_npu on this machine.

    Raises:
        RuntimeError: the wheel cannot be had, with the reason.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    site = _site()
    library = _stub(site)
    paths = [str(site), str(HERE), str(HERE.parent), str(HERE.parent / "parallel" / "support"), str(HERE.parents[1])]
    return {
        "LD_LIBRARY_PATH": str(library),
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # the worker imports torch_npu itself
        "TASK_QUEUE_ENABLE": "0",  # a call that is wrong raises where it is made
    }


def _site() -> Path:
    site = CACHE / f"torch_npu-{VERSION}-cp{sys.version_info.major}{sys.version_info.minor}"
    if (site / "torch_npu").is_dir():
        return site
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--target", f"{folder}/site", f"torch_npu=={VERSION}"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"pip could not get torch_npu {VERSION}: {last}")
        _publish(Path(folder, "site"), site)
    return site


def _publish(made: Path, place: Path) -> None:
    """Rename, unless another process was faster."""
    try:
        made.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def _stub(site: Path) -> Path:
    """Build the stub: `runtime.c`, and for every other CANN symbol that the wheel links one that ends the process."""
    sources = [HERE / "stub_cann" / "runtime.c", Path(__file__)]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    library = CACHE / f"stub_cann-{VERSION}-{key}"
    if library.is_dir():
        return library
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        build = Path(folder, "lib")
        build.mkdir()
        (build / "not_emulated.c").write_text(_not_emulated(site, (HERE / "stub_cann" / "runtime.c").read_text()))
        gcc = ["gcc", "-shared", "-fPIC", "-O1", "-w"]
        files = [str(sources[0]), str(build / "not_emulated.c")]
        _run([*gcc, "-Wl,-soname,libascendcl.so", "-o", str(build / "libascendcl.so"), *files])
        (build / "empty.c").write_text("")
        for name in LIBRARIES.split():
            link = ["-Wl,--no-as-needed", f"-L{build}", "-lascendcl", "-Wl,-rpath,$ORIGIN"]
            output = ["-o", str(build / f"lib{name}.so"), f"-Wl,-soname,lib{name}.so"]
            _run([*gcc, str(build / "empty.c"), *output, *link])
        _publish(build, library)
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr}")


def _not_emulated(site: Path, runtime: str) -> str:
    names: set[str] = set()
    for path in sorted((site / "torch_npu" / "lib").glob("*.so")) + sorted((site / "torch_npu").glob("_C*.so")):
        table = subprocess.run(["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True)
        names |= {line.split()[-1] for line in table.stdout.splitlines() if line}
    prefixes = ("acl", "Msprof", "_ZN3atb", "rtDev", "rtFunction", "rtGet", "rtKernel")
    wanted = sorted(n for n in names if n.startswith(prefixes) and f"{n}(" not in runtime)
    return "void not_emulated(const char*);\n" + "".join(
        f'long {name}(void) {{ not_emulated("{name}"); return 0; }}\n' for name in wanted
    )
