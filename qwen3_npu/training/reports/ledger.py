"""Records of the time by phase on all ranks, which `python -m qwen3_npu.ledger` reads."""

from __future__ import annotations

import torch
import torch.distributed as dist

from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.ledger.gains import gains
from qwen3_npu.training.prepare.plan import TrainingPlan
from qwen3_npu.training.reports.expert_load import ExpertLoad
from qwen3_npu.training.step import NOTHING, Tally
from qwen3_npu.watch import here
from qwen3_npu.watch.state import WORK
from qwen3_npu.watch.times import IN_STEP, KINDS, Times

_SHOWN = 1024  # ranks of a line at most
_WORK = [KINDS.index(name) for name in (*WORK, "pause")]


def facts_of(args: PretrainArgs, plan: TrainingPlan) -> dict[str, object]:
    """The settings that explain times."""
    layout, train = plan.layout, args.train
    return {
        "pipeline": layout.pipeline,
        "virtual": layout.virtual,
        "micro_batches": plan.num_microbatches,
        "micro_tokens": train.micro_batch_size * train.seq_length // args.parallel.context_parallel_size,
        "layers": -(-layout.num_layers // layout.pipeline),
        "recompute": train.recompute_granularity or "none",
        "overlap_grad_reduce": args.optimizer.overlap_grad_reduce,
        "async_save": args.checkpoint.async_save,
        "manual_gc": train.manual_gc,
        **({"planned": gains(plan.verdict)} if plan.verdict is not None else {}),
    }


class Ledger:
    """Collects times every `interval` steps.

    Args:
        facts: see `facts_of`.
    """

    def __init__(self, interval: int, facts: dict[str, object], device: torch.device) -> None:
        self.interval, self.facts, self.device = interval, facts, device
        self.tally, self.steps, self.is_new = NOTHING, 0, True
        self.imbalance: float | None = None  # the fullest expert's tokens over the mean
        if (times := here.times()) is not None:
            times.take()  # drops the time before the first step

    def step(self, iteration: int, tally: Tally, load: ExpertLoad | None, *, last: bool) -> dict[str, object] | None:
        """Count a step. Returns the record if one is due. Every rank must call this: a record gathers a row of each.

        Args:
            load: load of the experts, if it was just counted.
        """
        if not self.interval:
            return None
        if load is not None:
            self.imbalance = round(float(load.imbalance.mean()), 3)
        self.tally += tally
        self.steps += 1
        times = here.times()
        if times is None:
            return None
        record = None
        if iteration % self.interval == 0 or last:
            with here.during("report"):
                record = self._record(times)
        # The device notes one step of each record, early enough to be finished then; in short runs the second step.
        if (iteration + 2) % self.interval == 0 or self.is_new:
            times.next_step()
        self.is_new = False
        return record

    def _record(self, times: Times) -> dict[str, object]:
        own = torch.tensor(times.take(), dtype=torch.float32, device=self.device)
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own)
        table, host = by_device(torch.stack(rows).cpu())
        steps, sums = self.steps, self.tally
        self.tally, self.steps = NOTHING, 0
        slowest = table.argmax(0).tolist()
        mean, most = table.mean(0).tolist(), table.amax(0).tolist()
        return {
            "steps": steps,
            "seconds": round(mean[-1] / steps, 6),
            "ranks": len(rows),
            "work": [round(v / steps, 6) for v in table[:_SHOWN, _WORK].sum(1).tolist()],
            "mean": {kind: round(value / steps, 6) for kind, value in zip(KINDS, mean, strict=False) if value},
            "most": {k: [round(v / steps, 6), rank] for k, v, rank in zip(KINDS, most, slowest, strict=False) if v},
            "host": {kind: round(value / steps, 6) for kind, value in zip(KINDS, host, strict=False) if value},
            "padding": round(1 - sums.real_tokens / max(sums.places, 1.0), 4),
            "imbalance": self.imbalance,
            **self.facts,
        }


def by_device(table: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Times of ranks, with steps divided by the times that the device has measured, if it has.

    Args:
        table: [ranks, ..] of `Times.take`: all steps by the host's clock, one step by the device's.

    Returns:
        [ranks, kinds and wall clock], and the mean rank's times by the host's clock; empty if these are the result.
    """
    kinds = len(KINDS)
    by_host, noted = table[:, : kinds + 1].clone(), table[:, kinds + 1 :]
    found = by_host.clone()
    # The device does not note time outside of steps (checkpoints, evaluations).
    share = noted / noted.sum(1, keepdim=True)
    inside = by_host[:, IN_STEP].sum(1, keepdim=True)
    has_noted = noted.sum(1) > 0
    if not bool(has_noted.any()):
        return found, []
    found[:, IN_STEP] = 0
    found[:, :kinds] += share.nan_to_num() * inside
    found[~has_noted] = by_host[~has_noted]
    return found, by_host.mean(0)[:kinds].tolist()
