"""The change that an adapter makes to a weight: scale * B @ A in float64, from the adapter's own files and settings.

Meaning of adapter_config.json: peft's LoraConfig and `LoraModel._create_and_replace` (rank_pattern and alpha_pattern:
the first key that matches the module's end), `ParamWrapper` for experts that are one parameter (rows e r .. of A,
columns e, e + E, .. of B).
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qwen3_npu.checkpoint.formats.peft import PeftReader
from qwen3_npu.checkpoint.mapping.lora import Lora
from qwen3_npu.checkpoint.mapping.source import Contents
from qwen3_npu.checkpoint.verify.libraries import saved_arguments
from qwen3_npu.checkpoint.verify.published import DORA, Span, is_turned, peft_tensor, published_shapes
from qwen3_npu.checkpoint.verify.tensors import VerifySource
from qwen3_npu.model.arch import Qwen3Arch

AdapterPair = tuple[torch.Tensor, torch.Tensor, float]  # A [r, in], B [out, r], scale
_BLOCK = 1 << 22  # numbers of a product at a time
SCORE = "score.weight"
PEFT_HEAD = f"base_model.model.{SCORE}"


def _scale(alpha: float, r: int, *, stabilized: bool) -> float:
    """alpha / r (arXiv:2106.09685), or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
    return alpha / math.sqrt(r) if stabilized else alpha / r


class MegatronPairs:
    """An adapter in Megatron's form, under PEFT's names in `tensors`."""

    def __init__(self, tensors: VerifySource, scale: float, contents: Contents) -> None:
        self.tensors, self.scale, self.shapes = tensors, scale, published_shapes(contents)
        self.is_dora = contents.lora is not None and contents.lora.is_dora

    def read(self, name: str, rows: Span, columns: Span) -> torch.Tensor:
        """A part of a tensor of the adapter."""
        return self.tensors.read(name, rows, columns)

    def dtypes(self, name: str) -> set[torch.dtype]:
        return self.tensors.dtypes(name)

    def __call__(self, weight: str) -> AdapterPair | None:
        """A and B beside a Hugging Face weight; None: it has none."""
        names = [peft_tensor(weight.removesuffix(".weight"), matrix) for matrix in "AB"]
        if names[0] not in self.shapes:
            return None
        shapes = (self.shapes[n][::-1] if is_turned(n) else self.shapes[n] for n in names)
        a, b = (self.tensors.read(n, *((0, size) for size in s)).double() for n, s in zip(names, shapes, strict=True))
        return (b.T, a, self.scale) if is_turned(names[0]) else (a, b, self.scale)


class PlainTensors(VerifySource):
    """A PiSSA adapter of rank r as LoRA of rank 2r: the initial A0 and -B0 are appended to A and B.

    The product is B A - B0 A0, as in peft's `LoraModel.subtract_mutated_init`. The initial A of the embedding is 0.
    """

    def __init__(self, tensors: VerifySource, r: int) -> None:
        self.tensors, self.r = tensors, r

    def dtypes(self, name: str) -> set[torch.dtype]:
        return self.tensors.dtypes(name)

    def read(self, name: str, rows: Span, columns: Span) -> torch.Tensor:
        if "lora_A" not in name and "lora_B" not in name and "lora_embedding_" not in name:
            return self.tensors.read(name, rows, columns)
        by_rows = ".lora_A." in name  # an embedding's A is read as its transpose
        wanted = rows if by_rows else columns
        parts: list[torch.Tensor] = []
        for start, stored in ((0, name), (self.r, name.replace(".weight", ".initial.weight"))):
            span = max(wanted[0] - start, 0), min(wanted[1] - start, self.r)
            if span[0] >= span[1]:
                continue
            if start and "lora_embedding_" in name:
                other = columns if by_rows else rows
                size = (span[1] - span[0], other[1] - other[0])
                part = torch.zeros(size if by_rows else size[::-1], dtype=parts[0].dtype if parts else torch.float32)
            else:
                part = self.tensors.read(stored, *((span, columns) if by_rows else (rows, span)))
                part = -part if start and not by_rows else part
            parts.append(part)
        return torch.cat(parts, dim=0 if by_rows else 1)

    def close(self) -> None:
        self.tensors.close()


