"""Generation for many prompts at once: a prompt starts when another one ends, and common prefixes are computed once.

Every process runs the same program on the same prompts. The last pipeline stage sends only the chosen tokens to the
other stages. Copies of the model (data parallel) take different prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from qwen3_npu.args.inference import PREFILL_TOKENS
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.diagnose import check_finite_scores
from qwen3_npu.inference.runner import Runner
from qwen3_npu.inference.sampling import Sampling, choose_tokens
from qwen3_npu.model.cache import Kept, KVCache

# A prompt waits for another one's beginning if at least so many tokens are shared; copying costs next to nothing.
_WORTH_SHARING = 16


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and its answer.

    Attributes:
        number: its index among all prompts; its random numbers depend on it.
        tokens: the prompt, then what was generated.
        prompt: tokens of the prompt.
        limit: maximum number of tokens to generate.
        sampling: settings for the choice of tokens.
        top: number of likeliest tokens to keep beside each chosen one.
        logprobs: of the chosen tokens, before penalty and temperature.
        likeliest: for each chosen token the `top` likeliest tokens at its position with their log-probabilities.
        finish: reason of the end: "eos", "stop", "length" or the argument of `Engine.drop`; empty while it runs.
    """

    number: int
    tokens: list[int]
    limit: int
    prompt: int = 0
    sampling: Sampling = Sampling()
    top: int = 0
    logprobs: list[float] = dataclasses.field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish: str = ""

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt :]


# Called with each new token's request on every process; True ends the answer.
OnToken = Callable[[Request], bool]


