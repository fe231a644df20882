"""The table of docs/planning.md: what communication of four scripts nothing hides, without and with what hides it.

python benchmarks/planning/exposed.py [--few] [SCRIPT...] [-- FLAGS]

Scripts for Atlas A3 are played in a SuperPoD, and with RoCE between nodes. FLAGS: further ones of every
script, as `--coc-parallel-num 8`.

--few: chunks of one and of two layers are traced, and what a layer adds is counted as often as the model has it more.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from qwen3_npu import cli  # noqa: E402
from qwen3_npu.args.foreign import FOREIGN_TRAINING  # noqa: E402
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs  # noqa: E402
from qwen3_npu.model.arch import to_hf_config  # noqa: E402
from qwen3_npu.model.sizes import SIZES  # noqa: E402
from qwen3_npu.plan.device import DEVICE_SPECS  # noqa: E402
from qwen3_npu.platform import select_platform  # noqa: E402
from scripts import SCRIPTS, ask, size_of  # noqa: E402

NAMES = ("pretrain_qwen3_14b_4K_ptd", "pretrain_qwen3_32b_4K_ptd", "pretrain_qwen3_30b_a3b_4K_ptd")
NAMES += ("pretrain_qwen3_235b_a22b_4k_A3_ptd",)


if TYPE_CHECKING:
    from qwen3_npu.plan.device import Device
    from qwen3_npu.trace.overlap import Played


def main(words: list[str]) -> None:
    platform = select_platform("cpu")
    platform.activate()
    words, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    names, is_few = [word for word in words if word != "--few"], "--few" in words
    with tempfile.TemporaryDirectory() as folder:
        for name in names or NAMES:
            kinds = ("910C-64G", "910C-64G-RoCE") if "A3" in name else ("910B-64G",)
            devices = [DEVICE_SPECS[kind] for kind in kinds]
            script = next(script for script in SCRIPTS if script.stem == name)
            arch = SIZES[size_of(script)]
            (Path(folder) / "config.json").write_text(json.dumps(to_hf_config(arch)))
            asked = ask(script, Path(folder), HF_DIR=folder, CKPT_LOAD_DIR=folder)
            asked.flags.extend(flags)
            if not is_few:
                show(f"{name}, {asked.world}", devices, ways(asked.flags, asked.world, devices))
                continue
            chunks = _of(asked.flags, "--pipeline-model-parallel-size") or 1
            each = _of(asked.flags, "--num-layers-per-virtual-pipeline-stage")
            nothing = _word(asked.flags, "--noop-layers")
            layers = arch.num_hidden_layers + (len(nothing.split(",")) if nothing else 0)
            chunks = layers // each if each else chunks
            found = []
            for count in (1, 2):
                few = dataclasses.replace(arch, num_hidden_layers=chunks * count)
                (Path(folder) / "config.json").write_text(json.dumps(to_hf_config(few)))
                found.append(ways(_with_layers(asked.flags, count), asked.world, devices))
            steps = [_extended(pair, layers // chunks) for pair in zip(*found, strict=True)]
            show(f"{name}, {asked.world}", devices, steps)


def show(what: str, devices: list[Device], found: list[list[tuple[str, Played]]]) -> None:
    from qwen3_npu.trace.hidden import hidden_table

    for device, played in zip(devices, found, strict=True):
        print(f"{what} x {device.name}", *hidden_table(played), sep="\n", flush=True)


def ways(flags: list[str], world: int, devices: list[Device]) -> list[list[tuple[str, Played]]]:
    """For each device, each way to hide communication and the step of the first rank with it."""
    from qwen3_npu.trace.hidden import traced_ways
    from qwen3_npu.trace.report import play

    args = PretrainArgs(*cli.parse("exposed", "", GROUPS, FOREIGN_TRAINING, argv=flags).groups)
    found: list[list[tuple[str, Played]]] = [[] for _ in devices]
    for name, trace, passes in traced_ways(select_platform("cpu"), args, devices=world, rank=0):
        for device, played in zip(devices, found, strict=True):
            played.append((name, play(trace, device, passes)))
    return found


def _word(flags: list[str], name: str) -> str | None:
    return flags[flags.index(name) + 1] if name in flags else None


def _of(flags: list[str], name: str) -> int | None:
    word = _word(flags, name)
    return None if word is None else int(word)


def _with_layers(flags: list[str], count: int) -> list[str]:
    """The same with so many layers a chunk, all of them recomputed if some are."""
    changed = list(flags)
    if "--noop-layers" in changed:
        place = changed.index("--noop-layers")
        del changed[place : place + 2]
    for name in ("--num-layers-per-virtual-pipeline-stage", "--recompute-num-layers"):
        if name in changed and (name != "--recompute-num-layers" or "block" in changed):
            changed[changed.index(name) + 1] = str(count)
    return changed


def _extended(found: tuple[list[tuple[str, Played]], ...], layers: int) -> list[tuple[str, Played]]:
    """Steps of so many layers a chunk, from those of one and of two."""
    from qwen3_npu.trace.overlap import Played

    def at(one: float, two: float) -> float:
        return one + (layers - 1) * (two - one)

    return [
        (name, Played(at(a.busy, b.busy), {group: at(a.exposed[group], b.exposed[group]) for group in a.exposed}))
        for (name, a), (_, b) in zip(*found, strict=True)
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
