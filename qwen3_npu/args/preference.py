"""Flags of preference training, under MindSpeed-LLM's names where it has them."""

from __future__ import annotations

import dataclasses

from qwen3_npu.cli import flag, option
from qwen3_npu.errors import UsageError

# Stages that learn from answers that people prefer, and whether they compare with a reference model.
PREFERENCE_STAGES = {"dpo": True, "orpo": False, "simpo": False, "kto": True, "rm": False}
# Flag -> the stages that use it.
_STAGES_OF = {
    "dpo_loss_type": ("dpo",),
    "dpo_beta": ("dpo", "orpo", "simpo", "kto"),
    "dpo_label_smoothing": ("dpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "pref_ftx": ("dpo", "orpo", "simpo"),
    "ref_model": ("dpo", "kto"),
    "refer_model_iter": ("dpo", "kto"),
    "ref_logprobs": ("dpo", "kto"),
    "is_pairwise_dataset": ("dpo", "orpo", "simpo", "rm"),
    "center_rewards_coefficient": ("rm",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceArgs:
    """preference training (--stage dpo, orpo, simpo, kto or rm)"""

    dpo_loss_type: str = flag(
        "sigmoid",
        choices=["sigmoid", "hinge", "ipo"],
        help="sigmoid: DPO (arXiv:2305.18290); hinge: SLiC (arXiv:2305.10425); ipo: IPO (arXiv:2310.12036), by the "
        "mean log-probability of a token",
    )
    dpo_beta: float = flag(
        0.1,
        above=0,
        names=("--beta",),
        help="weight of the reference (dpo, kto), of the odds ratio (orpo), or scale of rewards (simpo)",
    )
    dpo_label_smoothing: float = flag(
        0.0, minimum=0, below=0.5, help="probability that a preference is wrong (conservative DPO); below 0.5"
    )
    simpo_gamma: float = flag(0.5, minimum=0, help="target margin of rewards of simpo (arXiv:2405.14734)")
    desirable_weight: float = flag(1.0, minimum=0, help="weight of kto's losses of desirable answers")
    undesirable_weight: float = flag(1.0, minimum=0, help="weight of kto's losses of undesirable answers")
    pref_ftx: float = flag(0.0, minimum=0, help="weight of the fine-tuning loss on chosen answers, added to dpo's")
    ref_model: str | None = flag(
        None,
        metavar="DIR",
        help="checkpoint of the reference; default: --load; with LoRA it is the model without its adapter",
    )
    refer_model_iter: int | None = flag(None, minimum=1, unit="steps", help="which of its checkpoints; default: newest")
    ref_logprobs: str = flag(
        "model",
        choices=["model", "cache"],
        help="cache: the reference's log-probabilities are computed once before training and kept in a file; no second "
        "model is in memory",
    )
    is_pairwise_dataset: bool = flag(False, help="--data-path holds pairs of answers, as --stage dpo says too")

    center_rewards_coefficient: float = flag(
        0.0, minimum=0, help="weight of the squared sum of both rewards of a pair, which keeps rm's rewards near 0"
    )

    def __post_init__(self) -> None:
        if self.desirable_weight == self.undesirable_weight == 0:
            raise UsageError("--desirable-weight 0 --undesirable-weight 0: nothing would be learned")

    def check_stage(self, stage: str) -> None:
        """Raises: UsageError: a flag has no effect in this stage."""
        for field in dataclasses.fields(self):
            stages = _STAGES_OF[field.name]
            if stage not in stages and getattr(self, field.name) != field.default:
                value = getattr(self, field.name)
                given = option(field.name) + ("" if value is True else f" {value}")
                raise UsageError(
                    f"{given} has no effect with --stage {stage}; it belongs to --stage {' or '.join(stages)}"
                )

    def check_kto(self, micro_batch: int) -> None:
        """Raises: UsageError: the flags do not fit --stage kto."""
        if micro_batch < 2:
            raise UsageError(
                f"--micro-batch-size {micro_batch}: --stage kto compares each prompt with the answer to another one of "
                f"its micro-batch; give 2 or more"
            )
        if self.ref_logprobs == "cache":
            raise UsageError(
                "--ref-logprobs cache: --stage kto asks the reference about each prompt with another's answer, which "
                "changes with the micro-batch; give --ref-logprobs model"
            )