class Engine:
    """Generates with one model.

    Attributes:
        waiting, running: requests without a slot, and those in the first slots of the cache, in this order.
        computed, reused: numbers of prompt tokens that were computed, and that were found in the cache.
    """

    def __init__(self, runner: Runner, *, slots: int, kv_cache: bool = True, prefix_cache: bool = True) -> None:
        """Args: slots: number of sequences that are processed at the same time."""
        self.runner, self.slots = runner, slots
        self.kv_cache, self.prefix_cache = kv_cache, prefix_cache and kv_cache
        self.cache: KVCache | None = None
        # Tokens whose keys and values each slot holds, of ended requests too.
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.computed = self.reused = 0

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_token: OnToken | None = None,
        on_done: Callable[[Request], None] | None = None,
    ) -> None:
        """Complete every request, in place.

        Args:
            on_done: called with each request that has ended.

        Raises:
            UsageError: a prompt is empty, or leaves no room for an answer within the model's positions.
        """
        for request in requests:
            limit_request(request, self.runner.plan.positions)
            request.sampling = sampling
        if requests:
            self.reserve(max(r.prompt + r.limit for r in requests))
        self.waiting, self.running = list(requests), []
        while self.runner.anyone(self.busy):
            if not self.busy:
                self.runner.idle()
                continue
            for request in self.step(on_token):
                if on_done is not None:
                    on_done(request)

    def reserve(self, capacity: int) -> None:
        """Make the cache's slots at least this number of tokens long."""
        if self.kv_cache and (self.cache is None or self.cache.capacity < capacity):
            old, self.cache = self.cache, None
            capacity = min(max(capacity, 2 * old.capacity if old else 0), self.runner.plan.positions)
            self.cache = self.runner.new_cache(self.slots, capacity)
            if old is not None:
                self.cache.data[:, :, :, :, : old.capacity] = old.data

    # One pass after the other: requests may come and go in between

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request; call `limit_request` and `reserve` before."""
        self.waiting.append(request)

    def drop(self, request: Request, reason: str) -> None:
        """End a waiting or running request."""
        request.finish = reason
        self.waiting = [other for other in self.waiting if not other.finish]
        self._leave()

    def step(self, on_token: OnToken | None = None) -> list[Request]:
        """One pass: over the prompts that get a slot, else one token for all running requests.

        Returns:
            The requests that ended with this pass.
        """
        entered = self._enter(self.waiting, len(self.running))
        self.running += entered
        batch = entered or list(self.running)
        self._step(batch, len(self.running) - len(batch))
        for request in batch:
            self._judge(request, on_token)
        self._leave()
        return [request for request in batch if request.finish]

    def _enter(self, waiting: list[Request], busy: int) -> list[Request]:
        """Give free slots to waiting requests. The cached beginning of each prompt is copied to its slot."""
        entered: list[Request] = []
        tokens = 0
        for request in list(waiting):
            slot = busy + len(entered)
            if slot == self.slots or (entered and tokens + request.prompt > PREFILL_TOKENS):
                break
            source, known = self._known(request)
            if self.prefix_cache and any(
                common(other.tokens, request.tokens) >= known + _WORTH_SHARING for other in entered
            ):
                continue  # its shared beginning is computed in the next pass
            waiting.remove(request)
            entered.append(request)
            if self.cache is not None:
                self._take(slot, source, known)
                self.held[slot] = request.tokens[:known]
            tokens += request.prompt - known
            self.computed, self.reused = self.computed + request.prompt - known, self.reused + known
        return entered

    def _known(self, request: Request) -> tuple[int, int]:
        """The slot with the longest prefix of a prompt, and its length. The prompt's last token is always computed."""
        if not self.prefix_cache:
            return 0, 0
        lengths = [common(held, request.tokens[:-1]) for held in self.held]
        known = max(lengths)
        return lengths.index(known), known

    def _take(self, slot: int, source: int, known: int) -> None:
        assert self.cache is not None
        self.cache.copy(source, slot, known)

    def _step(self, batch: list[Request], first_slot: int) -> None:
        """One pass, and one token for each request of the batch, which lies in consecutive slots."""
        runner = self.runner
        if self.cache is None:
            tokens = [token for request in batch for token in request.tokens]
            counts = [len(request.tokens) for request in batch]
            sequence = runner.packed(counts)
        else:
            slots = range(first_slot, first_slot + len(batch))
            kept = [
                Kept(s, len(self.held[s]), len(r.tokens) - len(self.held[s])) for s, r in zip(slots, batch, strict=True)
            ]
            tokens = [t for k, request in zip(kept, batch, strict=True) for t in request.tokens[k.start :]]
            counts = [k.length for k in kept]
            sequence = runner.cached(self.cache, kept)
            for k, request in zip(kept, batch, strict=True):
                self.held[k.slot] += request.tokens[k.start :]
        ends = torch.tensor(counts).cumsum(0) - 1
        logits = runner.forward(tokens, sequence, ends.tolist())
        scored = likeliest = None
        top = min(max(r.top for r in batch), runner.vocab_size)
        if logits is not None:
            logits = logits.float()
            chosen, total = _chosen(logits, batch), logits.logsumexp(-1)
            scored = chosen, logits.gather(1, chosen.unsqueeze(1)).squeeze(1) - total
            if top:
                values, places = logits.topk(top)
                likeliest = places.flatten(), (values - total.unsqueeze(1)).flatten()
        ids, logprobs = runner.share_scored(scored, len(batch))
        check_finite_scores(runner, logprobs, [request.tokens for request in batch])
        for request, token, logprob in zip(batch, ids, logprobs, strict=True):
            request.tokens.append(token)
            request.logprobs.append(logprob)
        if top:
            pairs = list(zip(*runner.share_scored(likeliest, len(batch) * top), strict=True))
            for row, request in enumerate(batch):
                request.likeliest.append(pairs[row * top : row * top + request.top])

    def _judge(self, request: Request, on_token: OnToken | None) -> None:
        if request.tokens[-1] in self.runner.plan.eos:
            request.finish = "eos"
        elif on_token is not None and on_token(request):
            request.finish = "stop"
        elif len(request.tokens) - request.prompt == request.limit:
            request.finish = "length"

    def _leave(self) -> None:
        """Free the slots of ended requests. The last running one moves into the gap, so that slots stay dense."""
        running = self.running
        for slot in reversed(range(len(running))):
            if running[slot].finish:
                last = len(running) - 1
                if slot != last:
                    running[slot] = running[last]
                    if self.cache is not None:
                        self._take(slot, last, len(self.held[last]))
                        self.held[slot] = self.held[last]
                        self.held[last] = []
                running.pop()


def _chosen(logits: torch.Tensor, batch: Sequence[Request]) -> torch.Tensor:
    """The next token of each request [b], by its own sampling; logits [b, vocabulary]."""
    alike: dict[Sampling, list[int]] = {}
    for row, request in enumerate(batch):
        alike.setdefault(request.sampling, []).append(row)
    chosen = logits.new_empty(len(batch), dtype=torch.int64)
    for sampling, rows in alike.items():
        mine = [batch[row] for row in rows]
        places = slice(None) if len(alike) == 1 else torch.tensor(rows, device=logits.device)
        seen, numbers, prompts = zip(*((r.tokens, r.number, r.prompt) for r in mine), strict=True)
        chosen[places] = choose_tokens(logits[places], sampling, seen, numbers, prompts=prompts)
    return chosen


def limit_request(request: Request, positions: int) -> None:
    """Limit the tokens that a request may generate to the model's positions.

    Raises:
        UsageError: the prompt is empty, or leaves no room for an answer.
    """
    if not request.tokens:
        raise UsageError(f"prompt {request.number + 1} is empty")
    if request.prompt >= positions:
        raise UsageError(
            f"prompt {request.number + 1} has {request.prompt} tokens; the model has {positions} positions "
            "(--max-position-embeddings)"
        )
    request.limit = min(request.limit, positions - request.prompt)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i in range(length) if first[i] != second[i])
