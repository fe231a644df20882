"""The variables that torchrun sets in the environment. No torch."""

from __future__ import annotations

import errno
import os
import socket

from qwen3_npu.errors import UsageError
from qwen3_npu.numbers import is_count
from qwen3_npu.processes import started


def ranks() -> tuple[int, int, int]:
    """Rank, world size and local rank; (0, 1, 0) without torchrun. Raises: UsageError: they are no such numbers."""
    found = [_number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)]
    if not found[0] < found[1]:
        raise UsageError(f"RANK {found[0]} WORLD_SIZE {found[1]}: ranks count from 0 to below WORLD_SIZE")
    return found[0], found[1], found[2]


def _number(name: str, default: int) -> int:
    """A whole number of the environment. Raises: UsageError: it is none."""
    text = os.environ.get(name, str(default))
    if not is_count(text):
        raise UsageError(f"{name}={text}: torchrun sets a whole number; start with torchrun, or unset it")
    return int(text)


def has_rendezvous() -> bool:
    """Whether a launcher has set the address at which the processes connect."""
    return "MASTER_ADDR" in os.environ


def no_meeting(reason: str) -> str:
    """A line with the reason why the processes could not connect, and the remedy.

    Args:
        reason: torch's message, or that of the system.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if "EADDRINUSE" in reason or "already in use" in reason:
        return (
            f"MASTER_PORT {port} is in use on this host, perhaps by another job; give another: MASTER_PORT=29501, or "
            f"torchrun --master-port"
        )
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        return (
            f"MASTER_ADDR {address} does not resolve ({error.strerror}); give the address of the first node: "
            f"MASTER_ADDR=..., or torchrun --master-addr"
        )
    first = (reason.strip().splitlines() or [""])[0]
    return f"MASTER_ADDR {address}, MASTER_PORT {port}: the processes could not connect: {first}"


def check_meeting(first: bool) -> None:
    """Check before torchrun, which would show a traceback, that the processes can connect.

    Args:
        first: this is the node that the others connect to.

    Raises:
        UsageError: MASTER_PORT is missing, no port, or in use here, or MASTER_ADDR does not resolve.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "")
    if not (is_count(port) and int(port) < 1 << 16):
        raise UsageError(f"MASTER_PORT {port or 'is not set'}: with MASTER_ADDR a port below 65536 is needed")
    try:
        socket.getaddrinfo(address, None)
        if first:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", int(port)))
    except (OSError, ValueError, OverflowError) as error:
        reason = "EADDRINUSE" if getattr(error, "errno", None) == errno.EADDRINUSE else str(error)
        raise UsageError(no_meeting(reason)) from None


def local_size(world_size: int) -> int:
    """Number of processes on this node; all processes if the launcher does not set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def node() -> int:
    """The number of this node, from 0."""
    return int(os.environ.get("GROUP_RANK", "0"))


def restarts() -> int:
    """How often torchrun has restarted this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job_names() -> list[str]:
    """Identifiers of this job, equal for all its restarts. Two starts that share an identifier are the same job.

    They are the torchrun process on this machine (process id and start time), and --rdzv-id.
    """
    agent = os.getppid()
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is torchrun's default
    return [f"{socket.gethostname()} {agent} {started(agent)}", *([run] if run != "none" else [])]
