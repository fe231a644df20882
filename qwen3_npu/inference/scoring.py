"""Log-likelihoods of given continuations. Common beginnings are computed once, and only the needed logits.

Tokens are those of lm-evaluation-harness: context and continuation are encoded as one text, and a text that is too long
loses its beginning.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import torch

from qwen3_npu.inference.diagnose import check_finite_scores
from qwen3_npu.inference.engine import common
from qwen3_npu.inference.runner import Runner
from qwen3_npu.model.cache import Kept, KVCache

_WORTH_SHARING = 16
_PASSES_PER_REPORT = 16

Key = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A continuation to be scored.

    Attributes:
        key: identifies it among the results.
        group: choices of one group probably have a common beginning.
        tokens: context and continuation.
        length: number of tokens of the continuation.
    """

    key: Key
    group: str
    tokens: tuple[int, ...]
    length: int


@dataclasses.dataclass
class _Row:
    """A sequence of tokens for the model, and the continuations that are scored at its end."""

    tokens: tuple[int, ...]
    choices: list[Choice] = dataclasses.field(default_factory=list)

    @property
    def logits(self) -> int:
        """Number of positions at the end whose logits are needed."""
        return max(choice.length for choice in self.choices)


class Scorer:
    """Scores with one model.

    Attributes:
        computed, reused: numbers of tokens that were computed, and that a common beginning saved.
    """

    def __init__(self, runner: Runner, *, pass_tokens: int = 512, prefix_cache: bool = True) -> None:
        """Args: pass_tokens: tokens of one pass, unless a single row has more."""
        self.runner, self.pass_tokens, self.prefix_cache = runner, pass_tokens, prefix_cache
        self.cache: KVCache | None = None
        self.computed = self.reused = 0

    def score(
        self,
        choices: Sequence[Choice],
        on_done: Callable[[float], None] | None = None,
        *,
        known: Mapping[Key, float] | None = None,
        on_scores: Callable[[list[tuple[Key, float]]], None] | None = None,
        greedy: dict[Key, bool] | None = None,
    ) -> dict[Key, float]:
        """Log-likelihood of every continuation, on every process.

        Args:
            on_done: called with the finished share of this process's rows.
            known: scores of an earlier run. Passes are composed as without them, and skipped if all their scores are
                known, so a score does not depend on where the earlier run ended.
            on_scores: called every few passes with the new scores.
            greedy: receives for every continuation whether it consists of the likeliest tokens; without `known`.

        Raises:
            Stopped: a score is not a number.
        """
        known = known or {}
        found: list[tuple[Key, float]] = []
        likely: list[tuple[Key, bool]] = []
        pending: list[tuple[list[_Row], torch.Tensor | None]] = []

        def report() -> None:
            scores, likeliest = self._shared(pending, judges=greedy is not None)
            found.extend(scores)
            likely.extend(likeliest)
            if on_scores is not None and scores:
                on_scores(scores)
            pending.clear()

        groups = self._share(_rows(choices, self.runner.plan.positions))
        total = sum(map(len, groups))
        for batch, prefix in self._batches(groups, known):
            pending.append((batch, self._pass(batch, prefix, judges=greedy is not None)))
            if on_done is not None:
                on_done(len(batch) / total)
            if len(pending) == _PASSES_PER_REPORT:
                report()
        report()
        while self.runner.anyone(False):
            self.runner.idle()
        if greedy is not None:
            greedy.update(self.runner.gather(likely))
        return {**known, **dict(self.runner.gather(found))}

    def _shared(
        self, passes: Sequence[tuple[list[_Row], torch.Tensor | None]], *, judges: bool
    ) -> tuple[list[tuple[Key, float]], list[tuple[Key, bool]]]:
        """The last stage's results of some passes, on every process of this copy of the model."""
        keys = [choice.key for batch, _ in passes for row in batch for choice in row.choices]
        if not keys:
            return [], []
        parts = [scores for _, scores in passes if scores is not None]
        empty = torch.zeros(1 + judges, len(keys), device=self.runner.device)
        scores, *judged = self.runner.share(torch.cat(parts, 1) if parts else empty).tolist()
        start = 0
        for batch, _ in passes:
            end = start + sum(len(row.choices) for row in batch)
            check_finite_scores(self.runner, scores[start:end], [row.tokens for row in batch])
            start = end
        likely = [(key, flag == 1) for flags in judged for key, flag in zip(keys, flags, strict=True)]
        return list(zip(keys, scores, strict=True)), likely

    def _share(self, groups: dict[str, list[_Row]]) -> list[list[_Row]]:
        """The groups of this copy of the model. Groups are assigned, longest first, to the copy with the least work."""
        loads = [0] * self.runner.data_parallel
        mine = []
        for rows in sorted(groups.values(), key=lambda rows: -sum(len(row.tokens) for row in rows)):
            target = loads.index(min(loads))
            loads[target] += sum(len(row.tokens) for row in rows)
            if target == self.runner.data_rank:
                mine.append(rows)
        return mine

    def _batches(self, groups: list[list[_Row]], known: Container[Key]) -> Iterator[tuple[list[_Row], int]]:
        """The rows of each pass, and the length of their common beginning, which is cached by then."""
        for rows in groups:
            prefix = _shared_length(rows) if self.prefix_cache else 0
            batches: list[list[_Row]] = [[]]
            # Rows of similar length: nothing is padded, but passes take a similar time.
            for row in sorted(rows, key=lambda row: len(row.tokens)):
                if batches[-1] and sum(len(r.tokens) - prefix for r in (*batches[-1], row)) > self.pass_tokens:
                    batches.append([])
                batches[-1].append(row)
            batches = [
                batch for batch in batches if not all(choice.key in known for row in batch for choice in row.choices)
            ]
            if prefix and batches:
                self._compute_prefix(rows, prefix)
            for batch in batches:
                yield batch, prefix

    def _compute_prefix(self, rows: list[_Row], length: int) -> None:
        """Compute the common beginning of all rows and cache it."""
        first = rows[0].tokens
        if self.cache is None or self.cache.capacity < length:
            self.cache = None  # the old one goes first
            self.cache = self.runner.new_cache(1, min(-(-length // 256) * 256, self.runner.plan.positions))
        for start in range(0, length, self.pass_tokens):
            tokens = first[start : min(start + self.pass_tokens, length)]
            self.runner.anyone(True)
            self.runner.forward(tokens, self.runner.cached(self.cache, [Kept(0, start, len(tokens))]), [])
        self.computed += length
        self.reused += length * (len(rows) - 1)

    def _pass(self, batch: list[_Row], prefix: int, *, judges: bool) -> torch.Tensor | None:
        """Scores of the batch's choices, float32 [1, choices], on the last stage; a second row: 1 for the likeliest."""
        tokens = [token for row in batch for token in row.tokens[prefix:]]
        lengths = [len(row.tokens) - prefix for row in batch]
        self.computed += len(tokens)
        ends = list(itertools.accumulate(lengths))
        wanted = [place for row, end in zip(batch, ends, strict=True) for place in range(end - row.logits, end)]
        self.runner.anyone(True)
        logits = self.runner.forward(tokens, self.runner.packed(lengths, self.cache, prefix), wanted)
        if logits is None:
            return None
        # The softmax's sum needs all of the vocabulary, the numerator only the words of the continuations.
        total = logits.float().logsumexp(-1)
        places: list[int] = []
        words: list[int] = []
        sizes: list[int] = []
        for row, last in zip(batch, itertools.accumulate(row.logits for row in batch), strict=True):
            for choice in row.choices:
                places += range(last - choice.length, last)
                words += choice.tokens[len(choice.tokens) - choice.length :]
                sizes.append(choice.length)
        at = torch.tensor(places, device=logits.device)
        said = torch.tensor(words, device=logits.device)
        found = [logits[at, said].float() - total[at]]
        if judges:
            found.append((logits.argmax(-1)[at] != said).float())
        sums = [torch.stack([part.sum() for part in one.split(sizes)]) for one in found]
        return torch.stack([sums[0], *((wrong == 0).float() for wrong in sums[1:])])


def _shared_length(rows: list[_Row]) -> int:
    """Length of the common beginning of all rows; 0 if it is too short to save time."""
    first = rows[0].tokens
    # Every row keeps the tokens whose logits are needed.
    room = min(len(row.tokens) - row.logits for row in rows)
    length = min([room, *(common(first, row.tokens) for row in rows)])
    return 0 if len(rows) == 1 or length < _WORTH_SHARING else length


def _rows(choices: Sequence[Choice], positions: int) -> dict[str, list[_Row]]:
    """The rows of each group. Continuations of one token after the same context share a row."""
    groups: dict[str, dict[tuple[int, ...], _Row]] = {}
    for choice in choices:
        tokens = choice.tokens[-(positions + 1) :][:-1]
        row = groups.setdefault(choice.group, {}).setdefault(tokens, _Row(tokens))
        row.choices.append(choice)
    return {group: list(rows.values()) for group, rows in groups.items()}


def choice_tokens(
    encode: Callable[[list[str]], list[list[int]]], context: str, continuations: Sequence[str]
) -> list[tuple[tuple[int, ...], int]]:
    """Tokens and length of each continuation of a context, encoded with it as one text.

    A space at the context's end belongs to the continuation.
    """
    stripped = context.rstrip()
    spaces = context[len(stripped) :]
    whole = encode([stripped, *(stripped + spaces + text for text in continuations)])
    return [(tuple(tokens), len(tokens) - len(whole[0])) for tokens in whole[1:]]
