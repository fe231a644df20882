"""Certificate of layout invariance: train a tiny model in every layout that fits the available processes, and compare
losses and gradients with those of one process. Exit status 1 if a difference is above --tolerance.

    python -m qwen3_npu.parity                                          all devices of this machine
    torchrun --nnodes 2 --nproc-per-node 8 ... -m qwen3_npu.parity      a cluster
    python -m qwen3_npu.parity --record passport.npz                    record this machine's results, for another one
    python -m qwen3_npu.parity --compare passport.npz                   the first operator with another result
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_npu import cli, log
from qwen3_npu.args.parallel import RuntimeArgs
from qwen3_npu.args.tools.parity import ParityArgs
from qwen3_npu.distributed import environment
from qwen3_npu.errors import Stopped, UsageError
from qwen3_npu.files import check_writable
from qwen3_npu.parity.rows import ParityRow, rows

if TYPE_CHECKING:
    from qwen3_npu.distributed.launch import World
    from qwen3_npu.platform.base import Platform

PROG = "python -m qwen3_npu.parity"


def main() -> int:
    rank, world_size, _ = environment.ranks()
    log.setup(rank, world_size)
    parsed = cli.parse(PROG, str(__doc__).split("\n\n")[0], (ParityArgs, RuntimeArgs), {})
    args, runtime = parsed.groups
    if args.record is not None or args.compare is not None:
        return _passport(args, runtime)
    chosen = [row for row in rows() if re.search(args.rows, row.name)]
    if not chosen:
        raise UsageError(f"--rows {args.rows} names no row; --list-rows shows them")
    if args.list_rows:
        for row in chosen:
            log.info(f"{row.size} processes   {row.name}")
        return 0
    if not environment.has_rendezvous():
        return _launch(args, runtime)
    fitting = [row for row in chosen if world_size % row.size == 0]
    with tempfile.TemporaryDirectory(prefix="qwen3-parity-") as folder:
        return _check(fitting, len(chosen) - len(fitting), args, runtime, folder=Path(folder))


def _passport(args: ParityArgs, runtime: RuntimeArgs) -> int:
    """--record and --compare, in this process alone unless --processes asks for more."""
    from qwen3_npu.platform import select_platform

    if args.record is not None:
        check_writable(Path(args.record).absolute().parent, "--record")
    if (args.processes or 1) > 1 and args.against is None and not environment.has_rendezvous():
        return _launch(args, runtime)
    platform = select_platform(runtime.device)
    platform.activate()
    from qwen3_npu.parity import passport

    return passport.compare_files(args) if args.against is not None else passport.main(platform, args, runtime)


def _launch(args: ParityArgs, runtime: RuntimeArgs) -> int:
    """Start the processes of this machine; they run `main` again."""
    import torch

    from qwen3_npu.platform import select_platform

    devices = 4 if select_platform(runtime.device).name == "cpu" else torch.accelerator.device_count()
    count = args.processes or devices
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environ = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run([*command, "-m", "qwen3_npu.parity", *sys.argv[1:]], env=environ).returncode


def _check(chosen: list[ParityRow], left_out: int, args: ParityArgs, runtime: RuntimeArgs, *, folder: Path) -> int:
    from qwen3_npu.parity.reference import file_name, write_inputs
    from qwen3_npu.platform import select_platform

    platform = select_platform(runtime.device)
    rank, size, _ = environment.ranks()
    batch = size * -(-8 // size)
    write_inputs(folder)
    if rank == 0:
        log.info(f"{len(chosen)} rows on {size} x {platform.name}; first what one process computes")
        _reference(folder, platform.name, batch, sorted({file_name(row.model, row.packed) for row in chosen}))
    platform.activate()
    from qwen3_npu.distributed.failure import recorded
    from qwen3_npu.distributed.launch import process_group

    with recorded(), process_group(platform, runtime) as world:
        breaches = sum(not _row(row, platform, world, args.tolerance, batch=batch, folder=folder) for row in chosen)
    if left_out:
        log.info(f"{left_out} rows left out: the number of processes, {size}, is no multiple of what they need")
    if breaches:
        raise Stopped(f"{breaches} of {len(chosen)} rows differ by more than --tolerance {args.tolerance:g}")
    log.info(f"all {len(chosen)} rows agree with one process to {args.tolerance:g}")
    return 0


def _reference(folder: Path, device: str, batch: int, wanted: list[str]) -> None:
    torchrun = ("RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    alone = {name: value for name, value in os.environ.items() if not name.startswith(torchrun)}
    command = [sys.executable, "-m", "qwen3_npu.parity.reference", str(folder), device, str(batch), *wanted]
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    if done.returncode:
        raise Stopped(f"the run with one process fails:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def _row(row: ParityRow, platform: Platform, world: World, tolerance: float, *, batch: int, folder: Path) -> bool:
    """Train one row and print its line. Returns whether it agrees."""
    import numpy as np

    from qwen3_npu.parity.measure import largest_difference, measure, trainer
    from qwen3_npu.parity.reference import STEPS, base_flags, file_name

    flags = [*base_flags(folder, platform.name, batch, row.model, packed=row.packed), *row.flags]
    with log.quiet(), trainer(platform, world, flags) as made:
        measured = measure(made, STEPS)
    del made
    gc.collect()  # groups of processes live in cycles, and each has threads
    if world.rank:
        return True
    name = file_name(row.model, row.packed)
    expected = json.loads((folder / f"{name}.json").read_text())
    loss = max(abs(s.loss - e) / abs(e) for s, e in zip(measured.steps, expected, strict=True))
    gradient, where = largest_difference(measured.gradients, dict(np.load(folder / f"{name}.npz")))
    agrees = loss <= tolerance and gradient <= tolerance
    verdict = "ok" if agrees else f"BREACH in {where if gradient > tolerance else 'the loss'}"
    log.info(f"{row.name:<62} loss {loss:8.1e}   gradients {gradient:8.1e}   {verdict}")
    return agrees


if __name__ == "__main__":
    cli.run(PROG, main)
