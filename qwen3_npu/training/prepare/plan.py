"""The plan of a training, from flags, config.json and the number of processes. Made before torch is imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qwen3_npu.args.model import positions_note, shaped
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.args.rules.fit import Fit, fit_flags
from qwen3_npu.args.training import TrainArgs
from qwen3_npu.checkpoint.formats.open import find_architecture
from qwen3_npu.checkpoint.mapping.frozen import frozen_share, frozen_weights
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.numbers import number_list
from qwen3_npu.plan.launch import lines, planned
from qwen3_npu.plan.verdict import PlanVerdict
from qwen3_npu.progress import human


@dataclasses.dataclass(frozen=True)
class TrainingPlan(Fit):
    """A checked training.

    Attributes:
        config: folder whose config.json and tokenizer files go with the checkpoints; None if there is none.
        frozen: Hugging Face names of the weights that --freeze-include and --freeze-exclude keep as they are.
        verdict: expected memory and time; None if the device is unknown.
        notes: changes of the model by flags.
    """

    arch: Qwen3Arch
    found_in: str
    config: Path | None
    frozen: frozenset[str]
    verdict: PlanVerdict | None
    notes: tuple[str, ...]

    def describe(self, args: PretrainArgs) -> list[str]:
        """Lines that describe the training."""
        train, cp = args.train, args.parallel.context_parallel_size
        context = f" CP{cp} ({args.parallel.context_parallel_algo})" if cp > 1 else ""
        tokens = self.global_batch * train.seq_length
        return [
            f"model: {self.arch} (from {self.found_in})",
            *self.notes,
            f"layout: {self.layout}{context}, DP{self.data_parallel}",
            f"batch: {self.global_batch} samples of {train.seq_length} tokens = {human(tokens)} tokens: "
            f"{self.data_parallel} ranks x {self.num_microbatches} micro-batches x {train.micro_batch_size}",
            f"training: {_length(train, tokens)}, {'bfloat16' if train.bf16 else 'float32'}",
            *lines(self.verdict, dry_run=args.runtime.dry_run),
        ]


def _length(train: TrainArgs, tokens_per_step: int) -> str:
    if train.train_iters is not None:
        return f"{train.train_iters} steps, {human(train.train_iters * tokens_per_step)} tokens"
    return f"{train.train_samples} samples" if train.train_samples else f"{train.epochs:g} epochs"


def plan_training(args: PretrainArgs, world_size: int) -> TrainingPlan:
    """Make the plan from flags, config.json and the number of processes.

    Raises:
        UsageError: something does not fit.
    """
    noop = len(number_list(args.parallel.noop_layers))
    tokenizer = args.data.tokenizer_name_or_path
    arch, found_in, config = find_architecture(
        args.model, args.shape, load=args.checkpoint.load, tokenizer=tokenizer, noop_layers=noop
    )
    found, arch = arch, shaped(args.shape, arch, noop)
    if args.data.stage == "rm":
        arch = arch.as_reward()
    elif arch.reward:
        raise UsageError(f"{found_in} is a reward model's; train it with --stage rm, a language model with others")
    if config is None and tokenizer and (Path(tokenizer) / "config.json").is_file():
        config = Path(tokenizer)
    sizes = fit_flags(args, arch, world_size)
    frozen = frozen_weights(arch, args.freeze)
    args.lora.places(arch)  # an error now rather than after torch is imported
    verdict = planned(args, arch, sizes, frozen=frozen_share(arch, frozen))
    notes = tuple(positions_note(arch, found))
    return TrainingPlan(
        **vars(sizes), arch=arch, found_in=found_in, config=config, frozen=frozen, verdict=verdict, notes=notes
    )
