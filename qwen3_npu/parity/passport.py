"""The numerics passport: results of every operator in a few tiny trainings, and their comparison.

Each operator is judged by itself: a kernel's results and gradients are compared with its definition in float64 with the
same inputs, so earlier errors do not matter. Everything else (layers, gradients, losses) is compared with the passport,
within the difference of bf16 and float32 there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from qwen3_npu import log
from qwen3_npu.args.parallel import RuntimeArgs
from qwen3_npu.args.tools.parity import ParityArgs
from qwen3_npu.distributed.launch import World, process_group
from qwen3_npu.errors import Stopped, UsageError
from qwen3_npu.kernels import select_kernels
from qwen3_npu.parity.gather import gather_whole
from qwen3_npu.parity.measure import trainer
from qwen3_npu.parity.probes import probe
from qwen3_npu.parity.rows import PER_DOCUMENT, RING, SP, TP2
from qwen3_npu.parity.tiny import arch, write_instructions, write_model
from qwen3_npu.parity.walk import Breach, Walked, walk, walk_runs
from qwen3_npu.platform.base import Platform
from qwen3_npu.training.fingerprints.files import Recording, read, write
from qwen3_npu.training.fingerprints.gather import TRAINING, gathered
from qwen3_npu.training.fingerprints.recorder import LAYER, Noted, StepRecorder
from qwen3_npu.training.fingerprints.sketch import NUMBERS, sketch

SHIPPED = "reference"
STEPS, LENGTH = 2, 64
_MODELS = {"dense": "untied", "packed": "untied", "moe": "moe"}
PRECISIONS = ("fp32", "bf16")
CASES = [f"{name} {dtype}" for name in (*_MODELS, "operators") for dtype in PRECISIONS]
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {name: [] for name in _MODELS},
    2: {"dense": TP2, "packed": RING, "moe": TP2 + SP},
}


def shipped() -> Path:
    """The passport that comes with the package."""
    return Path(str(resources.files("qwen3_npu.parity") / "passports" / "cpu_reference.npz"))


def write_inputs(folder: Path) -> None:
    """Write models and data of all cases. Their epsilon is unusual, so that a lost epsilon shows."""
    for kind in set(_MODELS.values()):
        write_model(folder / kind, arch(kind, num_hidden_layers=2, rms_norm_eps=1e-3), gate=8)
    write_instructions(folder / "single", count=16)
    write_instructions(folder / "packed", pack=LENGTH, count=16)


def _flags(folder: Path, case: str, runtime: RuntimeArgs, device: str) -> list[str]:
    name, dtype = case.split()
    data = folder / ("packed" if name == "packed" else "single")
    flags = ["--stage", "sft", "--load", str(folder / _MODELS[name]), "--data-path", str(data), "--device", device]
    flags += ["--seq-length", str(LENGTH), "--global-batch-size", "2", "--train-iters", str(STEPS), "--lr", "1e-3"]
    flags += ["--lr-decay-style", "constant", "--clip-grad", "0", "--adam-eps", "1e-4", "--eval-iters", "0"]
    flags += ["--split", "1,0,0", "--kernels", runtime.kernels]
    for override in runtime.kernel_overrides:
        flags += ["--kernel-overrides", override]
    flags += PER_DOCUMENT if name == "packed" else []
    flags += ["--moe-aux-loss-coeff", "0.02"] if name == "moe" else []
    return [*flags, *(["--bf16"] if dtype == "bf16" else [])]


def run_case(
    case: str, platform: Platform, world: World, runtime: RuntimeArgs, *, folder: Path, layout: Iterable[str] = ()
) -> Noted | None:
    """The records of one case, on rank 0. Every rank must call this."""
    name, dtype = case.split()
    if name == "operators":
        kernels = select_kernels(runtime.kernels, platform.name, runtime.kernel_overrides)
        return probe(kernels, world.device, dtype)
    steps: list[Noted | None] = []

    def keep(_: int, noted: Noted) -> None:
        steps.append(gathered(noted, everyones=True))

    recorder = StepRecorder(lambda step: True, keep, exact=True)
    with (
        log.quiet(),
        trainer(platform, world, [*_flags(folder, case, runtime, platform.name), *layout], recorder=recorder) as made,
    ):
        try:
            for number in range(1, STEPS + 1):
                extra = {f"{number}|0|loss|{LAYER}#1|forward|out": torch.tensor([made.step().loss])}
                if number == 1:
                    whole = gather_whole(made.saver.trained, "exp_avg")
                    names = {f"1|0|{hf}|{LAYER}#1|backward|gradient": array for hf, array in whole.items()}
                    extra |= {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in names.items()}
                steps.append(_more(extra))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if world.size > 1 or recorder.last is None:
                raise
            steps.append(recorder.take(error))
    return None if world.rank else _joined([noted for noted in steps if noted is not None])


def _more(tensors: dict[str, torch.Tensor]) -> Noted:
    rows = [np.append(sketch(tensor).numpy(), (np.nan, np.nan)) for tensor in tensors.values()]
    return Noted(list(tensors), np.array(rows, np.float32).reshape(-1, NUMBERS + 2))


def _joined(parts: list[Noted]) -> Noted:
    names = [name for part in parts for name in part.names]
    raised = next((part.raised for part in parts if part.raised), None)
    return Noted(names, np.concatenate([part.rows for part in parts]).astype(np.float32), raised)


def record_cases(
    platform: Platform, world: World, runtime: RuntimeArgs, cases: Iterable[str] = CASES
) -> Recording | None:
    """The records of all cases that fit the processes, on rank 0. Every rank must call this."""
    layouts = LAYOUTS.get(world.size)
    if layouts is None:
        raise UsageError(f"a passport is made by 1 or 2 processes, not by {world.size}; give --processes")
    found: dict[str, Noted | None] = {}
    with tempfile.TemporaryDirectory(prefix="qwen3-passport-") as name:
        write_inputs(Path(name))
        for case in cases:
            layout = layouts.get(case.split()[0], [])
            found[case] = run_case(case, platform, world, runtime, folder=Path(name), layout=layout)
    kept = {case: noted for case, noted in found.items() if noted is not None}
    if world.rank:
        return None
    chosen = str(select_kernels(runtime.kernels, platform.name, runtime.kernel_overrides))
    size = f"{world.size} process{'es' * (world.size > 1)}"
    return Recording(torch.__version__, platform.device_name(), chosen, layout=size, cases=kept)


def main(platform: Platform, args: ParityArgs, runtime: RuntimeArgs) -> int:
    """--record, and --compare without --against."""
    with process_group(platform, runtime) as world:
        expected = read(_path(args.compare)) if args.compare is not None else None
        found = record_cases(platform, world, runtime)
    if found is None:
        return 0
    if args.record is not None:
        write(Path(args.record), found)
        size = Path(args.record).stat().st_size
        log.info(f"{args.record}: {sum(len(n.names) for n in found.cases.values())} records, {size} bytes; {found}")
        return 0
    assert expected is not None
    log.info(f"passport: {expected}")
    log.info(f"here:     {found}")
    _judge([(case, walk(case, found, expected)) for case in found.cases])
    return 0


def compare_files(args: ParityArgs) -> int:
    """--compare FILE --against FILE."""
    one, other = read(_path(args.compare)), read(_path(args.against))
    if TRAINING in one.cases and TRAINING in other.cases:
        _judge([(TRAINING, walk_runs(other, one, read(shipped())))])
        return 0
    if TRAINING in one.cases or TRAINING in other.cases:
        what = f"--compare {args.compare} and --against {args.against}"
        raise UsageError(f"{what} are of two kinds: give two passports, or two files of --fingerprint-interval")
    _judge([(case, walk(case, other, one)) for case in other.cases])
    return 0


def _path(name: str | None) -> Path:
    return shipped() if name == SHIPPED else Path(str(name))


def _judge(walked: list[tuple[str, Walked]]) -> None:
    """Print a line for each case. Raises: Stopped: a value is outside its tolerance."""
    firsts: list[Breach] = []
    for case, result in walked:
        finding = result.first
        verdict = f"ok, {100 * result.used:.0f} % of the tolerance used"
        if finding is not None:
            firsts.append(finding)
            more = f" (and {len(result.findings) - 1} later)" if len(result.findings) > 1 else ""
            verdict = f"BREACH at {finding.place} {finding.what}{more}"
        log.info(f"{case:<16} {result.records:>5} records   {verdict}")
    if firsts:
        certain = [finding for finding in firsts if finding.is_certain] or firsts
        place = certain[0].place
        raise Stopped(f"{len(firsts)} of {len(walked)} cases differ; first {certain[0].case}, {place}")
    log.info("all cases agree within what rounding explains")
