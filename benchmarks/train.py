#!/usr/bin/env python3
"""Speed and memory of training, beside a plain transformers loop on the same model, batch and data. Prints JSON.

    python benchmarks/train.py [--steps 8] [--threads 2] [--bf16] [--only speed|memory|qlora|cp]

speed   One process each, taking turns: forward, backward and AdamW on a model of 13 M parameters (hidden 256, 8 layers,
        vocabulary 8192), 4 sequences of 512 tokens. Tokens per second (median step), MFU against the rate of a large
        matrix multiplication measured in the same run, peak resident memory. Target: 1.2 x transformers' tokens/s.
memory  Peak resident memory of LoRA (r 16, all linears) beside full fine-tuning, Qwen3-0.6B's shapes, one sequence of
        64 tokens, float32. Target: below 0.35.
qlora   Memory of a LoRA training of Qwen3-0.6B's shapes, bfloat16, r 4, one sequence of 64 tokens, layers recomputed:
        as it is, with --qlora, with --qlora-embedding, too, and these with --qlora-double-quant. Bytes of the weights,
        and the most that all tensors take in a step: weights, gradients, optimizer, and what the step makes. Target:
        at most 0.4 x LoRA's weights.
cp      Memory of the activations of one step on each rank at --context-parallel-size 1, 2 and 4, both algorithms, a
        model of 2 layers (hidden 256, 8 heads of 64, 4 key/value heads), one sequence of 8192 tokens, float32: what is
        kept for backward, the most tensors there are at a time, and by how much the resident memory of the process
        rises. Each beside what one process takes. Target: kept and peak at most 1.15 / context parallel size of that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform as machine
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from qwen3_npu.args.parallel import RuntimeArgs  # noqa: E402
from qwen3_npu.checkpoint.binary.dtypes import BF16  # noqa: E402
from qwen3_npu.model.arch import Qwen3Arch, flops_per_token, parameter_count  # noqa: E402
from qwen3_npu.model.sizes import SIZES  # noqa: E402
from qwen3_npu.parity.tiny import write_instructions, write_model, write_tokens  # noqa: E402

SEQ, BATCH = 512, 4
SMALL = Qwen3Arch(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    tie_word_embeddings=True,
    max_position_embeddings=SEQ,
    bos_token_id=0,
    eos_token_id=1,
)
LONG = dataclasses.replace(
    SMALL,
    vocab_size=2048,
    num_hidden_layers=2,
    head_dim=64,
    max_position_embeddings=8192,
)


def gemm_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a 2048 x 2048 x 2048 matrix multiplication, the best of several."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def transformers_loop(folder: Path, steps: int, bf16: bool) -> None:
    """The reference, in a process of its own: prints seconds of each step and peak memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if bf16 else torch.float32)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(SMALL.vocab_size, (BATCH, SEQ + 1))
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        logits = model(input_ids=ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def ours(folder: Path, flags: list[str], threads: int) -> dict[str, object]:
    """Seconds of each step and peak memory of pretrain_gpt.py."""
    metrics = folder / "metrics"
    command = [
        sys.executable,
        str(ROOT / "pretrain_gpt.py"),
        "--device",
        "cpu",
        "--eval-iters",
        "0",
        "--split",
        "1,0,0",
    ]
    command += ["--split", "1,0,0", "--lr", "1e-4", "--log-interval", "1", "--tensorboard-dir", str(metrics), *flags]
    output = _run(command, threads)
    lines = [json.loads(line) for line in (metrics / "metrics.jsonl").read_text().splitlines()]
    (metrics / "metrics.jsonl").unlink()
    seconds = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    peak = max(line["memory_gib"] for line in lines if "memory_gib" in line) * 2**30
    trained = re.search(r"(\S+ \S+) of .* parameters are trained", output)
    return {"seconds": seconds, "peak_bytes": peak, "trained": trained[1] if trained else "all"}


def _run(command: list[str], threads: int, environment: dict[str, str] | None = None) -> str:
    everything = {**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})}
    done = subprocess.run(command, env=everything, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def speed(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Ours and transformers, twice each in turns."""
    model = write_model(folder / "small", SMALL)
    tokens = write_tokens(folder / "text_document", vocab=SMALL.vocab_size, documents=2000)
    flags = ["--load", str(model), "--data-path", str(tokens), "--seq-length", str(SEQ)]
    flags += ["--micro-batch-size", str(BATCH), "--train-iters", str(args.steps), *(["--bf16"] if args.bf16 else [])]
    reference = [sys.executable, __file__, "--reference", str(model), "--steps", str(args.steps)]
    reference += ["--bf16"] if args.bf16 else []
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    peaks = {"ours": 0.0, "transformers": 0.0}
    for _ in range(2):
        for name in seconds:
            if name == "ours":
                result = ours(folder, flags, args.threads)
            else:
                result = json.loads(_run(reference, args.threads).splitlines()[-1])
            seconds[name] += result["seconds"][2:]  # the first steps fill caches
            peaks[name] = max(peaks[name], result["peak_bytes"])
    torch.set_num_threads(args.threads)
    gemm = gemm_flops(torch.bfloat16 if args.bf16 else torch.float32)
    found: dict[str, object] = {"parameters": parameter_count(SMALL), "gemm_gflops": round(gemm / 1e9, 1)}
    rates = {name: BATCH * SEQ / statistics.median(values) for name, values in seconds.items()}
    for name, rate in rates.items():
        found[name] = {
            "tokens_per_s": round(rate, 1),
            "mfu": round(rate * flops_per_token(SMALL, SEQ) / gemm, 3),
            "peak_mb": round(peaks[name] / 1e6),
        }
    return found | {"ratio": round(rates["ours"] / rates["transformers"], 2), "target": 1.2}


def memory(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """LoRA beside full fine-tuning."""
    arch = dataclasses.replace(SIZES["qwen3-0.6b"], max_position_embeddings=512)
    model = write_model(folder / "large", arch)
    data = write_instructions(folder / "chats", vocab=arch.vocab_size, longest=60)
    flags = [
        "--stage",
        "sft",
        "--load",
        str(model),
        "--data-path",
        str(data),
        "--seq-length",
        "64",
        "--train-iters",
        "3",
    ]
    full = ours(folder, flags, args.threads)
    lora = ours(folder, [*flags, "--lora-r", "16"], args.threads)
    peaks = {"full": full["peak_bytes"], "lora": lora["peak_bytes"]}
    return {
        "parameters": parameter_count(arch),
        "lora_parameters": lora["trained"],
        **{f"{name}_peak_mb": round(peak / 1e6) for name, peak in peaks.items()},
        "ratio": round(peaks["lora"] / peaks["full"], 3),
        "target": 0.35,
    }


def resident() -> tuple[int, int]:
    """Resident bytes of this process: now, and the most since the last call."""
    status = dict(re.findall(r"(Vm\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts anew
    return int(status["VmRSS"]) * 1024, int(status["VmHWM"]) * 1024


def qlora(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """LoRA on a base in bfloat16 and in 4 bits, each in a process of its own."""
    arch = dataclasses.replace(SIZES["qwen3-0.6b"], max_position_embeddings=512)
    model = write_model(folder / "bf16", arch, dtype=BF16)
    data = write_instructions(folder / "some", vocab=arch.vocab_size, longest=60)
    flags = ["--stage", "sft", "--load", str(model), "--data-path", str(data), "--seq-length", "64", "--bf16"]
    flags += ["--train-iters", "3", "--lr", "1e-4", "--device", "cpu", "--lora-r", "4", "--eval-iters", "0"]
    flags += ["--loss-compute-mode", "chunk", "--loss-chunk-size", "8"]
    flags += ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "28"]
    found = {}
    runs = {"lora": []}
    for double in (False, True):
        more = ["--qlora", *(["--qlora-double-quant"] if double else [])]
        runs |= {
            "qlora" + "_double" * double: more,
            "qlora_embedding" + "_double" * double: [*more, "--qlora-embedding"],
        }
    for name, more in runs.items():
        command = [sys.executable, __file__, "--resident", *flags, *more]
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        found[name]["ratio_to_weights"] = round(found[name]["most_mb"] / found["lora"]["weights_mb"], 3)
    found["ratio"] = found["qlora_embedding"]["ratio_to_weights"]
    return found | {"target": 0.4}


def resident_worker(flags: list[str]) -> None:
    """What the weights take, and the most that a step takes, in MB."""
    from qwen3_npu.distributed.launch import process_group
    from qwen3_npu.platform import select_platform

    platform = select_platform("cpu")
    platform.activate()
    from qwen3_npu.parity.measure import trainer
    from qwen3_npu.trace.activations import activations

    with process_group(platform, RuntimeArgs()) as world, trainer(platform, world, flags) as made:
        made.step()
        with activations() as counted:
            made.step()
        parameters = list(made.modules[0].parameters())
        weights = sum(p.nbytes + (p.nf4.scales.nbytes if hasattr(p, "nf4") else 0) for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)  # gradient, master and two moments in float32
        found = {"weights_mb": weights, "most_mb": weights + 16 * trained + counted.peak}
        print(json.dumps({name: round(value / 1e6) for name, value in found.items()}))


def activation_worker(flags: list[str]) -> None:
    """One rank: two steps, one to count tensors in, one to watch the process in; rank 0 prints the most of any rank."""
    from qwen3_npu.distributed.launch import process_group
    from qwen3_npu.platform import select_platform

    platform = select_platform("cpu")
    platform.activate()
    from qwen3_npu.parity.measure import trainer
    from qwen3_npu.trace.activations import activations

    with process_group(platform, RuntimeArgs()) as world, trainer(platform, world, flags) as made:
        with activations() as counted:
            made.step()
        before, _ = resident()
        made.step()
        found = torch.tensor([counted.kept, counted.peak, resident()[1] - before])
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        if world.rank == 0:
            print(json.dumps(dict(zip(("kept", "peak", "resident"), found.tolist(), strict=True))))


def context_parallel(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Activations of a rank by size and algorithm."""
    length = LONG.max_position_embeddings
    model = write_model(folder / "long", LONG)
    tokens = write_tokens(folder / "long_document", vocab=LONG.vocab_size, documents=400)
    flags = ["--device", "cpu", "--eval-iters", "0", "--split", "1,0,0", "--lr", "1e-4", "--train-iters", "2"]
    flags += ["--load", str(model), "--data-path", str(tokens), "--seq-length", str(length)]
    found: dict[str, dict[str, object]] = {}
    alone: dict[str, int] = {}
    for size, algorithm in ((1, ""), *((n, a) for n in (2, 4) for a in ("ulysses_cp_algo", "megatron_cp_algo"))):
        extra = ["--context-parallel-size", str(size), "--context-parallel-algo", algorithm] if algorithm else []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        # Without the threshold the C library keeps what is freed for the next step.
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
        worker = [__file__, "--activations", *flags, *extra]
        result = json.loads(_run([*command, *worker], 1, environment).splitlines()[-1])
        alone = alone or result
        found[f"CP{size} {algorithm}".strip()] = {
            f"{what}_gb_per_rank": round(taken / 1e9, 4) for what, taken in result.items()
        } | {f"{what}_times_cp": round(taken / alone[what] * size, 3) for what, taken in result.items() if algorithm}
    return {"tokens": length, "target_times_cp": 1.15, **found}


def main() -> None:
    if sys.argv[1:2] == ["--activations"]:
        activation_worker(sys.argv[2:])
        return
    if sys.argv[1:2] == ["--resident"]:
        resident_worker(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", choices=["speed", "memory", "qlora", "cp"])
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reference:
        transformers_loop(args.reference, args.steps, args.bf16)
        return
    found: dict[str, object] = {"command": " ".join(sys.argv), "torch": torch.__version__, "machine": machine.machine()}
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in (("speed", speed), ("memory", memory), ("qlora", qlora), ("cp", context_parallel)):
            if args.only in (None, name):
                found[name] = measure(Path(folder), args)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
