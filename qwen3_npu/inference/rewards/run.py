"""Compute the rewards of all answers of a file and write them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qwen3_npu import console, log
from qwen3_npu.args.inference import GenerateArgs, InferenceArgs
from qwen3_npu.data.text.prompt_types import AUTO
from qwen3_npu.distributed.launch import World
from qwen3_npu.inference.diagnose import check_finite_scores
from qwen3_npu.inference.plan import InferencePlan
from qwen3_npu.inference.results.files import write_lines
from qwen3_npu.inference.rewards.texts import PAIR, Scored, read_texts
from qwen3_npu.inference.runner import Runner, loaded
from qwen3_npu.inference.text import Writer
from qwen3_npu.platform.base import Platform
from qwen3_npu.progress import Progress

RESULT = "reward_result"


def score_answers(platform: Platform, world: World, args: InferenceArgs, plan: InferencePlan) -> None:
    """Load the reward model and score the answers of --predict-data.

    Raises:
        UsageError: something cannot be scored; nothing has been loaded or written then.
    """
    prompts, flags = plan.prompts, args.generate
    if prompts.template_given is None:
        prompts = dataclasses.replace(prompts, prompt_type=AUTO)
    texts = read_texts(str(flags.predict_data), Writer(plan.tokenizer, prompts), plan.positions)
    rows = min(flags.predict_batch_size, len(texts))
    with loaded(platform, world, args.runtime, args.weights, plan=plan, rows=rows) as runner:
        _write(runner, flags, texts)


def _write(runner: Runner, args: GenerateArgs, texts: Sequence[Scored]) -> None:
    """Write a line for each record with its texts and rewards; print how many pairs are ranked right."""
    rewards = rewards_of(runner, [text.tokens for text in texts], args.predict_batch_size)
    results = [
        _result([(text, rewards[number]) for number, text in group])
        for _, group in itertools.groupby(enumerate(texts), key=lambda item: item[1].record)
    ]
    if runner.world.rank:
        return
    path = Path(args.output_dir) / f"{RESULT}.jsonl"
    write_lines(path, results)
    log.info(f"written: {path}")
    for result in results:
        console.show(f"{result['prompt']}{result.get('answer', result.get('chosen'))}\n{_shown(result)}\n")
    margins = [result["margin"] for result in results if "margin" in result]
    if margins:
        right = sum(margin > 0 for margin in margins)
        mean = sum(margins) / len(margins)
        console.show(f"accuracy {right / len(margins):.4f}: {right} of {len(margins)} pairs; mean margin {mean:.4f}")


def _result(group: Sequence[tuple[Scored, float]]) -> dict[str, Any]:
    first, _ = group[0]
    result: dict[str, Any] = {"prompt": first.prompt}
    if first.name not in PAIR:
        return result | {"answer": first.answer, "reward": group[0][1], "tokens": len(first.tokens)}
    for text, reward in group:
        result |= {text.name: text.answer, f"reward_{text.name}": reward, f"tokens_{text.name}": len(text.tokens)}
    return result | {"margin": result["reward_chosen"] - result["reward_rejected"]}


def _shown(result: dict[str, object]) -> str:
    if "reward" in result:
        return f"reward {result['reward']:.4f}"
    return f"chosen {result['reward_chosen']:.4f}, rejected {result['reward_rejected']:.4f}"


def rewards_of(runner: Runner, texts: Sequence[Sequence[int]], at_once: int) -> list[float]:
    """The reward of each text, on every process.

    Args:
        at_once: number of texts of one pass.
    """
    mine = sorted(range(runner.data_rank, len(texts), runner.data_parallel), key=lambda number: len(texts[number]))
    found: list[tuple[int, float]] = []
    with Progress("score", len(mine), {"texts": ""}) as progress:
        for start in range(0, len(mine), at_once):
            numbers = mine[start : start + at_once]
            batch = [texts[number] for number in numbers]
            lengths = [len(text) for text in batch]
            ends = [end - 1 for end in itertools.accumulate(lengths)]
            runner.anyone(True)
            rewards = runner.forward([token for text in batch for token in text], runner.packed(lengths), ends)
            values = torch.zeros(len(batch), device=runner.device) if rewards is None else rewards[:, 0].float()
            values_here = runner.share(values).tolist()
            check_finite_scores(runner, values_here, batch)
            found += zip(numbers, values_here, strict=True)
            progress.add(texts=len(batch))
    while runner.anyone(False):
        runner.idle()
    return [reward for _, reward in sorted(runner.gather(found))]
