"""The tables of what trainings launch, tests/golden/launches_*.txt. `python -m tests.npu_sim.counts` writes them."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel" / "support"))

import counting
import tiny
import wheel
from qwen3_npu.data.train.token_file import IndexedWriter, publish
from worlds import World

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden"
COMMON = ["--seq-length", "32", "--lr", "1e-3", "--train-iters", "2", "--eval-iters", "0", "--bf16"]
COMMON += ["--use-distributed-optimizer"]
PACKED = ["--reset-attention-mask", "--reset-position-ids"]
EP2 = ["--expert-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
RING = ["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]

# Row of the table -> kind of model, processes, micro-batches that they compute together, flags.
ROWS: dict[str, tuple[str, int, int, list[str]]] = {
    "dense": ("untied", 1, 1, []),
    "packed": ("untied", 1, 1, PACKED),
    "LoRA": ("untied", 1, 1, ["--lora-r", "4"]),
    "MoE": ("moe", 1, 1, []),
    "MoE EP2": ("moe", 2, 2, EP2),
    "MoE EP2 hidden": ("moe", 2, 2, [*EP2, "--moe-alltoall-overlap-comm"]),
    "ring CP2": ("untied", 2, 1, RING),
    "TP2 SP": ("untied", 2, 1, TP2),
    "TP2 MC2": ("wide", 2, 1, [*TP2, "--use-ascend-mc2"]),
    "PP2": ("untied", 2, 2, PP2),  # half of the layers, two micro-batches
    "decode": ("untied", 1, 1, []),
}
# One token of one answer instead of a step; forward only.
DECODING = ("decode",)
COLUMNS = {
    "fwd": "operations forward",
    "bwd": "operations backward",
    "update": "operations update",
    "coll fwd": "collectives forward",
    "coll bwd": "collectives backward",
    "waits": "waits",
    "copies": "copies",
}


def models(folder: Path) -> dict[str, list[str]]:
    """Kind -> tiny models of two and of four layers."""
    made = {}
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # a rank's part is 256, MC2's least
    archs = {"untied": tiny.arch(), "moe": tiny.arch("moe"), "wide": tiny.arch(**wide)}
    for kind, arch in archs.items():
        sizes = [dataclasses.replace(arch, num_hidden_layers=n) for n in (2, 4)]
        made[kind] = [str(tiny.write_model(folder / f"{kind}{s.num_hidden_layers}", s)) for s in sizes]
    return made


def write_documents(prefix: Path) -> Path:
    """A token file; several documents share a sequence, each ends with token 1."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 25, 200)
    documents = [np.append((rng.integers(254) + np.cumsum(rng.integers(1, 4, n - 1))) % 254 + 2, 1) for n in lengths]
    writer = IndexedWriter(prefix)
    writer.add(np.concatenate(documents).astype(np.int32), lengths.astype(np.int32))
    publish([writer])
    return prefix


def row(world: World, name: str, models: dict[str, list[str]], tokens: str) -> tuple[str, list[dict]]:
    """One line of a table, and what it was counted from."""
    kind, _, batch, extra = ROWS[name]
    if name in DECODING:
        found = world.run("launch_cases.decoding", flags=["--bf16"], models=models[kind])
    else:
        flags = [*COMMON, "--global-batch-size", str(batch), "--data-path", tokens, *extra]
        found = world.run("launch_cases.launches", flags=flags, models=models[kind])
    line = counting.per_layer(*found)
    layer = " ".join(f"{line[column]:>8g}" for column in COLUMNS.values())
    outside = " ".join(f"{line[f'outside {column}']:>8g}" for column in COLUMNS.values())
    return f"{name:<9} | {layer} | {outside}", found


def launched_by_a_layer(two: dict, four: dict) -> list[str]:
    """Names of what one layer launches, by place: where a number of the table comes from."""
    lines = []
    for what in ("operations", "collectives"):
        for place in counting.PLACES:
            few, many = two[what][place], four[what][place]
            names = {name: (many[name] - few.get(name, 0)) / 2 for name in many}
            line = ", ".join(f"{name} {count:g}" for name, count in sorted(names.items()) if count)
            lines += [f"{what} {place}: {line}"] if line else []
    return lines


def head() -> str:
    names = " ".join(f"{name:>8}" for name in COLUMNS)
    return f"{'':<9} | {names} | {names}\n"


def path(device: str) -> Path:
    return GOLDEN / f"launches_{device}.txt"


def expected(device: str) -> dict[str, str]:
    """Row -> line of the committed table."""
    lines = path(device).read_text().splitlines()
    return {line.partition("|")[0].strip(): line for line in lines if "|" in line and not line.startswith(("#", " "))}


TITLE = """# Launched by one step of one micro-batch ({device}): of a layer, then outside of the layers.
# Device operations without views; collectives; waits of the host; copies between host and device.
# Written by `python -m tests.npu_sim.counts`. A change that launches more says so in its commit.
"""


def main(wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made, tokens = models(Path(folder)), str(write_documents(Path(folder, "text_document")))
        for device in ("npu", "cpu"):
            place = (HERE / "worker.py", wheel.environment()) if device == "npu" else ()
            worlds = {size: World(size, *place) for size in ((1, 2) if device == "npu" else (1,))}
            lines = []
            for name, (_, size, _, _) in ROWS.items():
                if size in worlds and (not wanted or name in wanted):
                    line, found = row(worlds[size], name, made, tokens)
                    lines.append(line)
                    print(device, line, flush=True)
                    if wanted:
                        print(*(f"  {line}" for line in launched_by_a_layer(*found)), sep="\n", flush=True)
            for world in worlds.values():
                world.stop()
            if not wanted:
                path(device).write_text(TITLE.format(device=device) + head() + "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1:])
