"""Why a training is slow: the cost of every cause, and the flag against it. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from qwen3_npu.ledger.records import LedgerEntry
from qwen3_npu.schema import shown
from qwen3_npu.watch.state import WORK

_OWN = (*WORK, "pause")  # kinds in which one rank can be slower than the others
_COMPUTE = ("forward", "backward")
_SLOW = 1.3  # a rank is slow if it takes so many times the mean
_LAUNCH = 6e-6  # seconds that a host needs for a small operation, at least
_OPERATIONS = 3 * 40  # operations of a layer: forward, and twice as many backward
_OF_GROUPS = {
    "tp": "fewer tensor-parallel ranks (--tensor-model-parallel-size), with --sequence-parallel, inside one node",
    "dp": "--overlap-grad-reduce, a larger --global-batch-size, or a faster network",
    "dp-cp": "--overlap-grad-reduce, a larger --global-batch-size, or a faster network",
    "cp": "fewer context-parallel ranks (--context-parallel-size), or another --context-parallel-algo",
    "ep": "fewer expert-parallel ranks (--expert-model-parallel-size), inside one node",
    "ep-etp": "fewer expert-parallel ranks (--expert-model-parallel-size), inside one node",
    "etp": "--expert-tensor-parallel-size 1",
    "edp": "--overlap-grad-reduce",
    "dist-opt": "small sums that wait for the slowest rank; even out the ranks (batches of like lengths, pinned hosts)",
    "world": "small sums that wait for the slowest rank; even out the ranks (batches of like lengths, pinned hosts)",
    "pp": "more even stages (--num-layer-list), or fewer of them (--pipeline-model-parallel-size)",
}


@dataclasses.dataclass(frozen=True)
class Cause:
    """A cause of lost time.

    Attributes:
        name: identifier.
        share: upper bound of the share of the wall clock that would be saved without it.
        text: message with the flag.
    """

    name: str
    share: float
    text: str


def total(entries: Sequence[LedgerEntry]) -> tuple[dict[str, float], float]:
    """Seconds of each kind, of the mean rank, and of the wall clock, over all steps."""
    found: dict[str, float] = {}
    for entry in entries:
        for kind, seconds in entry.mean.items():
            found[kind] = found.get(kind, 0.0) + seconds * entry.steps
    return found, sum(entry.seconds * entry.steps for entry in entries)


def explained(entries: Sequence[LedgerEntry]) -> float:
    """The share of the wall clock that belongs to a named kind."""
    kinds, seconds = total(entries)
    return sum(value for kind, value in kinds.items() if kind not in ("other", "start")) / max(seconds, 1e-12)


def causes(entries: Sequence[LedgerEntry]) -> list[Cause]:
    """All causes, the most expensive first."""
    kinds, seconds = total(entries)
    share = {kind: value / max(seconds, 1e-12) for kind, value in kinds.items()}
    facts = entries[-1].facts
    found = [*_slow_ranks(entries, seconds), *_of_kinds(share, facts), *_of_layout(share, facts, entries)]
    return sorted(found, key=lambda cause: -cause.share)


def _number(facts: dict[str, object], name: str) -> float:
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _slow_ranks(entries: Sequence[LedgerEntry], seconds: float) -> Iterator[Cause]:
    """The cost of one rank whose own work takes longer than the others', which wait for it."""
    for kind in _OWN:
        # Among few ranks a slow one raises the mean, so a rank is compared with the mean of the others.
        extra: dict[int, float] = {}
        for entry in entries:
            most, rank = entry.most.get(kind, (0.0, 0))
            ranks = max(_number(entry.facts, "ranks"), 1)
            others = (entry.mean.get(kind, 0.0) * ranks - most) / max(ranks - 1, 1)
            if ranks > 1 and most > _SLOW * others and most - others > 0.02 * entry.seconds:
                extra[rank] = extra.get(rank, 0.0) + (most - others) * entry.steps
        if extra:
            rank, cost = max(extra.items(), key=lambda item: item[1])
            yield Cause(
                f"slow rank in {kind}",
                cost / seconds,
                f"rank {rank} takes longer than the others in {kind}: "
                f"look at its device and its node ({'its storage' if kind == 'data' else 'clocks, neighbours'})",
            )


