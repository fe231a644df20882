"""Tiny models and adapters, and the converter as a user calls it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np

import convert_ckpt
from qwen3_npu import cli
from qwen3_npu.args.lora import LORA_TARGETS
from qwen3_npu.checkpoint.binary.dtypes import BF16, F32, DType, from_float32, full
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile, SafetensorsWriter
from qwen3_npu.checkpoint.folders import ADAPTER_CONFIG
from qwen3_npu.checkpoint.formats.huggingface import SINGLE, HfReader, open_hf, write_config
from qwen3_npu.checkpoint.formats.peft import ADAPTER_WEIGHTS, peft_config
from qwen3_npu.checkpoint.mapping.lora import Lora, peft_shapes
from qwen3_npu.checkpoint.mapping.table import hf_shapes
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.parity import tiny

_DENSE = tiny.arch(vocab_size=250)  # an odd vocabulary
ARCHS = {
    "untied": _DENSE,
    "tied": dataclasses.replace(_DENSE, tie_word_embeddings=True),
    "moe": dataclasses.replace(_DENSE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32),
    "few": dataclasses.replace(_DENSE, num_key_value_heads=2),
    "qwen2": tiny.arch("qwen2", vocab_size=250),
}
ALL_TARGETS = tuple(LORA_TARGETS)


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


def run(*argv: object) -> Ran:
    """`python convert_ckpt.py argv...`, in this process unless --jobs says otherwise."""
    words = [str(word) for word in argv]
    if "--jobs" not in words:
        words += ["--jobs", "1"]
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["convert_ckpt.py", *words]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run("convert_ckpt.py", convert_ckpt.main)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    finally:
        sys.argv = before
    return Ran(code, out.getvalue(), err.getvalue())


def ok(*argv: object) -> str:
    """`run`, which must succeed; what it printed."""
    ran = run(*argv)
    assert ran.code == 0, ran.out + ran.err
    return ran.out


def refused(*argv: object) -> str:
    """`run`, which must end with one clear line and exit status 2; the line."""
    ran = run(*argv)
    assert ran.code == 2, (ran.code, ran.out, ran.err)
    lines = [line for line in ran.err.splitlines() if "error:" in line]
    assert len(lines) == 1, ran.err
    assert "Traceback" not in ran.err
    return lines[0]


def to_mg(source: Path, target: Path, *flags: object) -> str:
    kind = "mg" if (source / "latest_checkpointed_iteration.txt").exists() else "hf"
    return ok("--load-model-type", kind, "--save-model-type", "mg", "--load-dir", source, "--save-dir", target, *flags)


def to_hf(source: Path, target: Path, *flags: object) -> str:
    return ok("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", source, "--save-dir", target, *flags)


def write_bits(folder: Path, arch: Qwen3Arch, dtype: DType = BF16, seed: int = 0) -> Path:
    """A model whose weights are random bits (NaNs among them): only a copy has the same ones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shapes = hf_shapes(arch)
    writer = SafetensorsWriter(folder / SINGLE, {name: (dtype, shape) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        writer.write(name, rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype.carrier)[..., 0])
    writer.close()
    write_config(arch, None, folder, dtype)
    return folder


def write_floats(folder: Path, arch: Qwen3Arch, dtype: DType = F32, seed: int = 0) -> Path:
    """A model that computes something; norms are away from one so that a lost norm shows."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shapes = hf_shapes(arch)
    writer = SafetensorsWriter(folder / SINGLE, {name: (dtype, shape) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        values = 1 + 0.2 * values if len(shape) == 1 else values * (0.2 if "embed" in name else shape[-1] ** -0.5)
        writer.write(name, from_float32(values.astype(np.float32), dtype))
    writer.close()
    write_config(arch, None, folder, dtype)
    return folder


def write_adapter(
    folder: Path, arch: Qwen3Arch, lora: Lora, *, shared_a: bool = False, seed: int = 1, drop: tuple[str, ...] = ()
) -> Path:
    """A PEFT directory with random matrices.

    Args:
        shared_a: the projections of one Megatron linear have the same A, as in adapters trained here.
        drop: projections that it does not have.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shapes = {name: s for name, s in peft_shapes(arch, lora).items() if name.split(".")[-3] not in drop}
    first_of = {projection: names[0] for names in LORA_TARGETS.values() for projection in names}
    values: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        stem, projection, matrix, _ = name.rsplit(".", 3)
        first = f"{stem}.{first_of.get(projection)}.{matrix}.weight"  # a reward model's head has none
        scale = shape[-1] ** -0.5 * (1 if matrix == "lora_A" else 0.1)
        values[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
        if shared_a and matrix == "lora_A" and first in values:
            values[name] = values[first]
    writer = SafetensorsWriter(folder / ADAPTER_WEIGHTS, {name: (F32, shape) for name, shape in shapes.items()})
    for name, value in values.items():
        writer.write(name, value)
    writer.close()
    config = peft_config(lora, None, arch)
    config["target_modules"] = [name for name in config["target_modules"] if name not in drop]
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face directory, as bits."""
    reader: HfReader = open_hf(folder)
    found = {
        name: reader.read(name, full(shape)).view(f"u{reader.dtype(name).itemsize}")
        for name, shape in hf_shapes(reader.arch).items()
    }
    reader.close()
    return found


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file."""
    file = SafetensorsFile(path)
    return {name: file.read(name, full(file.shape(name))) for name in file.header}


def digests(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    paths = [path for path in sorted(folder.glob(pattern)) if path.is_file() and path.name != "conversion.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def assert_same_weights(a: Path, b: Path) -> None:
    """Both Hugging Face directories hold the same tensors, bit for bit."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    wrong = [name for name in first if not np.array_equal(first[name], second[name])]
    assert not wrong, wrong[:5]


def unsealed(folder: Path) -> Path:
    """The same as another program writes it: nothing says what its files must be."""
    for path in folder.rglob("integrity.json"):
        path.unlink()
    return folder
