"""Cases of spikes and silent corruption."""

from __future__ import annotations

import dataclasses
import time
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from qwen3_npu.checkpoint.training.optimizer_state import parts
from qwen3_npu.distributed.launch import World
from qwen3_npu.errors import Stopped
from qwen3_npu.parity.measure import trainer
from qwen3_npu.platform.base import Platform
from qwen3_npu.training import loop
from qwen3_npu.watch.start import watched


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
        if hasattr(sample, "ids"):  # an instruction, or a pack of them: the answers are one token all along
            ids, labels = (np.where(sample.labels >= 0, 7, tokens) for tokens in (sample.ids, sample.labels))
            return dataclasses.replace(sample, ids=ids, labels=labels)
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


def flips(platform: Platform, world: World, flags: list[str], rank: int) -> dict[str, Any]:
    """One bit after the other, of an exponent and of a mantissa, in all that one rank holds; each is put back.

    Returns:
        Which bit -> what the step after it raised on each rank; and the losses of the steps without a flipped bit.
    """
    with trainer(platform, world, flags) as t:
        said: dict[str, Any] = {}
        losses = [t.step().loss]
        for name, tensor in held(t).items():
            words = {2: torch.int16, 4: torch.int32, 1: torch.uint8}[tensor.element_size()]
            number = int(tensor.view(-1).view(words).ne(0).nonzero()[0])
            for what, bit in (("mantissa", 0), ("exponent", {2: 12, 4: 27, 1: 7}[tensor.element_size()])):
                found = None
                if world.rank == rank:
                    tensor.view(-1).view(words)[number] ^= 1 << bit
                try:
                    t.step()
                except Stopped as error:
                    found = str(error)
                if world.rank == rank:
                    tensor.view(-1).view(words)[number] ^= 1 << bit
                said[f"{what} of {name}"] = [None] * world.size
                dist.all_gather_object(said[f"{what} of {name}"], found)
        losses.append(t.step().loss)
        return {"said": said, "losses": losses}


def held(t: loop.Trainer) -> dict[str, torch.Tensor]:
    """Of each kind of state the first tensor that is not all zero."""
    found: dict[str, torch.Tensor] = {}

    def add(kind: str, tensor: torch.Tensor) -> None:
        if tensor.numel() > 1 and tensor.is_contiguous() and bool(tensor.any()):
            found.setdefault(kind, tensor.detach())

    for chunk in t.modules:
        for parameter in chunk.parameters():
            add("weight" if parameter.requires_grad else "frozen weight", parameter)
            if hasattr(parameter, "nf4"):
                add("scales", parameter.nf4.scales.values)
    for part in getattr(t.optimizer, "chained_optimizers", [t.optimizer]):
        for low in vars(vars(part).get("sliced", t)).get("low", {}).values():
            add("float32 master", low)
        weights = {parameter.data_ptr() for chunk in t.modules for parameter in chunk.parameters()}
        for main, state in part.optimizer.state.items():
            if main.data_ptr() not in weights and main.dtype == torch.float32 != t.dtype:
                add("float32 master", main)
            for kind in ("exp_avg", "exp_avg_sq"):
                if kind in state:
                    add(kind, state[kind])
    return found


def watched_training(platform: Platform, world: World, flags: list[str], save: str) -> dict[str, Any]:
    """A training under watch whose rank 1 reads slowly before step 3, and has another bit in a moment in step 5."""
    with trainer(platform, world, flags) as t, watched(t.args.watch, save, event=platform.event):
        plain, said = t.step, None

        def read_slowly() -> None:
            time.sleep(3)

        def step() -> Any:
            if world.rank == 1 and t.position.iteration == 2:
                read_slowly()
            if world.rank == 1 and t.position.iteration == 4:
                state = next(iter(next(iter(parts(t.optimizer))).optimizer.state.values()))
                state["exp_avg_sq"].view(-1).view(torch.int32)[3] ^= 1 << 12
            return plain()

        t.step = step
        try:
            t.train()
        except Stopped as error:
            said = str(error)
    return {"steps": t.position.iteration, "said": said}
