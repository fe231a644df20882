"""The input of a training: samples, and the micro-batches that a rank makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol

import numpy as np
import torch
from megatron.core import parallel_state

from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.data.text.prompt_types import warn_of_misfit
from qwen3_npu.data.text.tokenizer import TokenizerFolder, open_tokenizer
from qwen3_npu.data.train import pretrain_dataset
from qwen3_npu.data.train.batches import AnswerTokens, MicroBatch, moved, sample_numbers
from qwen3_npu.data.train.data_path import blend
from qwen3_npu.data.train.preference_dataset import labelled_rows, open_answers, pair_rows
from qwen3_npu.data.train.quarantine import Ordered
from qwen3_npu.data.train.rows import (
    Padding,
    Rows,
    ThinkTokens,
    find_eod,
    instruction_rows,
    padding_multiple,
    pretraining_rows,
)
from qwen3_npu.data.train.sft_dataset import (
    InstructionDataset,
    InstructionFiles,
    Kind,
    Sample,
    SampleFiles,
    SampleOut,
    TokenSample,
    instruction_splits,
    open_instructions,
)
from qwen3_npu.data.train.token_file import open_indexed
from qwen3_npu.distributed import environment
from qwen3_npu.distributed.context_parallel import shard
from qwen3_npu.distributed.nodes import check_same
from qwen3_npu.errors import UsageError
from qwen3_npu.model.sequence import TokenSequence
from qwen3_npu.training.prepare.plan import TrainingPlan


class SampleSource(Protocol[SampleOut]):
    """Samples by number, and the place of each."""

    def __getitem__(self, number: int, /) -> SampleOut: ...

    def locate(self, number: int) -> tuple: ...


@dataclasses.dataclass(frozen=True)
class Feed(Generic[Sample]):
    """Samples, and the micro-batches that this rank makes of them.

    Attributes:
        args, plan: of the training.
        train, valid: sample number -> sample; `valid` None if there are none.
        make_rows: samples of a micro-batch -> its rows.
        rows, length: shape of every micro-batch, for the pipeline; None if lengths differ.
        think: marks of thoughts, if the data may have them.
        supervised: number of supervised tokens in every micro-batch; None if it differs.
    """

    args: PretrainArgs
    plan: TrainingPlan
    train: Ordered
    valid: SampleSource[Sample] | None
    make_rows: Callable[[Sequence[Sample]], Rows]
    rows: int
    length: int | None
    think: ThinkTokens | None = None
    supervised: float | None = None
    _ahead: dict[int, MicroBatch] = dataclasses.field(default_factory=dict, init=False)

    def numbers(self, consumed: int) -> Iterator[range]:
        """The samples of each of this rank's micro-batches of the step that starts after `consumed` samples."""
        return sample_numbers(
            consumed,
            global_batch=self.plan.global_batch,
            micro_batch=self.args.train.micro_batch_size,
            data_parallel=self.plan.data_parallel,
            data_rank=parallel_state.get_data_parallel_rank(),
        )

    def forget(self) -> None:
        """Drop batches made in advance: the training continues at another position."""
        self._ahead.clear()

    def batches(
        self, dataset: SampleSource[Sample], consumed: int, device: torch.device, dtype: torch.dtype
    ) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the step that starts after `consumed` samples.

        Each is made while the device computes the previous one; the first one of the next step is made with the last.

        Args:
            dtype: of the activations.
        """
        first, *others = self.numbers(consumed)
        is_train, after = dataset is self.train, consumed + self.plan.global_batch
        ahead = self._ahead.pop(consumed, None) if is_train else None
        batch = ahead or self._batch(dataset, first, device, dtype)
        for samples in others:
            following = self._batch(dataset, samples, device, dtype)
            yield batch
            batch = following
        if is_train and after < self.args.train.steps * self.plan.global_batch:
            self._ahead.clear()
            self._ahead[after] = self._batch(dataset, next(self.numbers(after)), device, dtype)
        yield batch

    def _batch(
        self, dataset: SampleSource[Sample], samples: range, device: torch.device, dtype: torch.dtype
    ) -> MicroBatch:
        """Read and arrange samples, and move what this rank needs of them."""
        rows = self.make_rows([dataset[number] for number in samples])
        parallel, arch = self.args.parallel, self.plan.arch
        arrays = {"positions": rows.positions}
        if arch.is_moe and rows.padding is not None:
            arrays["padding"] = rows.padding
        if parallel_state.is_pipeline_first_stage():
            arrays["tokens"] = rows.tokens
        is_last = parallel_state.is_pipeline_last_stage()
        if is_last:
            arrays |= {"labels": rows.labels, "loss_mask": rows.loss_mask}
            if self.think is not None:
                arrays["think_mask"] = self.think.mask(rows.tokens, rows.cu_seqlens)
            if rows.answers is not None:
                arrays |= {"numbers": rows.answers.numbers, "text_mask": rows.answers.text_mask}
        context, rank = parallel.context_parallel_size, parallel_state.get_context_parallel_rank()
        whole = {name: torch.from_numpy(array) for name, array in arrays.items()}
        fields = shard(whole, parallel.context_parallel_algo, context, rank)
        if is_last:
            amounts = (rows.real_tokens, rows.tokens.size, rows.squares)
            fields["amounts"] = torch.tensor([amount / context for amount in amounts])
            if rows.answers is not None and rows.answers.desirable is not None:
                fields["desirable"] = torch.from_numpy(rows.answers.desirable)  # whole on context-parallel ranks
        fields = moved(fields, device)
        answers = None
        if is_last and rows.answers is not None:
            answers = AnswerTokens(fields["numbers"], fields["text_mask"], rows.answers.count, fields.get("desirable"))
        return MicroBatch(
            fields.get("tokens"),
            fields.get("labels"),
            fields.get("loss_mask"),
            TokenSequence(fields["positions"], rows.cu_seqlens, arch.rope, dtype, padding=fields.get("padding")),
            think_mask=fields.get("think_mask"),
            amounts=fields.get("amounts"),
            supervised=float(rows.loss_mask.sum(dtype=np.float64)),
            answers=answers,
        )


def open_feed(args: PretrainArgs, plan: TrainingPlan, spare: int = 0) -> Feed:
    """The samples of --data-path. Every rank must call this.

    Args:
        spare: number of samples that may be omitted (quarantine), so more are needed.
    """
    prefixes, _ = blend(args.data.data_path)
    digest = None
    if environment.ranks()[2] == 0:  # nodes may have copies of their own
        digest = " ".join(_fingerprint(args, prefix) for prefix in prefixes)
    check_same(digest, f"--data-path {' '.join(args.data.data_path)}")
    if args.data.is_preference:
        return _answers(args, plan)
    return _instructions(args, plan) if args.data.is_instruction else _pretraining(args, plan, spare)


def _fingerprint(args: PretrainArgs, prefix: str) -> str:
    if args.data.is_preference:
        return open_answers(args.data.stage, [prefix])[0].fingerprint()
    return (InstructionFiles(prefix) if args.data.is_instruction else open_indexed(prefix)).fingerprint()


def _samples(args: PretrainArgs, plan: TrainingPlan, spare: int) -> tuple[int, int, int]:
    """The number of samples of each split that the training reads."""
    evaluations = args.train.steps // args.report.eval_interval + 1
    return args.train.steps * plan.global_batch + spare, evaluations * args.report.eval_iters * plan.global_batch, 0


def _pretraining(args: PretrainArgs, plan: TrainingPlan, spare: int) -> Feed:
    data, seq, micro = args.data, args.train.seq_length, args.train.micro_batch_size
    samples = _samples(args, plan, spare)
    splits = pretrain_dataset.build_splits(data, seq_length=seq, seed=args.runtime.seed, samples=samples)
    if not (data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss):
        return Feed(
            args,
            plan,
            Ordered(splits.train),
            splits.valid,
            make_rows=pretrain_dataset.plain_rows,
            rows=micro,
            length=seq,
            supervised=micro * seq,
        )
    flag = "--reset-attention-mask, --reset-position-ids and --eod-mask-loss"
    ends = {find_eod(open_indexed(prefix), flag) for prefix in blend(data.data_path)[0]}
    if len(ends) > 1:
        raise UsageError(f"{flag}: the data sets of --data-path end their documents with different tokens {ends}")

    def rows(samples: Sequence[dict[str, torch.Tensor]]) -> Rows:
        return pretraining_rows(
            *pretrain_dataset.batched(samples),
            eod=next(iter(ends)),
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
            eod_mask_loss=data.eod_mask_loss,
        )

    # With --reset-attention-mask the rows are laid one after the other, boundaries and all.
    flat = data.reset_attention_mask
    supervised = None if data.eod_mask_loss else micro * seq
    length = seq * (micro if flat else 1)
    return Feed(
        args,
        plan,
        Ordered(splits.train),
        splits.valid,
        make_rows=rows,
        rows=1 if flat else micro,
        length=length,
        supervised=supervised,
    )


def _padding(args: PretrainArgs, plan: TrainingPlan) -> tuple[TokenizerFolder | None, Padding]:
    """The tokenizer, if there is one, and the padding of rows of conversations."""
    data = args.data
    multiple = padding_multiple(
        data.pad_to_multiple_of if data.variable_seq_lengths else 1,
        tensor=args.parallel.tensor_model_parallel_size if args.parallel.sequence_parallel else 1,
        context=args.parallel.context_parallel_size,
    )
    tokenizer = open_tokenizer(data.tokenizer_name_or_path) if data.tokenizer_name_or_path else None
    if tokenizer and args.instruction.prompt_type and environment.ranks()[0] == 0:
        warn_of_misfit(args.instruction.prompt_type, tokenizer)
    pad = tokenizer.pad() if tokenizer else (plan.arch.eos_token_id or 0)
    return tokenizer, Padding(pad, None if data.variable_seq_lengths else args.train.seq_length, multiple)


def _splits(
    args: PretrainArgs, files: Sequence[SampleFiles[Sample]], weights: Sequence[float] | None
) -> tuple[InstructionDataset[Sample], InstructionDataset[Sample] | None]:
    """Samples for training, and for validation if the training evaluates.

    Raises:
        UsageError: --split leaves no sample.
    """
    data, evaluates = args.data, args.report.eval_iters > 0
    splits = instruction_splits(
        files, weights, data.split, longest=args.train.seq_length, seed=args.runtime.seed, shuffle=data.shuffle
    )
    if splits.train is None:
        prefixes = " ".join(file.prefix for file in files)
        raise UsageError(f"--split {data.split} leaves no sample of {prefixes} for training")
    if evaluates and splits.valid is None:
        raise UsageError(f"--split {data.split} leaves no sample for validation; give another, or --eval-iters 0")
    return splits.train, splits.valid if evaluates else None


def _answers(args: PretrainArgs, plan: TrainingPlan) -> Feed:
    data, micro = args.data, args.train.micro_batch_size
    prefixes, weights = blend(data.data_path)
    files: Sequence[SampleFiles[object]] = open_answers(data.stage, prefixes)
    train, valid = _splits(args, files, weights)
    _, padding = _padding(args, plan)
    packed = data.per_document
    if packed and padding.length is not None:  # a row has room for all answers of a micro-batch
        padding = dataclasses.replace(padding, length=2 * micro * padding.length)

    def rows(samples: Sequence[Any]) -> Rows:
        if data.stage == "kto":
            return labelled_rows(samples, padding, longest=args.train.seq_length, packed=packed)
        return pair_rows(samples, padding, packed=packed, scored=data.stage == "rm")

    length = None if padding.length is None else -(-padding.length // padding.multiple) * padding.multiple
    return Feed(
        args,
        plan,
        Ordered(train),
        valid,
        make_rows=rows,
        rows=1 if packed else 2 * micro,
        length=length,
        supervised=float(micro),
    )


def _instructions(args: PretrainArgs, plan: TrainingPlan) -> Feed:
    data = args.data
    prefixes, weights = blend(data.data_path)
    files = open_instructions(prefixes, per_document=data.per_document)
    train, valid = _splits(args, files, weights)
    tokenizer, padding = _padding(args, plan)
    packs = data.per_document and any(file.kind is Kind.NEAT_PACK for file in files)

    def rows(samples: Sequence[TokenSample]) -> Rows:
        return instruction_rows(samples, padding, per_document=packs)

    micro, length = args.train.micro_batch_size, args.train.seq_length
    think = None
    if tokenizer and {"<think>", "</think>"} <= tokenizer.special.keys():
        think = ThinkTokens(tokenizer.special["<think>"], tokenizer.special["</think>"])
    return Feed(
        args,
        plan,
        Ordered(train),
        valid,
        make_rows=rows,
        rows=1 if packs else micro,
        length=None if data.variable_seq_lengths else length * (micro if packs else 1),
        think=think,
    )
