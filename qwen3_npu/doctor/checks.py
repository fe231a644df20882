"""Facts -> findings. Pure functions, so that every finding can be tested on any machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from qwen3_npu.doctor.findings import BLOCKER, OK, WARNING, Finding
from qwen3_npu.doctor.machine import Facts
from qwen3_npu.progress import human

# torch_npu -> CANN, as published in COMPATIBILITY.en.md of Ascend/pytorch (August 2026). For 2.13.0 nothing is.
PAIRS = {
    "2.7.1": "8.3.RC1",
    "2.7.1.post2": "8.5.0",
    "2.7.1.post4": "9.0.0",
    "2.7.1.post8": "9.1.0",
    "2.12.0": "9.1.0",
}
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh (or where CANN is installed)"


def diagnose(facts: Facts) -> list[Finding]:
    """Every finding, in the order in which one would mend them."""
    return [finding for check in CHECKS for finding in check(facts)]


def _python(facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    if (3, 10) <= facts.python < (3, 13):
        yield Finding(OK, "python", f"{version} on {facts.machine}")
    else:
        yield Finding(BLOCKER, "python", f"{version} on {facts.machine}", "use Python 3.10, 3.11 or 3.12")


def _requirements(facts: Facts) -> Iterator[Finding]:
    if facts.requirements is None:
        yield Finding(
            WARNING, "packages", "qwen3-npu is not installed in this Python", "pip install -e . in its folder"
        )
        return
    wrong = 0
    for text in facts.requirements:
        need = Requirement(text)
        version = facts.packages.get(need.name.lower())
        if version is None:
            wrong += 1
            yield Finding(BLOCKER, need.name, "not installed", f"pip install '{need.name}{need.specifier}'")
        elif not need.specifier.contains(version, prereleases=True):
            wrong += 1
            text = f"{version} is installed, {need.specifier} is needed"
            yield Finding(BLOCKER, need.name, text, f"pip install '{need.name}{need.specifier}'")
    if not wrong:
        versions = ", ".join(f"{name} {facts.packages[name]}" for name in ("torch", "megatron-core", "transformers"))
        yield Finding(OK, "packages", versions)


def _torch_npu(facts: Facts) -> Iterator[Finding]:
    if not facts.torch_npu:
        if facts.npu_smi or facts.driver:
            remedy = "pip install torch_npu of torch's version"
            yield Finding(BLOCKER, "torch_npu", "this machine has an NPU driver but torch_npu is not installed", remedy)
        return
    mine, torch = facts.packages.get("torch-npu") or facts.packages.get("torch_npu", "?"), facts.packages.get("torch")
    if torch and mine != "?" and Version(mine).release[:3] != Version(torch).release[:3]:
        base = ".".join(map(str, Version(mine).release[:3]))
        text = f"{mine} is built for torch {base}; torch {torch} is installed"
        yield Finding(BLOCKER, "torch_npu", text, f"pip install torch=={base}, or the torch_npu of torch {torch}")
    else:
        yield Finding(OK, "torch_npu", f"{mine} with torch {torch}")
    if torch and "+cu" in torch:
        remedy = f"install the CPU build of torch {torch.split('+')[0]}"
        yield Finding(BLOCKER, "torch", f"{torch} is a CUDA build, beside which torch_npu does not load", remedy)
    if "ASCEND_HOME_PATH" not in facts.environment and "ASCEND_TOOLKIT_HOME" not in facts.environment:
        yield Finding(BLOCKER, "CANN", "ASCEND_HOME_PATH is not set: set_env.sh was not sourced in this shell", SET_ENV)
        return
    published = PAIRS.get(mine)
    if facts.cann is None:
        yield Finding(WARNING, "CANN", "no version file under ASCEND_HOME_PATH", "check that the toolkit is complete")
    elif published is None:
        yield Finding(WARNING, "CANN", f"{facts.cann}; no published pair of torch_npu {mine} is known here")
    elif facts.cann.startswith(published):
        yield Finding(OK, "CANN", f"{facts.cann}, the published pair of torch_npu {mine}")
    else:
        text = f"{facts.cann}; published for torch_npu {mine} is {published}"
        yield Finding(WARNING, "CANN", text, f"install CANN {published}, or the torch_npu of CANN {facts.cann}")


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
    if re.search(r"lib(hccl|ascend|ge_|graph|acl)\w*\.so|set_env", error):
        return SET_ENV
    if "--device" in error:
        return "choose another --device, or mend what the message names"
    return "mend what the message names"


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
    _torch_npu,
    _driver,
    _devices,
    _all_reduce,
    _apex,
    _ports,
)
