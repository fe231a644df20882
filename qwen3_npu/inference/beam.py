"""Beam search, with transformers' rules: which beams continue, which have ended, and when no better one is possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from qwen3_npu.inference.diagnose import check_finite_scores
from qwen3_npu.inference.engine import Request, limit_request
from qwen3_npu.inference.runner import Runner
from qwen3_npu.inference.sampling import Sampling, penalized, warped
from qwen3_npu.model.cache import Kept, KVCache

_WORST = -1e9


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Settings of a beam search.

    Attributes:
        beams: number of beams.
        length_penalty: ended beams are ranked by log-likelihood / generated tokens ** length_penalty.
        sampling: `sample` draws continuations by their likelihood; otherwise the likeliest are taken.
    """

    beams: int
    length_penalty: float
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A continuation: its log-likelihood, the beam that it continues, the token."""

    score: float
    beam: int
    token: int


def beam_search(
    runner: Runner, request: Request, search: BeamSearch, ends: Callable[[list[int]], bool] | None = None
) -> float:
    """Complete a request in place.

    Args:
        ends: generated tokens -> whether they end the answer without an end token (stop texts).

    Returns:
        The score of the best beam.
    """
    return _Search(runner, request, search, ends).run()


class _Search:
    def __init__(
        self, runner: Runner, request: Request, search: BeamSearch, ends: Callable[[list[int]], bool] | None
    ) -> None:
        self.runner, self.request, self.search, self.ends = runner, request, search, ends
        self.eos = set(runner.plan.eos)
        limit_request(request, runner.plan.positions)
        self.limit = request.limit
        # So many candidates that `beams` of them continue even if all others end.
        self.width = max(2, 1 + len(self.eos)) * search.beams
        self.cache: KVCache = runner.new_cache(search.beams, request.prompt + self.limit)
        self.running: list[list[int]] = [[] for _ in range(search.beams)]
        # Only the first of the beams, which are equal at the start.
        self.scores = [0.0] + [_WORST] * (search.beams - 1)
        self.ended: list[tuple[float, list[int]]] = []

    def run(self) -> float:
        """The whole search."""
        step = 0
        while True:
            candidates = self._candidates(self._logits(step), step)
            step += 1
            hits = [self._hits(c, step) for c in candidates]
            best = list(zip(candidates, hits, strict=True))[: self.search.beams]
            self.ended += [
                (c.score / step**self.search.length_penalty, [*self.running[c.beam], c.token]) for c, hit in best if hit
            ]
            self.ended = sorted(self.ended, key=lambda e: -e[0])[: self.search.beams]
            going = sorted((c for c, hit in zip(candidates, hits, strict=True) if not hit), key=lambda c: -c.score)[
                : self.search.beams
            ]
            if not going or not self._can_improve(going[0], step):
                break
            self._go_on(going, step)
        score, tokens = self.ended[0]
        self.request.tokens += tokens
        self.request.finish = "eos" if tokens[-1] in self.eos else "length" if len(tokens) == self.limit else "stop"
        return score

    def _logits(self, step: int) -> torch.Tensor | None:
        """Logits [beams, vocabulary] of the running beams (on the last stage)."""
        prompt, beams = self.request.tokens, len(self.running)
        self.runner.anyone(True)
        if step == 0:
            sequence = self.runner.cached(self.cache, [Kept(0, 0, len(prompt))])
            logits = self.runner.forward(prompt, sequence, [len(prompt) - 1])
            self.cache.reorder([0] * beams, 0, len(prompt))
            return None if logits is None else logits.expand(beams, -1)
        kept = [Kept(slot, len(prompt) + step - 1, 1) for slot in range(beams)]
        last = [beam[-1] for beam in self.running]
        return self.runner.forward(last, self.runner.cached(self.cache, kept), range(beams))

    def _candidates(self, logits: torch.Tensor | None, step: int) -> list[Candidate]:
        """The best continuations of all beams together, or drawn ones; best first."""
        sampling = self.search.sampling
        width = min(self.width, len(self.running) * self.runner.vocab_size)
        scored = None
        if logits is not None:
            seen = [self.request.tokens + beam for beam in self.running]
            scores = penalized(logits.float().log_softmax(-1), seen, sampling.repetition_penalty)
            if sampling.sample:
                scores = warped(scores, sampling, at_least=1 + len(self.eos))
            total = (scores + torch.tensor(self.scores, device=scores.device).unsqueeze(1)).flatten()
            if sampling.sample:
                drawn = self._draw(total, step, width)
                places = drawn[total[drawn].argsort(descending=True)]
            else:
                places = total.topk(width).indices
            scored = places, total[places]
        found, totals = self.runner.share_scored(scored, width)
        check_finite_scores(self.runner, totals, [self.request.tokens + beam for beam in self.running])
        vocabulary = self.runner.vocab_size
        return [Candidate(score, *divmod(place, vocabulary)) for place, score in zip(found, totals, strict=True)]

    def _draw(self, total: torch.Tensor, step: int, width: int) -> torch.Tensor:
        weights = total.softmax(-1).cpu()
        if not bool(weights.isfinite().all()):  # nothing can be drawn; the check of the scores names what is not finite
            return total.topk(width).indices
        generator = torch.Generator().manual_seed(
            self.search.sampling.seed + 1_000_003 * self.request.number + 10_007 * step
        )
        drawn = torch.multinomial(weights, width, generator=generator)
        return drawn.to(total.device)

    def _hits(self, candidate: Candidate, step: int) -> bool:
        if candidate.token in self.eos or step == self.limit:
            return True
        return self.ends is not None and self.ends([*self.running[candidate.beam], candidate.token])

    def _can_improve(self, best: Candidate, step: int) -> bool:
        """Whether the best running beam would beat the worst ended one if it ended now."""
        if len(self.ended) < self.search.beams:
            return True
        return best.score / step**self.search.length_penalty > self.ended[-1][0]

    def _go_on(self, going: Sequence[Candidate], step: int) -> None:
        self.running = [[*self.running[c.beam], c.token] for c in going]
        self.scores = [c.score for c in going]
        self.cache.reorder([c.beam for c in going], 0, self.request.prompt + step - 1)
