"""Facts -> findings. Pure functions, so that every finding can be tested on any machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from qwen3_npu.doctor.findings import BLOCKER, OK, WARNING, Finding
from qwen3_npu.doctor.machine import SET_ENV, Facts
from qwen3_npu.progress import human

# torch_npu -> CANN, from COMPATIBILITY.en.md of Ascend/pytorch (August 2026), which has no pair for 2.13.0.
PAIRS = {
    "2.7.1": "8.3.RC1",
    "2.7.1.post2": "8.5.0",
    "2.7.1.post4": "9.0.0",
    "2.7.1.post8": "9.1.0",
    "2.12.0": "9.1.0",
}
_NEED = re.compile(r"([\w.-]+)\s*([^;\s]*)")  # name, versions; ours have no markers
OLDEST_CANN = (8, 3)  # torch_npu 2.7.1 needs it
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, in the order in which to fix them."""
    return [finding for check in CHECKS for finding in check(facts)]


def _python(facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    if (3, 10) <= facts.python < (3, 13):
        yield Finding(OK, "python", f"{version} on {facts.machine}")
    else:
        yield Finding(BLOCKER, "python", f"{version} on {facts.machine}", "use Python 3.10, 3.11 or 3.12")


def _requirements(facts: Facts) -> Iterator[Finding]:
    needs = [(found[1], found[2]) for text in facts.requirements or [] if (found := _NEED.match(text))]
    absent = facts.missing if facts.requirements is None else [n for n, _ in needs if n.lower() not in facts.packages]
    if facts.requirements is None or len(absent) > 1:
        text = "qwen3-npu is not installed in this Python" + (f"; missing: {', '.join(absent)}" if absent else "")
        remedy = "in the project's folder: pip install -e . (with NPUs torch and torch_npu first: docs/npu.md)"
        yield Finding(BLOCKER if absent else WARNING, "packages", text, remedy)
        return
    wrong = 0
    for name, specifier in needs:
        version = facts.packages.get(name.lower())
        if version is not None and _satisfies(version, specifier):
            continue
        wrong += 1
        text = "not installed" if version is None else f"{version} is installed, {specifier} is needed"
        yield Finding(BLOCKER, name, text, f"pip install '{name}{specifier}'")
    if not wrong:
        versions = ", ".join(f"{name} {facts.packages[name]}" for name in ("torch", "megatron-core"))
        yield Finding(OK, "packages", versions)


def _satisfies(version: str, specifier: str) -> bool:
    """Also true if `packaging` is missing, which is another finding."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _release(version: str) -> tuple[int, ...]:
    """The first numbers of a version, at most three."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _copies(facts: Facts) -> Iterator[Finding]:
    for name, (used, *others) in facts.copies.items():
        text = f"{name} is imported from {used}, and is also in {', '.join(others)}"
        shadows = name != "qwen3_npu" and "site-packages" not in used
        remedy = "leave one: look at PYTHONPATH and at the folder that the program is started in"
        yield Finding(BLOCKER if shadows else WARNING, "imports", text, remedy)


def _torch_npu(facts: Facts) -> Iterator[Finding]:
    if not facts.torch_npu:
        if facts.npu_smi or facts.driver:
            remedy = _install(facts.cann)
            yield Finding(BLOCKER, "torch_npu", "this machine has an NPU driver but torch_npu is not installed", remedy)
        return
    mine, torch = facts.packages.get("torch-npu") or facts.packages.get("torch_npu", "?"), facts.packages.get("torch")
    if torch and mine != "?" and _release(mine) != _release(torch):
        base = ".".join(map(str, _release(mine)))
        text = f"{mine} is built for torch {base}; torch {torch} is installed"
        yield Finding(BLOCKER, "torch_npu", text, f"pip install torch=={base}, or the torch_npu of torch {torch}")
    else:
        yield Finding(OK, "torch_npu", f"{mine} with torch {torch}")
    if torch and facts.torch_cuda:
        text = f"{torch} is built for CUDA {facts.torch_cuda}; torch_npu needs the CPU build"
        remedy = f"pip install --force-reinstall --no-deps torch=={torch.split('+')[0]} --index-url {TORCH_INDEX}"
        yield Finding(BLOCKER, "torch", text, remedy)
    if "ASCEND_HOME_PATH" not in facts.environment and "ASCEND_TOOLKIT_HOME" not in facts.environment:
        yield Finding(
            BLOCKER, "CANN", "ASCEND_HOME_PATH is not set: set_env.sh was not sourced in this shell", _set_env(facts)
        )
        return
    published = PAIRS.get(mine)
    if facts.cann is None:
        yield Finding(WARNING, "CANN", "no version file under ASCEND_HOME_PATH", "check that the toolkit is complete")
    elif _release(facts.cann)[:2] < OLDEST_CANN:
        remedy = "install CANN 8.3.RC1 or newer, with its torch_npu; torch below 2.7 is not supported either"
        yield Finding(BLOCKER, "CANN", f"{facts.cann} is not supported", remedy)
    elif published is None:
        yield Finding(WARNING, "CANN", f"{facts.cann}; no published pair of torch_npu {mine} is known here")
    elif facts.cann.startswith(published):
        yield Finding(OK, "CANN", f"{facts.cann}, the published pair of torch_npu {mine}")
    else:
        text = f"{facts.cann}; published for torch_npu {mine} is {published}"
        yield Finding(WARNING, "CANN", text, f"install CANN {published}, or the torch_npu of CANN {facts.cann}")


def _install(cann: str | None) -> str:
    """How to install the torch_npu of a version of CANN."""
    version = next((version for version, published in PAIRS.items() if cann and cann.startswith(published)), None)
    if version is None:
        return "install the torch and torch_npu of your CANN: docs/npu.md has the table"
    base = ".".join(map(str, _release(version)))
    return f"for CANN {cann}: pip install torch=={base} torch_npu=={version} --extra-index-url {TORCH_INDEX}"


def _set_env(facts: Facts) -> str:
    folders = [path for path in SET_ENV if path in facts.set_env] or SET_ENV
    return "source " + " or ".join(folders)


def _driver(facts: Facts) -> Iterator[Finding]:
    if not facts.torch_npu:
        return
    if facts.driver is None and not facts.npu_smi:
        text = "neither npu-smi nor /usr/local/Ascend/driver is here"
        yield Finding(
            BLOCKER, "driver", text, "install the driver; in a container mount both (see docker/Dockerfile.npu)"
        )
    else:
        yield Finding(OK, "driver", facts.driver or "npu-smi is here")


def _devices(facts: Facts) -> Iterator[Finding]:
    found = facts.devices
    if error := found.get("error"):
        yield Finding(BLOCKER, "devices", error, _import_remedy(error, facts))
        return
    if found["count"] == 0:
        yield Finding(OK, "devices", f"none; trainings run on the {found['name']}")
        return
    if facts.wanted and facts.wanted > found["count"]:
        variable = "ASCEND_RT_VISIBLE_DEVICES" if found["kind"] == "npu" else "CUDA_VISIBLE_DEVICES"
        text = f"{found['count']} x {found['name']} visible, {facts.wanted} wanted"
        value = facts.environment.get(variable)
        remedy = f"set NPUS_PER_NODE={found['count']}, or look at {variable} (now {value or 'not set'})"
        yield Finding(BLOCKER, "devices", text, remedy)
    else:
        yield Finding(OK, "devices", f"{found['count']} x {found['name']}")
    for number, (free, total) in enumerate(found["memory"]):
        if free < 0.9 * total:
            text = f"device {number}: {human(free, 'B')} of {human(total, 'B')} free"
            tool = "npu-smi info" if found["kind"] == "npu" else "nvidia-smi"
            yield Finding(WARNING, "memory", text, f"another process uses it; {tool} tells which")


def _import_remedy(error: str, facts: Facts) -> str:
    if "static TLS" in error:
        library = re.search(r"(/\S*libgomp\S*\.so[\w.]*)", error)
        return f"start with LD_PRELOAD={library[1] if library else '<path of libgomp.so.1 named in the error>'}"
    if re.search(r"lib(hccl|ascend|ge_|graph|acl)\w*\.so|set_env|backend extension: torch_npu", error):
        return _set_env(facts)
    if missing := re.search(r"No module named '([\w.]+)'", error):
        return f"install {missing[1]}: see packages above"
    if "--device" in error:
        return "choose another --device, or fix what the message names"
    return "fix what the message names"


def _all_reduce(facts: Facts) -> Iterator[Finding]:
    result = facts.all_reduce
    if result is None:
        return
    if "error" in result:
        remedy = (
            "see the remedies above; on NPU: HCCL's log under ~/ascend/log, hccn_tool, firewall, HCCL_SOCKET_IFNAME"
        )
        yield Finding(BLOCKER, "all-reduce", result["error"], remedy)
    elif "wrong" in result["answer"]:
        yield Finding(
            BLOCKER, "all-reduce", result["answer"], "devices or links are faulty; run the vendor's diagnosis"
        )
    else:
        yield Finding(OK, "all-reduce", result["answer"])


def _apex(facts: Facts) -> Iterator[Finding]:
    if facts.wrong_apex:
        text = "the installed `apex` is PyPI's, a web toolkit, not NVIDIA's or Ascend's"
        yield Finding(WARNING, "apex", text, "pip uninstall apex; this project needs none")


def _ports(facts: Facts) -> Iterator[Finding]:
    if facts.taken_ports:
        ports = ", ".join(map(str, facts.taken_ports))
        yield Finding(WARNING, "ports", f"in use: {ports}", "set MASTER_PORT or HCCL_IF_BASE_PORT to free ones")
    else:
        yield Finding(OK, "ports", "MASTER_PORT and those of HCCL are free")


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _python,
    _requirements,
    _copies,
    _torch_npu,
    _driver,
    _devices,
    _all_reduce,
    _apex,
    _ports,
)
