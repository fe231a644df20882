"""Flags of `python -m qwen3_npu.doctor`."""

from __future__ import annotations

import dataclasses

from qwen3_npu.cli import flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorArgs:
    """what to look at"""

    device: str = flag("auto", choices=["auto", "npu", "cuda", "cpu"], help="kind of device the trainings will use")
    npus_per_node: int | None = flag(
        None, minimum=1, unit="devices", help="devices a training will take; default: NPUS_PER_NODE, or all visible"
    )
    all_reduce: bool = flag(True, help="reduce a tensor across the local devices")
    hostfile: str | None = flag(
        None, metavar="FILE", help="file with one host per line; they are checked over ssh, too"
    )
    shared_dir: str | None = flag(None, metavar="DIR", help="a folder that all hosts should share, e.g. of checkpoints")
    ssh: str = flag("ssh -o BatchMode=yes -o ConnectTimeout=5", help="command that runs something on another host")
