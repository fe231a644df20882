"""Training steps of a model's layers, for `benchmarks/gpu.py`: ours, and transformers with sdpa on the same shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qwen3_npu import log
from qwen3_npu.checkpoint.binary.dtypes import BF16
from qwen3_npu.checkpoint.formats.huggingface import write_config
from qwen3_npu.model.arch import Qwen3Arch, flops_per_token, parameter_count
from qwen3_npu.parity.tiny import write_instructions, write_tokens

PUBLISHED = 989e12  # dense bf16 FLOP/s of an H100 or H200 SXM
# Bytes: of a parameter trained in bfloat16 without a distributed optimizer (weight 2, gradient 4, master 4, moments 8),
# of a token in one layer until backward, and what the rest takes. With 10e9 for the rest the device was so full that
# steps with packed documents took 680 to 880 ms from run to run; with room the same step is 1.2 times as fast.
PARAMETER, TOKEN, REST = 18, {False: 200_000, True: 260_000}, 26e9


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is trained.

    Attributes:
        layers: of the whole model; the vocabulary is made smaller with them, so that it keeps its share of the time.
    """

    name: str
    arch: Qwen3Arch
    length: int
    steps: int

    def fitted(self, rows: int, memory: float) -> Qwen3Arch:
        """As many layers as fit beside each other, with their share of the vocabulary."""
        arch = self.arch
        whole = arch.num_hidden_layers
        size = parameter_count(arch) / whole * PARAMETER + rows * self.length * TOKEN[arch.is_moe]
        layers = max(min(whole, int((memory - REST) / size)), 1)
        vocabulary = max(arch.vocab_size * layers // whole // 256 * 256, 256)
        return dataclasses.replace(
            arch, num_hidden_layers=layers, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """One way to train it."""

    micro_batches: int
    rows: int = 1
    packed: bool = False

    @property
    def name(self) -> str:
        return f"{self.micro_batches} x {self.rows}{' packed' * self.packed}"


RUNS = (Run(1), Run(8), Run(8, packed=True))


def memory(device: str) -> float:
    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 4e9


def write_data(folder: Path, arch: Qwen3Arch, length: int, *, packed: bool) -> list[str]:
    """Data of this vocabulary, and its flags."""
    if packed:
        prefix = write_instructions(
            folder / f"packs_{arch.vocab_size}", pack=length, count=16, vocab=arch.vocab_size, longest=length // 3
        )
        return ["--stage", "sft", "--reset-attention-mask", "--data-path", str(prefix)]
    prefix = write_tokens(folder / f"text_{arch.vocab_size}", vocab=arch.vocab_size, documents=2000)
    return ["--data-path", str(prefix)]


def flags(folder: Path, arch: Qwen3Arch, shape: Shape, run: Run, device: str) -> list[str]:
    """Those of pretrain_gpt.py."""
    model = folder / f"model_{arch.vocab_size}"
    model.mkdir(exist_ok=True)
    write_config(arch, None, model, BF16)
    given = ["--hf-dir", str(model), "--device", device, "--bf16", "--lr", "1e-5", "--split", "1,0,0"]
    given += ["--eval-iters", "0", "--train-iters", "1000", "--seq-length", str(shape.length)]
    given += ["--micro-batch-size", str(run.rows), "--global-batch-size", str(run.rows * run.micro_batches)]
    return given + write_data(folder, arch, shape.length, packed=run.packed)


@contextlib.contextmanager
def measured(device: str) -> Iterator[dict[str, Any]]:
    """What the block takes of the device's memory, which is empty before and after."""
    found: dict[str, Any] = {}
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found["gib_before"] = round(torch.cuda.memory_allocated() / 2**30, 2)
    yield found
    if device == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


def step_times(step: Callable[[], Any], steps: int, device: str) -> tuple[list[float], list[Any]]:
    """Seconds of each step after two that warm up, and what the steps returned."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    seconds, results = [], []
    for i in range(steps + 2):
        wait()
        start = time.perf_counter()
        results.append(step())
        wait()
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    return seconds, results


def summary(arch: Qwen3Arch, seconds: list[float], tokens: int, length: float) -> dict[str, Any]:
    """MFU is of the published peak; `length` is how far attention reaches."""
    second = statistics.median(seconds)
    rate = tokens / second
    return {
        "step_ms": round(second * 1e3, 2),
        "spread_ms": [round(min(seconds) * 1e3, 2), round(max(seconds) * 1e3, 2)],
        "tokens_per_s": round(rate),
        "mfu": round(rate * flops_per_token(arch, length) / PUBLISHED, 4),
    }


def ours(platform: Any, world: Any, folder: Path, shape: Shape, *, run: Run) -> dict[str, Any]:
    """Steps of `pretrain_gpt.py`'s trainer; with one micro-batch also which operations take the time."""
    from qwen3_npu.parity.measure import trainer

    device = platform.name
    arch = shape.fitted(run.rows, memory(device))
    given = flags(folder, arch, shape, run, device)
    with measured(device) as found, log.quiet(), trainer(platform, world, given) as made:
        seconds, results = step_times(made.step, shape.steps, device)
        tally = results[-1].tally
        found |= {"layers": arch.num_hidden_layers, "vocabulary": arch.vocab_size, "loss": results[-1].loss}
        places = run.micro_batches * run.rows * shape.length
        found |= summary(arch, seconds, places, tally.squares / max(tally.real_tokens, 1))
        if run.micro_batches == 1:
            found["profile"] = profiled(made.step, found["step_ms"], device)
    return found


def profiled(step: Callable[[], Any], step_ms: float, device: str) -> dict[str, Any]:
    """One step: the operations that take longest, how busy the device is, and where the host waits."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as recorded:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    events = recorded.key_averages()
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    ran = (e for e in events if e.device_type == kind and not getattr(e, "is_user_annotation", False))
    kernels = sorted(ran, key=lambda e: -getattr(e, attribute))
    busy = sum(getattr(e, attribute) for e in kernels) / 1e3
    waits = {e.key: e.count for e in events if "Synchronize" in e.key or "_local_scalar_dense" in e.key}
    waits |= {e.key: e.count for e in events if e.key.startswith("Memcpy")}
    return {
        "device_ms": round(busy, 2),
        "idle_share": round(1 - busy / step_ms, 3),
        "launches": sum(e.count for e in kernels),
        "waits": waits,
        "slowest": [
            {"ms": round(getattr(e, attribute) / 1e3, 3), "count": e.count, "name": e.key[:110]} for e in kernels[:40]
        ],
    }


def peer(folder: Path, shape: Shape, device: str, run: Run) -> dict[str, Any]:
    """transformers with sdpa, weights and AdamW's moments in bfloat16 (8 bytes a parameter, ours 18)."""
    arch = shape.fitted(run.rows, memory(device))
    with measured(device) as found:
        step, length = peer_step(folder, arch, shape, run=run, device=device)
        seconds, results = step_times(step, shape.steps, device)
        found |= {"layers": arch.num_hidden_layers, "vocabulary": arch.vocab_size, "loss": results[-1]}
        found |= summary(arch, seconds, run.micro_batches * run.rows * shape.length, length)
        if run.micro_batches == 1:
            found["profile"] = profiled(step, found["step_ms"], device)
    return found


def peer_step(
    folder: Path, arch: Qwen3Arch, shape: Shape, *, run: Run, device: str
) -> tuple[Callable[[], float], float]:
    """A step of a new model, and how far its attention reaches."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_folder = folder / f"peer_{arch.vocab_size}"
    model_folder.mkdir(exist_ok=True)
    write_config(arch, None, model_folder, BF16)
    config = AutoConfig.from_pretrained(model_folder, use_cache=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(arch.vocab_size, (run.rows, shape.length), device=device)
    documents = [shape.length // 8] * 8 if run.packed else [shape.length]
    positions = torch.cat([torch.arange(n, device=device) for n in documents]).expand(run.rows, -1)

    def step() -> float:
        optimizer.zero_grad()
        for _ in range(run.micro_batches):
            loss = model(input_ids=ids, labels=ids, position_ids=positions).loss / run.micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item() * run.micro_batches

    return step, sum(n * n for n in documents) / shape.length
