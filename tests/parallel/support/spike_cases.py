"""Cases of spikes and silent corruption."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from qwen3_npu.distributed.launch import World
from qwen3_npu.errors import Stopped
from qwen3_npu.parity.measure import trainer
from qwen3_npu.platform.base import Platform
from qwen3_npu.training import loop


@dataclasses.dataclass
class Changed:
    """A data set in which some samples are rubbish, or are not there."""

    plain: Any
    rubbish: list[int]
    gone: list[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __getitem__(self, number: int) -> Any:
        for left in self.gone:
            number += number >= left
        sample = self.plain[number]
        if number not in self.rubbish:
            return sample
        if not isinstance(sample, dict):  # of a preference training: the wrong answer is preferred
            return dataclasses.replace(sample, chosen=sample.rejected, rejected=sample.chosen)
        same = torch.full_like(sample["tokens"], 7)
        return {**sample, "tokens": same, "labels": same}


def spiked(platform: Platform, world: World, flags: list[str], rubbish: list[int], gone: list[int]) -> dict[str, Any]:
    """A whole training; its losses by step, the steps that were spikes, and what ended it."""
    losses: dict[int, float] = {}
    spikes: list[int] = []
    stopped = None
    plain_feed = loop.open_feed

    def open_feed(*args: Any) -> Any:
        feed = plain_feed(*args)
        feed.train.dataset = Changed(feed.train.dataset, rubbish, gone)
        return feed

    with mock.patch.object(loop, "open_feed", open_feed), trainer(platform, world, flags) as t:
        plain = t.step

        def step() -> Any:
            number = t.position.iteration + 1
            result = plain()
            if result.skipped:
                spikes.append(number)
            else:
                losses[number] = result.loss
            return result

        t.step = step
        try:
            t.train()
        except Stopped as error:
            stopped = str(error)
        return {"losses": [losses[step] for step in sorted(losses)], "spikes": spikes, "stopped": stopped}


def flipped(platform: Platform, world: World, flags: list[str], rank: int, what: str) -> list[str | None]:
    """What every rank raises when one of them has another bit in a weight or a moment after a step."""
    with trainer(platform, world, flags) as t:
        plain = t.step

        def step() -> Any:
            result = plain()
            if world.rank == rank and t.position.iteration == 1:
                parameter = t.modules[0].decoder.layers[1].mlp.linear_fc2.weight
                parts = getattr(t.optimizer, "chained_optimizers", [t.optimizer])
                states = {key: value for part in parts for key, value in part.optimizer.state.items()}
                tensor = parameter.detach() if what == "weight" else states[parameter][what]
                tensor.view(-1).view(torch.int32)[5] ^= 1 << 28
            return result

        t.step = step
        said = None
        try:
            t.train()
        except Stopped as error:
            said = str(error)
        everyone: list[str | None] = [None] * world.size
        dist.all_gather_object(everyone, said)
        return everyone