def _of_kinds(share: dict[str, float], facts: dict[str, object]) -> Iterator[Cause]:
    yield Cause(
        "data",
        share.get("data", 0.0),
        "reading samples: put --data-path on a faster disk, or "
        "preprocess it (raw files are read by preprocess_data.py once)",
    )
    how = "a longer --save-interval" if facts.get("async_save") else "--async-save, or a longer --save-interval"
    yield Cause("save", share.get("save", 0.0), f"checkpoints: {how}")
    yield Cause("eval", share.get("eval", 0.0), "evaluations: a longer --eval-interval or fewer --eval-iters")
    how = "a longer --manual-gc-interval" if facts.get("manual_gc") else "--manual-gc, with --manual-gc-interval 100"
    yield Cause("garbage", share.get("garbage", 0.0), f"Python's garbage collection: {how}")
    yield Cause(
        "report",
        share.get("report", 0.0),
        "lines, metrics and trackers: a faster disk or a local --tensorboard-dir, or a longer --log-interval",
    )
    yield Cause("check", share.get("check", 0.0), "comparing replicas: a longer --replica-check-interval")
    yield Cause(
        "pause",
        share.get("pause", 0.0),
        "between steps the processes do not run: something stops them (a scheduler, SIGSTOP), other programs have "
        "their processors, or code outside of this project waits; no flag addresses that",
    )
    yield Cause(
        "optimizer",
        share.get("optimizer", 0.0) - 0.1,
        "updates of the weights: --use-distributed-optimizer, or a larger --global-batch-size",
    )
    for group, how in _OF_GROUPS.items():
        if group != "pp":
            yield Cause(f"wait {group}", share.get(f"wait {group}", 0.0), f"waiting in collectives of {group}: {how}")


def _of_layout(share: dict[str, float], facts: dict[str, object], entries: Sequence[LedgerEntry]) -> Iterator[Cause]:
    compute = sum(share.get(kind, 0.0) for kind in _COMPUTE)
    stages, virtual = _number(facts, "pipeline"), max(_number(facts, "virtual"), 1)
    batches, wait = max(_number(facts, "micro_batches"), 1), share.get("wait pp", 0.0)
    if stages > 1:
        bubble = min((stages - 1) / (virtual * batches + stages - 1), wait)
        yield Cause(
            "few micro-batches",
            bubble,
            f"{batches:.0f} micro-batches for {stages:.0f} stages leave these idle: "
            f"a larger --global-batch-size, or --num-layers-per-virtual-pipeline-stage",
        )
        yield Cause("uneven stages", wait - bubble, f"waiting for other stages: {_OF_GROUPS['pp']}")
    padding = sum(_number(e.facts, "padding") * e.steps for e in entries) / sum(e.steps for e in entries)
    yield Cause(
        "padding",
        padding * compute,
        f"{100 * padding:.0f} % of the places are padding: --no-pad-to-seq-lengths, "
        f"or packs (preprocess_data.py --pack --neat-pack, --reset-attention-mask)",
    )
    if (uneven := _number(facts, "imbalance")) > 1:
        # About half of a layer's time is its experts', and the fullest expert sets the pace.
        yield Cause(
            "imbalance",
            (1 - 1 / uneven) * compute / 2,
            f"the fullest expert has {uneven:.1f} times the mean: "
            f"a larger --moe-aux-loss-coeff, or --moe-expert-capacity-factor",
        )
    if facts.get("recompute") == "full":
        yield Cause(
            "recompute",
            compute / 4,
            "layers are computed twice: --recompute-granularity selective, "
            "with more devices or a smaller --micro-batch-size",
        )
    if entries[-1].host:  # a device has noted where it waited for the host
        yield Cause(
            "tiny kernels",
            share.get("host", 0.0),
            "the device waits for the host's launches: a larger --micro-batch-size or --seq-length",
        )
        return
    own = sum(e.mean.get(kind, 0.0) * e.steps for e in entries for kind in _COMPUTE) / sum(e.steps for e in entries)
    launches = _number(facts, "layers") * _OPERATIONS * batches * _LAUNCH
    if own and _number(facts, "micro_tokens") < 4096:
        bound = min(launches / own, 1.0)
        if bound > 0.3:
            yield Cause(
                "tiny kernels",
                bound * compute / 2,
                f"{_number(facts, 'micro_tokens'):.0f} tokens a micro-batch "
                f"keep the host busy with launches: a larger --micro-batch-size",
            )


def why(entries: Sequence[LedgerEntry]) -> str:
    """One line: the largest share that could be saved, and how."""
    first = causes(entries)[0]
    if first.share < 0.03:
        return "why slow: nothing that costs 3 % of the time; what is left is computing"
    return f"why slow: {100 * first.share:.0f} % of the time: {first.text}{_planned(first, entries[-1])}"


def _planned(cause: Cause, entry: LedgerEntry) -> str:
    """What the plan of this training expects of a flag against a cause."""
    if cause.name not in entry.planned:
        return ""
    words, share = entry.planned[cause.name]
    brings = f"{100 * share:.0f} % less time a token" if share >= 0.005 else "nothing"
    return f"; the plan expects {brings} of {words}"


def facts_line(entries: Sequence[LedgerEntry]) -> str:
    """The facts, as a line."""
    return ", ".join(f"{name} {shown(value)}" for name, value in entries[-1].facts.items() if value is not None)
