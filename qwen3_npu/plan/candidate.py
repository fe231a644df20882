"""A layout of the search: its plan and its flags."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.plan.verdict import PlanVerdict


class Saving(NamedTuple):
    """A way to keep less of the optimizer's state on the device: fields of the plan, and flags."""

    of_setup: dict[str, Any]
    of_optimizer: dict[str, object]


SAVINGS = (
    Saving({}, {}),
    Saving({"reuse_master": True}, {"reuse_fp32_param": True}),
    Saving({"swap_optimizer": True}, {"swap_optimizer": True}),
)


@dataclasses.dataclass(frozen=True)
class LayoutCandidate:
    """One layout of the search: its verdict, and the parts of its flags. Flags are made for few layouts only.

    Attributes:
        layout: flags of the layout alone.
        recomputed: number of recomputed layers of each chunk.
        more: group -> fields of other flags.
    """

    verdict: PlanVerdict
    layout: PretrainArgs
    recomputed: int
    saving: Saving
    more: dict[str, dict[str, object]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def args(self) -> PretrainArgs:
        """The flags of this layout."""
        train: dict[str, object] = {}
        if self.recomputed:
            train = {"recompute_granularity": "full", "recompute_method": "block"}
            train["recompute_num_layers"] = self.recomputed
        changes = {"train": train, "optimizer": self.saving.of_optimizer}
        for group, fields in self.more.items():
            changes[group] = changes.get(group, {}) | fields
        groups = {
            group: dataclasses.replace(getattr(self.layout, group), **fields)
            for group, fields in changes.items()
            if fields
        }
        return self.layout._replace(**groups)

    def changed(self, setup: dict[str, Any], more: dict[str, dict[str, object]]) -> LayoutCandidate:
        """The candidate with other fields of the plan's setup and of the flags."""
        verdict = self.verdict
        other = PlanVerdict(verdict.shape, dataclasses.replace(verdict.setup, **setup), verdict.device)
        merged = self.more | {group: self.more.get(group, {}) | fields for group, fields in more.items()}
        return dataclasses.replace(self, verdict=other, more=merged)
