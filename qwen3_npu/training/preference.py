"""Losses on preferred and rejected answers: from the log-probabilities of whole answers.

    dpo sigmoid  -log s(b (d_c - d_r))                              Rafailov et al., arXiv:2305.18290
    dpo hinge    max(0, 1 - b (d_c - d_r))                          Zhao et al., arXiv:2305.10425
    dpo ipo      (d_c / |c| - d_r / |r| - 1 / (2 b))^2              Azar et al., arXiv:2310.12036, per token as TRL
    orpo         nll(prompt and chosen) - b log s(log odds ratio)   Hong et al., arXiv:2403.07691
    simpo        -log s(b (p_c / |c| - p_r / |r|) - g)              Meng et al., arXiv:2405.14734
    kto          w (1 - s(+-b (d - kl)))                            Ethayarajh et al., arXiv:2402.01306
    rm           -log s(r_c - r_r) + k (r_c + r_r)^2                Bradley and Terry, 1952; arXiv:2312.09244

p: log-probability of an answer; d: the same minus the reference's; |.|: its tokens; s: sigmoid; b, g, w, k: flags;
r: reward of the last token of a text.
A step's loss is the mean over all pairs (kto: samples) of its global batch.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.nn.functional import logsigmoid

from qwen3_npu.args.preference import PREFERENCE_STAGES, PreferenceArgs
from qwen3_npu.data.train.batches import MicroBatch
from qwen3_npu.training.objective import Outcome

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracy",
    "rewards/margin",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "length/chosen",
    "length/rejected",
)


# Means over what is desirable ("chosen", as in TRL) and what is not; `count/..` are how many these are.
KTO_METRICS = (
    *(f"{what}/{which}" for what in ("rewards", "logps", "length", "count") for which in ("chosen", "rejected")),
    "kl",
)


REWARD_METRICS = (*METRICS[:4], *METRICS[-2:])  # lengths are those of complete texts


class _SumOverContext(torch.autograd.Function):
    """Sum over context-parallel ranks. Each rank's backward goes through its own part, so gradients pass unchanged."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of the sequences of a micro-batch.

    Attributes:
        answers: [n] float32, of each sequence's supervised tokens together.
        tokens: [n] float32, the number of these tokens.
        texts, text_tokens: the same of prompt and answer together, for orpo.
    """

    answers: torch.Tensor
    tokens: torch.Tensor
    texts: torch.Tensor
    text_tokens: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """[n], of a token of each."""
        return self.answers / self.tokens.clamp(min=1)


def log_probs_of(batch: MicroBatch, losses: torch.Tensor) -> LogProbs:
    """Sum the losses of each sequence's tokens, over context-parallel ranks too.

    Args:
        losses: [b, s] -log-probability of each label of this rank's tokens.
    """
    assert batch.answers is not None, "only the last stage has answers"
    assert batch.loss_mask is not None
    where, count = batch.answers.numbers.flatten(), batch.answers.count
    per_token = torch.stack((-losses, torch.ones_like(losses)))
    parts = torch.cat((per_token * batch.loss_mask, per_token * batch.answers.text_mask)).flatten(1)
    # Not index_add: its gradient is the same gather, and its sum has no fixed order on devices.
    member = (where.unsqueeze(-1) == torch.arange(count, device=where.device)).to(parts.dtype)
    sums = parts @ member
    if parallel_state.get_context_parallel_world_size() > 1:
        sums = _SumOverContext.apply(sums, parallel_state.get_context_parallel_group())
    return LogProbs(*sums.unbind())


PairLoss = Callable[[LogProbs, torch.Tensor | None, PreferenceArgs], torch.Tensor]


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen and rejected entries, which alternate."""
    return x[0::2], x[1::2]


def _difference(found: LogProbs, reference: torch.Tensor | None, *, per_token: bool = False) -> torch.Tensor:
    assert reference is not None
    ratio = found.answers - reference
    chosen, rejected = _split(ratio / found.tokens.clamp(min=1) if per_token else ratio)
    return chosen - rejected