class PeftPairs:
    """A PEFT directory."""

    def __init__(self, reader: PeftReader) -> None:
        self.config: dict[str, Any] = json.loads((reader.folder / "adapter_config.json").read_text(encoding="utf-8"))
        self.file: Any = safe_open(reader.file.path, framework="pt")
        self.names = set(self.file.keys())
        self.arch, self.is_dora = reader.arch, self.config.get("use_dora") is True

    def _setting(self, kind: str, usual: str, module: str) -> float:
        patterns = self.config.get(kind) or {}
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), self.config[usual])

    def _pair(self, stem: str, module: str, choose: Callable[[torch.Tensor, torch.Tensor], Any]) -> AdapterPair:
        a, b = (self.file.get_tensor(peft_tensor(stem, matrix)).double() for matrix in "AB")
        r, alpha = int(self._setting("rank_pattern", "r", module)), self._setting("alpha_pattern", "lora_alpha", module)
        a, b = choose(a, b)
        return a, b, _scale(alpha, r, stabilized=bool(self.config.get("use_rslora")))

    def __call__(self, weight: str) -> AdapterPair | None:
        """A and B beside a Hugging Face weight; None: it has none."""
        module = weight.removesuffix(".weight")
        if peft_tensor(module, "A") in self.names:
            # An embedding of a token is a column of A times B: what is added to its matrix is (B A)^T.
            turned = is_turned(peft_tensor(module, "A"))
            return self._pair(module, module, lambda a, b: (b.T, a.T) if turned else (a, b))
        expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj", module)
        if expert is None:
            return None
        experts, number, projection = expert[1], int(expert[2]), expert[3]
        width, count = self.arch.moe_intermediate_size, self.arch.num_experts
        rows = self.arch.hidden_size if projection == "down" else 2 * width

        def of_expert(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            r = a.shape[0] // count
            b = b.reshape(rows, r, count)[:, :, number]
            half = {"gate": slice(0, width), "up": slice(width, 2 * width)}.get(projection, slice(None))
            return a[number * r : (number + 1) * r], b[half]

        whole = "down_proj" if projection == "down" else "gate_up_proj"
        inner = width if projection == "down" else self.arch.hidden_size
        for stem in (experts, f"{experts}.base_layer"):
            a, b = (peft_tensor(stem, matrix) for matrix in "AB")
            if b in self.names:
                high, wide = self.file.get_slice(b).get_shape()[0], self.file.get_slice(a).get_shape()[1]
                if (high, wide) == (rows, inner):
                    return self._pair(stem, f"{experts}.{whole}", of_expert)
        return None

    def read(self, name: str, rows: Span, columns: Span) -> torch.Tensor:
        """A part of another tensor of the adapter: the head of a reward model, or a vector of magnitudes."""
        stored = self.file.get_slice(name)
        if len(stored.get_shape()) == 1:
            return stored[slice(*rows)].unsqueeze(1)
        return stored[slice(*rows), slice(*columns)]

    def dtypes(self, name: str) -> set[torch.dtype]:
        return {self.file.get_slice(name)[:0].dtype}


class MergedTensors(VerifySource):
    """A base with an adapter beside it."""

    def __init__(self, base: VerifySource, pairs: MegatronPairs | PeftPairs) -> None:
        self.base, self.pairs = base, pairs
        self.pair = functools.lru_cache(maxsize=4)(pairs)
        self.squares: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def _of(self, name: str) -> tuple[VerifySource | MegatronPairs | PeftPairs, str]:
        return (self.pairs, PEFT_HEAD) if name == SCORE else (self.base, name)

    def dtypes(self, name: str) -> set[torch.dtype]:
        source, own = self._of(name)
        return source.dtypes(own)

    def read(self, name: str, rows: Span, columns: Span) -> torch.Tensor:
        source, own = self._of(name)
        return source.read(own, rows, columns)

    def merged(self, name: str, rows: Span, columns: Span) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A part of a merged weight in float64, and a bound on the error of float32 arithmetic; None if the weight has
        no adapter.

        The bound for a sum of r products is (r + 2) units in the last place of the sum of their absolute values. The
        bound for a norm of n numbers grows with sqrt(n). DoRA: arXiv:2402.09353, equation 5.
        """
        pair = self.pair(name)
        if pair is None:
            return None
        magnitudes = peft_tensor(name.removesuffix(".weight"), DORA)
        if not self.pairs.is_dora:
            added, error = product(pair, rows, columns)
            return self.read(name, rows, columns).double() + added, error
        if is_turned(peft_tensor(name.removesuffix(".weight"), "A")):
            return self._turned(name, pair, rows, columns)
        whole = (0, pair[0].shape[1])
        added, error = product(pair, rows, whole)
        directions = self.read(name, rows, whole).double() + added
        norms = directions.norm(dim=1, keepdim=True)
        factors = self.pairs.read(magnitudes, rows, (0, 1)).double() / norms
        unit = (whole[1] ** 0.5 + 16) * 2.0**-23
        exact = factors * directions
        bound = factors.abs() * error + exact.abs() * (error.norm(dim=1, keepdim=True) / norms + unit)
        return exact[:, slice(*columns)], bound[:, slice(*columns)]

    def _turned(self, name: str, pair: AdapterPair, rows: Span, columns: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """`merged` for an embedding with DoRA, whose magnitudes belong to columns."""
        vocabulary = len(pair[1])
        if name not in self.squares:
            parts, errors = [], []
            for start in range(0, vocabulary, step := max(1, _BLOCK // pair[0].shape[1])):
                part = (start, min(start + step, vocabulary)), (0, pair[0].shape[1])
                added, error = product(pair, *part)
                parts.append((self.read(name, *part).double() + added).square().sum(0))
                errors.append(error.square().sum(0))
            self.squares[name] = sum(parts, torch.zeros(1)), sum(errors, torch.zeros(1))
        total, bound = (value[slice(*columns)] for value in self.squares[name])
        norms = total.sqrt()
        magnitudes = self.pairs.read(peft_tensor(name.removesuffix(".weight"), DORA), columns, (0, 1)).double()
        factors = magnitudes.flatten() / norms
        added, error = product(pair, rows, columns)
        exact = factors * (self.read(name, rows, columns).double() + added)
        unit = (vocabulary**0.5 + 16) * 2.0**-23
        return exact, factors.abs() * error + exact.abs() * (bound.sqrt() / norms + unit)

    def close(self) -> None:
        self.base.close()


def product(pair: AdapterPair, rows: Span, columns: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """A part of scale * B @ A in float64, and the error that float32 arithmetic may make in it."""
    a, b, scale = pair
    a, b = a[:, slice(*columns)], b[slice(*rows)]
    return scale * (b @ a), (len(a) + 2) * 2.0**-23 * scale * (b.abs() @ a.abs())


def written_scale(folder: Path, lora: Lora, alpha: float | None = None) -> float:
    """The scale of B @ A, by the files of an adapter.

    Args:
        lora: its rank is that of the tensors.
        alpha: used for a checkpoint that has none.
    """
    config = folder / "adapter_config.json"
    if config.is_file():
        said = json.loads(config.read_text(encoding="utf-8"))
    else:
        said = saved_arguments(next(iter(sorted(folder.glob("mp_rank_*/*.pt"))), folder / "common.pt"))
    found = said.get("lora_alpha")
    if found is None:
        found = alpha
    assert found is not None  # the reader has refused it
    return _scale(found, lora.r, stabilized=said.get("use_rslora") is True)


def unlike_products(source: PeftPairs, output: MegatronPairs, arch: Qwen3Arch) -> list[str]:
    """Weights that two adapters change differently, one line each."""
    lines = []
    for name, shape in published_shapes(Contents(arch)).items():
        old, new = source(name), output(name)
        if old is None and new is None:
            continue
        narrow = output.dtypes(peft_tensor(name.removesuffix(".weight"), "A")) or {torch.float32}
        slack = max(1.0, *(2.0**24 * torch.finfo(dtype).eps for dtype in narrow))
        step = max(1, _BLOCK // shape[1])
        for start in range(0, shape[0], step):
            place = (start, min(start + step, shape[0])), (0, shape[1])
            zero = torch.zeros(1, dtype=torch.float64)
            first, error = product(old, *place) if old else (zero, zero)
            second, _ = product(new, *place) if new else (zero, zero)
            if bool(((first - second).abs() > slack * error).any()):
                lines.append(f"differs: scale * B @ A of {name}")
                break
    wholes = {PEFT_HEAD: ((0, 1), (0, arch.hidden_size))} if arch.reward else {}
    wholes |= {name: ((0, shape[0]), (0, 1)) for name, shape in output.shapes.items() if name.endswith(DORA)}
    for name, place in wholes.items():
        before, after = source.read(name, *place), output.read(name, *place)
        if not torch.equal(before.to(after.dtype), after):
            lines.append(f"differs: {name}")
    return lines
