#!/usr/bin/env python3
"""How fast decoding is, beside transformers' `generate` with its cache, same weights, same run. Prints JSON.

    python benchmarks/generate.py [--size qwen3-0.6b] [--folder DIR] [--steps 24] [--rounds 3] [--threads 2]
                                  [--clock cpu]

Both take turns, round by round; the time of a step is the median over all rounds. The limit is the time in which this
machine reads the weights once, by the bandwidth measured in the same run. Targets, as ratios to transformers:
  float32, 1 prompt               >= 1.2
  float32, 8 unequal prompts      >= 2.5
  bfloat16, 1 prompt              >= 1.3
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from random_model import make_model  # noqa: E402

from qwen3_npu import log  # noqa: E402
from qwen3_npu.args.inference import WeightArgs  # noqa: E402
from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs, make_layout  # noqa: E402
from qwen3_npu.inference.plan import InferencePlan  # noqa: E402
from qwen3_npu.model.arch import parameter_count  # noqa: E402
from qwen3_npu.model.sizes import SIZES  # noqa: E402
from qwen3_npu.platform import select_platform  # noqa: E402

CASES = {"float32, 1 prompt": (False, 1, 1.2), "float32, 8 unequal prompts": (False, 8, 2.5)}
CASES |= {"bfloat16, 1 prompt": (True, 1, 1.3)}


def clock() -> float:
    """Seconds; of processor time where --clock cpu asks for it."""
    return CLOCK()


CLOCK = time.perf_counter


def bandwidth() -> float:
    """Bytes per second that all threads together read, the best of several."""
    block = torch.ones(1 << 28)  # 1 GiB
    times = []
    for _ in range(5):
        start = clock()
        block.sum()
        times.append(clock() - start)
    return block.numel() * 4 / min(times)


def prompts(count: int) -> list[list[int]]:
    """Prompts of 128 tokens, or of 32 to 256."""
    draw = torch.Generator().manual_seed(0)
    lengths = [128] if count == 1 else [32 + 32 * i for i in range(count)]
    return [torch.randint(0, 150_000, (n,), generator=draw).tolist() for n in lengths]


class Theirs:
    """transformers, with left padding where prompts are unequal."""

    def __init__(self, folder: Path, bf16: bool) -> None:
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if bf16 else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def steps(self, tokens: list[list[int]], steps: int) -> tuple[list[float], list[list[int]]]:
        """Seconds of each step after the first, and what was generated."""
        from transformers import LogitsProcessor, LogitsProcessorList

        class Clock(LogitsProcessor):
            times: list[float] = []  # noqa: RUF012

            def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                self.times.append(clock())
                return scores

        watch = Clock()
        watch.times = []
        longest = max(map(len, tokens))
        ids = torch.tensor([[0] * (longest - len(t)) + t for t in tokens])
        mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in tokens])
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([watch]),
        )
        return differences(watch.times), out[:, longest:].tolist()


class Ours:
    """This project."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def steps(self, tokens: list[list[int]], steps: int) -> tuple[list[float], list[list[int]]]:
        """Seconds of each step after the first, and what was generated."""
        from qwen3_npu.inference.engine import Engine, Request
        from qwen3_npu.inference.sampling import Sampling

        times: list[float] = []

        def on_token(request: Request) -> bool:
            if request.number == 0:
                times.append(clock())
            return False

        requests = [Request(i, list(t), steps) for i, t in enumerate(tokens)]
        Engine(self.runner, slots=len(tokens)).generate(requests, Sampling(), on_token)
        return differences(times), [request.generated for request in requests]


def differences(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="qwen3-0.6b")
    parser.add_argument("--folder", type=Path, help="folder of the random weights, kept; default: a temporary one")
    parser.add_argument("--steps", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time of one thread, for a busy machine"
    )
    args = parser.parse_args()
    if args.clock == "cpu":
        global CLOCK
        args.threads, CLOCK = 1, time.process_time
    torch.set_num_threads(args.threads)
    log.LOGGER.setLevel("WARNING")
    platform = select_platform("cpu")
    platform.activate()
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model((args.folder or Path(temporary)) / args.size, SIZES[args.size])
        results = {}
        for name in args.cases:
            results[name] = measure(platform, folder, args, *CASES[name])
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
    print(
        json.dumps(
            {
                "command": " ".join(sys.argv),
                "versions": versions,
                "clock": args.clock,
                "threads": args.threads,
                "results": results,
            },
            indent=2,
        )
    )


def measure(platform: Any, folder: Path, args: argparse.Namespace, bf16: bool, count: int, target: float) -> dict:
    from qwen3_npu.distributed.launch import process_group
    from qwen3_npu.inference.runner import loaded

    arch, parallel = SIZES[args.size], ParallelArgs()
    plan = InferencePlan(
        arch,
        "",
        make_layout(arch, parallel),
        parallel,
        data_parallel=1,
        positions=40960,
        tokenizer=None,
        eos=(),
        notes=(),
    )  # type: ignore[arg-type]
    runtime, weights = RuntimeArgs(), WeightArgs(load=str(folder), bf16=bf16)
    tokens = prompts(count)
    with (
        process_group(platform, runtime) as world,
        loaded(platform, world, runtime, weights, plan=plan, rows=count) as runner,
    ):
        sides = {"transformers": Theirs(folder, bf16), "qwen3_npu": Ours(runner)}
        times: dict[str, list[float]] = {name: [] for name in sides}
        said: dict[str, list[list[int]]] = {}
        for round_ in range(args.rounds + 1):
            for name, side in sides.items():
                steps, said[name] = side.steps(tokens, args.steps if round_ else 3)
                times[name] += steps if round_ else []
    step = {name: statistics.median(values) for name, values in times.items()}
    size = parameter_count(arch) * (2 if bf16 else 4)
    limit = size / bandwidth()
    return {
        **{f"{name} ms per step": round(1000 * seconds, 1) for name, seconds in step.items()},
        **{f"{name} tokens/s": round(count / seconds, 2) for name, seconds in step.items()},
        "ratio": round(step["transformers"] / step["qwen3_npu"], 2),
        "target": target,
        "met": step["transformers"] / step["qwen3_npu"] >= target,
        "limit ms per step (reading the weights once)": round(1000 * limit, 1),
        "times the limit": round(step["qwen3_npu"] / limit, 2),
        "steps": len(times["qwen3_npu"]),
        "same tokens": said["transformers"] == said["qwen3_npu"],
    }


if __name__ == "__main__":
    main()
