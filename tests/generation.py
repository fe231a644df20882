"""What the tests of generation share: plans without tokenizer files, prompts, what transformers answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qwen3_npu import cli
from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs
from qwen3_npu.args.parallel import make_layout
from qwen3_npu.checkpoint.formats.huggingface import open_hf
from qwen3_npu.inference.plan import InferencePlan

EOS = 1


@contextlib.contextmanager
def runner(platform: Any, world: Any, folder: str | Path, *flags: str) -> Iterator[Any]:
    """A loaded model, as `inference.py` loads it from these flags."""
    from qwen3_npu.inference.runner import loaded

    words = ["--load", str(folder), "--prompt", "x", "--device", "cpu", *flags]
    args = InferenceArgs(*cli.parse("test", "", GROUPS, FOREIGN, argv=words).groups)
    arch = open_hf(args.model.hf_dir or folder).arch
    layout = make_layout(arch, args.parallel)
    copies = world.size // (layout.tensor * layout.pipeline)
    plan = InferencePlan(
        arch,
        "a test",
        layout,
        args.parallel,
        data_parallel=copies,
        positions=arch.max_position_embeddings,
        tokenizer=None,
        eos=(EOS,),
        notes=(),
    )
    with loaded(platform, world, args.runtime, args.weights, plan=plan) as made:
        yield made


def prompts(shared: int = 20) -> list[list[int]]:
    """Unequal prompts, all but the last beginning with the same tokens."""
    draw = torch.Generator().manual_seed(0)
    prefix = torch.randint(2, 256, (shared,), generator=draw).tolist()
    tails = [torch.randint(2, 256, (n,), generator=draw).tolist() for n in (1, 7, 3, 30, 12)]
    return [*(prefix + tail for tail in tails), [5, 6, 7]]


def generated(made: Any, tokens: list[list[int]], limit: int, sampling: Any, **engine: Any) -> list[list[int]]:
    """Answers of our engine to the prompts, by all copies of the model together."""
    from qwen3_npu.inference.engine import Engine, Request

    requests = [Request(i, list(prompt), limit) for i, prompt in enumerate(tokens)]
    mine = [r for r in requests if r.number % made.data_parallel == made.data_rank]
    Engine(made, **{"slots": 4, **engine}).generate(mine, sampling)
    return [answer for _, answer in sorted(made.gather([(r.number, r.generated) for r in mine]))]


def transformers_model(folder: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def transformers_answers(model: Any, tokens: list[list[int]], limit: int, **options: Any) -> list[list[int]]:
    """transformers' answers, prompt by prompt."""
    options = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": 0, "max_new_tokens": limit, **options}
    return [model.generate(torch.tensor([t]), **options)[0].tolist()[len(t) :] for t in tokens]
