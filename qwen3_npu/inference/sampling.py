"""From logits to the next token: penalty, temperature, top-k, top-p, choice.

Steps and their order are those of transformers' `generate`. The random numbers depend on the seed, the prompt's number
and the token's place alone: not on the batch, the device, or the layout of the model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch

from qwen3_npu.args.inference import GenerateArgs
from qwen3_npu.inference.generation_config import DEFAULTS

_MASK = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        sample: draw; otherwise take the likeliest, and the other numbers but the penalty mean nothing.
        repetition_penalty: logits of tokens that occurred are divided by it (multiplied if below 0); arXiv:1909.05858.
        presence_penalty, frequency_penalty: what a token that was generated before loses of its logit, once and for
            each time (https://platform.openai.com/docs/api-reference/chat/create).
        logit_bias: tokens and what is added to their logits.
        top_k: draw among so many likeliest tokens; 0: all.
        top_p: draw among the likeliest tokens whose probabilities add up to it; 1: all.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


def sampling_of(args: GenerateArgs, seed: int, *, sample: bool) -> Sampling:
    """The flags, complete, as the engine takes them; a temperature of 0 has no effect where nothing is sampled."""
    values = [getattr(args, name) if getattr(args, name) is not None else DEFAULTS[name] for name in DEFAULTS]
    temperature, top_k, top_p, penalty = values
    return Sampling(sample, temperature or 1.0, int(top_k), top_p, repetition_penalty=penalty, seed=seed)


def penalized(scores: torch.Tensor, seen: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """Scores [b, vocabulary] with the penalty for the tokens that each row has seen."""
    if penalty == 1.0:
        return scores
    scores = scores.clone()
    for row, tokens in zip(scores, seen, strict=True):
        ids = torch.tensor(sorted(set(tokens)), device=row.device)
        values = row[ids]
        row[ids] = torch.where(values < 0, values * penalty, values / penalty)
    return scores


def biased(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores [b, vocabulary] with the bias of each token."""
    if not sampling.logit_bias:
        return scores
    ids, biases = zip(*sampling.logit_bias, strict=True)
    return scores.index_add(1, torch.tensor(ids, device=scores.device), scores.new_tensor([biases] * len(scores)))


def less_often(
    scores: torch.Tensor, seen: Sequence[Sequence[int]], prompts: Sequence[int], sampling: Sampling
) -> torch.Tensor:
    """Scores [b, vocabulary], lower for the tokens that each row has seen after its prompt."""
    if not sampling.presence_penalty and not sampling.frequency_penalty:
        return scores
    scores = scores.clone()
    for row, tokens, prompt in zip(scores, seen, prompts, strict=True):
        counts = Counter(tokens[prompt:])
        losses = [sampling.presence_penalty + sampling.frequency_penalty * count for count in counts.values()]
        row.index_add_(0, torch.tensor(list(counts), device=row.device, dtype=torch.int64), -row.new_tensor(losses))
    return scores


def warped(scores: torch.Tensor, sampling: Sampling, *, at_least: int = 1) -> torch.Tensor:
    """Scores [b, vocabulary] divided by the temperature, -inf where top-k and top-p exclude a token.

    Args:
        at_least: tokens that stay whatever top-k and top-p say.
    """
    scores = scores / sampling.temperature
    if sampling.top_k:
        kth = scores.topk(min(max(sampling.top_k, at_least), scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    if sampling.top_p < 1.0:
        # Only tokens that top-k left need sorting.
        room = int((scores > float("-inf")).sum(-1).max())
        values, ids = scores.topk(room)
        probabilities = values.softmax(-1)
        # A token stays if those before it do not reach top_p yet.
        out = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        out[:, :at_least] = False
        scores = scores.scatter(1, ids, values.masked_fill(out, float("-inf")))
    return scores


def choose_tokens(
    logits: torch.Tensor,
    sampling: Sampling,
    seen: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    prompts: Sequence[int] = (),
) -> torch.Tensor:
    """The next token of each row, [b] int64.

    Args:
        logits: [b, vocabulary].
        seen: tokens of each row so far.
        numbers: the prompts' numbers.
        prompts: how many of the tokens seen are the prompt; read where the sampling has a penalty for the others.
    """
    scores = penalized(biased(logits.float(), sampling), seen, sampling.repetition_penalty)
    scores = less_often(scores, seen, prompts, sampling)
    if not sampling.sample:
        return scores.argmax(-1)
    chosen = []
    for row, tokens, number in zip(warped(scores, sampling), seen, numbers, strict=True):
        # In the order of the vocabulary: were it that of the probabilities, two that are nearly equal could swap.
        ids = torch.nonzero(row > float("-inf")).squeeze(1)
        if not len(ids):  # all NaN; the caller sees it in the token's log-probability
            chosen.append(row.argmax())
            continue
        cumulative = row[ids].cpu().double().softmax(-1).cumsum(-1)  # not every device knows float64
        place = torch.searchsorted(cumulative, uniform(sampling.seed, number, len(tokens)) * cumulative[-1], right=True)
        chosen.append(ids[min(int(place), len(ids) - 1)])
    return torch.stack(chosen)


def uniform(*key: int) -> float:
    """A number in [0, 1) that the key determines (splitmix64, https://prng.di.unimi.it/splitmix64.c)."""
    state = 0
    for part in key:
        state = _mixed((state ^ (part & _MASK)) + 0x9E3779B97F4A7C15)
    return (state >> 11) / (1 << 53)


def _mixed(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