def _smoothed(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """-log sigmoid, if a share `smoothing` of the preferences is wrong."""
    return -logsigmoid(logits) * (1 - smoothing) - logsigmoid(-logits) * smoothing


def _sigmoid(found: LogProbs, reference: torch.Tensor | None, args: PreferenceArgs) -> torch.Tensor:
    return _smoothed(args.dpo_beta * _difference(found, reference), args.dpo_label_smoothing)


def _hinge(found: LogProbs, reference: torch.Tensor | None, args: PreferenceArgs) -> torch.Tensor:
    return torch.relu(1 - args.dpo_beta * _difference(found, reference))


def _ipo(found: LogProbs, reference: torch.Tensor | None, args: PreferenceArgs) -> torch.Tensor:
    return (_difference(found, reference, per_token=True) - 1 / (2 * args.dpo_beta)) ** 2


def _orpo(found: LogProbs, reference: torch.Tensor | None, args: PreferenceArgs) -> torch.Tensor:
    chosen, rejected = _split(found.mean)
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    text, tokens = _split(found.texts)[0], _split(found.text_tokens)[0]
    return -text.sum() / tokens.sum() - args.dpo_beta * logsigmoid(odds)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, by the stabler of two forms (Maechler, 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _simpo(found: LogProbs, reference: torch.Tensor | None, args: PreferenceArgs) -> torch.Tensor:
    chosen, rejected = _split(found.mean)
    return _smoothed(args.dpo_beta * (chosen - rejected) - args.simpo_gamma, args.dpo_label_smoothing)


LOSSES: dict[str, PairLoss] = {"sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo, "orpo": _orpo, "simpo": _simpo}


class AnswerObjective(abc.ABC):
    """A loss of whole answers.

    Attributes:
        names: of its metrics.
        references: log-probabilities of the reference, [2 n] for each micro-batch in order; empty without a reference.
    """

    names: Sequence[str] = ()

    def __init__(self, args: PreferenceArgs) -> None:
        self.args = args
        self.references: collections.deque[torch.Tensor] = collections.deque()

    @abc.abstractmethod
    def judge(
        self, batch: MicroBatch, found: LogProbs, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [n] of the pairs or answers of a micro-batch, and [len(names)] sums over them."""

    def __call__(self, batch: MicroBatch, losses: torch.Tensor) -> Outcome:
        """See `objective.Objective`."""
        reference = self.references.popleft() if self.references else None
        each, metrics = self.judge(batch, log_probs_of(batch, losses), reference)
        # Every context-parallel rank has the same loss, so only one of them counts it.
        counted = 1.0 if parallel_state.get_context_parallel_rank() == 0 else 0.0
        return Outcome(each.sum(), torch.full((), len(each), device=each.device), counted, metrics)


class PreferenceObjective(AnswerObjective):
    """The loss of pairs.

    Args:
        name: of `LOSSES`.
    """

    names = METRICS

    def __init__(self, name: str, args: PreferenceArgs) -> None:
        super().__init__(args)
        self.loss, self.averages = LOSSES[name], name in ("orpo", "simpo")

    def judge(
        self, batch: MicroBatch, found: LogProbs, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AnswerObjective`."""
        each = self.loss(found, reference, self.args)
        if self.args.pref_ftx:
            each = each - self.args.pref_ftx * _split(found.mean)[0]
        with torch.no_grad():
            return each, self._metrics(found, reference)

    def _metrics(self, found: LogProbs, reference: torch.Tensor | None) -> torch.Tensor:
        """[len(METRICS)], sums over the pairs."""
        if reference is None:
            rewards = self.args.dpo_beta * found.mean
            kl = torch.zeros_like(rewards)
        else:
            rewards = self.args.dpo_beta * (found.answers - reference)
            kl = found.answers - reference
        chosen, rejected = _split(rewards)
        logps = _split(found.mean if self.averages else found.answers)
        columns = (
            chosen,
            rejected,
            (chosen > rejected).float(),
            chosen - rejected,
            *logps,
            (kl[0::2] + kl[1::2]) / 2,
            *_split(found.tokens),
        )
        return torch.stack([column.sum() for column in columns])


class KtoObjective(AnswerObjective):
    """The loss of labelled answers (arXiv:2402.01306, equations 7 and 8).

    z_0 (`kl` here) is the mean log-ratio of policy and reference for answers to other prompts (see `labelled_rows`).
    The mean is over the micro-batches that the data-parallel ranks compute at the same time, as in TRL. It has no
    gradient.
    """

    names = KTO_METRICS

    def judge(
        self, batch: MicroBatch, found: LogProbs, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AnswerObjective`."""
        assert reference is not None
        assert batch.answers is not None
        assert batch.answers.desirable is not None
        ratios, mismatched = _split(found.answers - reference)
        kl = mismatched.detach().mean()
        group = parallel_state.get_data_parallel_group()
        if group.size() > 1:
            dist.all_reduce(kl, group=group)
            kl = kl / group.size()
        kl = kl.clamp(min=0)
        desirable = batch.answers.desirable
        sign = 2 * desirable - 1
        weight = torch.where(desirable > 0, self.args.desirable_weight, self.args.undesirable_weight)
        each = weight * (1 - torch.sigmoid(sign * self.args.dpo_beta * (ratios - kl)))
        with torch.no_grad():
            rewards, logps, tokens = self.args.dpo_beta * ratios, found.answers[0::2], found.tokens[0::2]
            of_each = torch.stack((rewards, logps, tokens, torch.ones_like(tokens)))[:, None]
            sums = (of_each * torch.stack((desirable, 1 - desirable))).sum(-1)
            return each, torch.cat((sums.flatten(), (kl * len(each))[None]))


class RewardObjective(AnswerObjective):
    """The loss of a reward model on pairs (Bradley-Terry): its output at the last token of each text is the reward."""

    names = REWARD_METRICS

    def judge(
        self, batch: MicroBatch, found: LogProbs, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AnswerObjective`; only the last token of a text is in its loss mask."""
        chosen, rejected = _split(-found.answers)  # the rewards stand in the place of token losses
        each = -logsigmoid(chosen - rejected)
        if self.args.center_rewards_coefficient:
            each = each + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        with torch.no_grad():
            lengths = _split(found.text_tokens + 1)
            columns = (chosen, rejected, (chosen > rejected).float(), chosen - rejected, *lengths)
            return each, torch.stack([column.sum() for column in columns])


def preference_objective(stage: str, args: PreferenceArgs) -> AnswerObjective | None:
    """The objective of a stage; None if only the next token is learned."""
    if stage not in PREFERENCE_STAGES:
        return None
    if stage in ("kto", "rm"):
        return KtoObjective(args) if stage == "kto" else RewardObjective(args)
    return PreferenceObjective(args.dpo_loss_type if stage == "dpo" else stage, args)
