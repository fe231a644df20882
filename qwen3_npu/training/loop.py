"""Train: build, load, step, report, evaluate, save."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu import kernels, log
from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.args.preference import PREFERENCE_STAGES
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.checkpoint.mapping.source import Contents
from qwen3_npu.checkpoint.training.save import Position, Trained
from qwen3_npu.data.train.batches import MicroBatch, drained
from qwen3_npu.data.train.data_path import cache_folder
from qwen3_npu.distributed.launch import World, model_parallel, model_rank, process_group
from qwen3_npu.distributed.nodes import check_own, check_shared
from qwen3_npu.errors import Stopped, UsageError
from qwen3_npu.model.build import build_model, freeze
from qwen3_npu.model.config import transformer_config
from qwen3_npu.model.router import routers
from qwen3_npu.platform.base import Platform
from qwen3_npu.progress import human
from qwen3_npu.training.checkpoints.facts import facts
from qwen3_npu.training.checkpoints.hf_export import HfExport
from qwen3_npu.training.checkpoints.saving import Saver, check_folders, continued, leased
from qwen3_npu.training.exits import Exits
from qwen3_npu.training.feed import Feed, SampleSource, open_feed
from qwen3_npu.training.fingerprints.gather import fingerprinting, follow_tokens
from qwen3_npu.training.fingerprints.recorder import StepRecorder
from qwen3_npu.training.guard import NanGuard
from qwen3_npu.training.optimizer import build_optimizer, build_scheduler, wrap_model
from qwen3_npu.training.parts import lora_of, parts_of
from qwen3_npu.training.preference import preference_objective
from qwen3_npu.training.prepare.plan import TrainingPlan
from qwen3_npu.training.reference import FrozenCopy, Reference, Samples, Untrained, WithoutAdapter, fill_reference
from qwen3_npu.training.reference_cache import KnownReference, cached, digest_of, identity
from qwen3_npu.training.reports.expert_load import ExpertLoad, take_expert_load
from qwen3_npu.training.reports.report import Reporter
from qwen3_npu.training.reports.trackers import open_trackers, settings
from qwen3_npu.training.spikes.guard import SpikeGuard
from qwen3_npu.training.spikes.replicas import ReplicaCheck
from qwen3_npu.training.spikes.rollback import corrupted, decoder, go_back
from qwen3_npu.training.spikes.state import StateCheck
from qwen3_npu.training.step import NOTHING, StepResult, evaluate_step, router_loss_weight, train_step
from qwen3_npu.training.train import train
from qwen3_npu.training.update.gradients import Gradients
from qwen3_npu.watch import here
from qwen3_npu.watch.start import watched


def run(platform: Platform, args: PretrainArgs, plan: TrainingPlan) -> None:
    """The whole training, from joining the other processes to the last checkpoint."""
    check_folders(args.checkpoint, args.lora)
    with leased(args.checkpoint) as lease, process_group(platform, args.runtime) as world:
        if args.checkpoint.save is not None:
            check = check_own if args.checkpoint.save_per_node else check_shared
            check(Path(args.checkpoint.save), "--save")
        checkpoint, lora = continued(args.checkpoint, args.lora)
        preference = args.preference
        if checkpoint.load != args.checkpoint.load and preference.ref_model is None and not lora.on:
            preference = dataclasses.replace(preference, ref_model=args.checkpoint.load)  # its first model
        args = args._replace(checkpoint=checkpoint, lora=lora, preference=preference)
        shared = None if checkpoint.save_per_node else checkpoint.save
        watch = watched(args.watch, shared, event=platform.event, recorder=platform.flight_recorder)
        with watch, ready(platform, world, args, plan) as trainer:
            trainer.saver.lease = lease
            try:
                trainer.train()
            except Stopped:  # on every rank
                trainer.saver.finish()
                raise


@contextlib.contextmanager
def ready(
    platform: Platform, world: World, args: PretrainArgs, plan: TrainingPlan, *, recorder: StepRecorder | None = None
) -> Iterator[Trainer]:
    """A trainer with weights and data, among processes that have joined."""
    with model_parallel(plan.layout, args.parallel, args.runtime):
        recorder = recorder or fingerprinting(args, platform.device_name())
        trainer = Trainer(platform, world, args, plan, recorder=recorder)
        if recorder is not None:
            recorder.attach(trainer.modules)
            follow_tokens(recorder, args)
        try:
            trainer.load()
            trainer.open_data()
            yield trainer
        finally:
            trainer.close()


class Trainer:
    """One process's part of a training."""

    def __init__(
        self,
        platform: Platform,
        world: World,
        args: PretrainArgs,
        plan: TrainingPlan,
        *,
        recorder: StepRecorder | None = None,
    ) -> None:
        self.platform, self.world, self.args, self.plan = platform, world, args, plan
        if args.train.moe_router_dtype == "fp64" and not platform.has_float64:
            raise UsageError(f"--moe-router-dtype fp64: {platform.name} has no float64; use fp32")
        chosen = kernels.select_kernels(args.runtime.kernels, platform.name, args.runtime.kernel_overrides)
        log.info(f"device: {world.size} x {platform.device_name()}; kernels: {chosen}")
        self.recorder, config = recorder, self._config()
        self.dtype = config.params_dtype
        self.parts = parts_of(args, chosen if recorder is None else recorder.wrapped(chosen))
        self.modules = build_model(plan.arch, config, plan.layout, self.parts)
        contents = Contents(plan.arch, lora=lora_of(args.lora, plan.arch))
        if plan.frozen:
            rest = dataclasses.replace(contents, without=plan.frozen).shards(plan.layout, model_rank())
            kept = {(shard.chunk, shard.name) for shard in rest}
            freeze(self.modules, config, lambda chunk, name: (chunk, name) not in kept)
        self.chunks = wrap_model(config, self.modules, args.optimizer)
        self.optimizer = build_optimizer(self.chunks, args.optimizer, bf16=args.train.bf16)
        self.scheduler = build_scheduler(self.optimizer, args.optimizer, args.train, plan.global_batch)
        self.gradients = Gradients(self.optimizer)
        config.finalize_model_grads_func = here.in_phase("reduce", self.gradients.finalize)
        config.grad_scale_func = self.optimizer.scale_loss
        if args.optimizer.overlap_grad_reduce:
            config.no_sync_func = _one_or_list([chunk.no_sync for chunk in self.chunks])
            if args.optimizer.overlap_param_gather:
                config.param_sync_func = _one_or_list([chunk.start_param_sync for chunk in self.chunks])
        trained = Trained(
            contents, plan.layout, self.modules, self.optimizer, scheduler=self.scheduler, frozen=plan.frozen
        )
        if contents.lora or plan.frozen:
            some, every = trained.optimized.parameters, contents.parameters
            what = contents.lora or "weights that are not frozen"
            log.info(f"{what}: {human(some)} of {human(every)} parameters are trained ({100 * some / every:.2f} %)")
        self.saver = Saver(trained, args.checkpoint, args.lora, facts(args, plan), config=plan.config)
        self.export = HfExport(args.checkpoint, args.lora, world.rank)
        self.position = Position()
        self.feed: Feed  # open_data
        self.guard = NanGuard(args.exits.max_skipped_updates)
        self.exits = Exits(args.exits)
        is_of_tokens = not PREFERENCE_STAGES.get(args.data.stage)
        self.spikes = SpikeGuard(
            args.spikes, args.checkpoint, 2 * math.log(plan.arch.vocab_size) if is_of_tokens else math.inf
        )
        self.replicas: ReplicaCheck | None = None
        if args.spikes.replica_check_interval:
            self.replicas = ReplicaCheck(self.modules, self.optimizer)
        self.state: StateCheck | None = None  # load
        # megatron averages losses over micro-batches itself, if it does not divide by tokens.
        weighted = routers(self.modules) if config.calculate_per_token_loss else []
        self.routers = [router for router in weighted if router.has_losses]
        self.objective = preference_objective(args.data.stage, args.preference)
        self.reference: Reference | None = None

    def _config(self) -> TransformerConfig:
        """A separate configuration for each model, since it also holds the functions that megatron's schedules call."""
        return transformer_config(
            self.plan.arch,
            self.plan.layout,
            self.args.parallel,
            self.args.train,
            variable_lengths=self.args.data.variable_seq_lengths,
            overlaps_p2p_safely=self.platform.overlaps_p2p_safely,
            interleaved=self.args.overlap.moe_fb_overlap,
        )

    def load(self) -> None:
        """Weights and, when resuming, everything else."""
        self.position = self.saver.load()
        self.check_state()

    def open_data(self) -> None:
        """Open the samples of each split, and the reference model."""
        spikes = self.args.spikes
        spare = self.spikes.read(self.position)
        if self.spikes.rolls_back:
            spare += spikes.max_rollbacks * self.plan.global_batch
        self.feed = open_feed(self.args, self.plan, spare)
        self.spikes.leave_out(self.feed.train)
        if PREFERENCE_STAGES.get(self.args.data.stage):
            is_cached = self.args.preference.ref_logprobs == "cache"
            self.reference = self._cached_reference() if is_cached else self._open_reference()

    def _open_reference(self) -> Reference:
        """The reference model that the flags describe. Raises: UsageError: there is none."""
        wanted = self.args.preference
        if wanted.ref_model is None and self.args.lora.on:
            log.info("reference: the model without its adapter")
            return WithoutAdapter(self.chunks)
        folder = wanted.ref_model or self.args.checkpoint.load
        if folder is None:
            raise UsageError(f"--stage {self.args.data.stage} needs a reference: give --load or --ref-model")
        if wanted.ref_model is None and self.position.iteration > 0:
            raise UsageError(
                f"--load {folder} is a training at step {self.position.iteration}, not the reference that it began "
                f"with; name that with --ref-model"
            )
        if wanted.ref_model is None and wanted.ref_logprobs == "cache":
            return Untrained(self.chunks)
        copy = self.another_model()
        fill_reference(copy, self.plan.layout, self.plan.arch, folder=folder, step=wanted.refer_model_iter)
        return FrozenCopy(copy)

    def another_model(self) -> Sequence[torch.nn.Module]:
        """A second model in the same layout, without adapters; its weights are not loaded."""
        parts = dataclasses.replace(self.parts, lora=LoraArgs())
        return build_model(self.plan.arch, self._config(), self.plan.layout, parts)

    def _cached_reference(self) -> KnownReference:
        """The reference's log-probabilities from the file beside the data; missing ones are computed first."""
        args, starts, total = self.args, {}, 0
        files = [file for dataset in self._answer_sets() for file in dataset.files]
        for file in sorted({file.prefix: file for file in files}.values(), key=lambda file: file.prefix):
            starts[file.prefix], total = total, total + len(file)
        model = str(args.preference.ref_model or args.checkpoint.load)
        facts = (identity(model), args.preference.refer_model_iter, args.train.seq_length, args.train.bf16)
        path = cache_folder(args.data) / f"reference_{digest_of([f.fingerprint() for f in files], *facts)}.npy"
        return cached(
            self._open_reference,
            path,
            starts,
            total,
            at_most=(args.train.steps + args.report.eval_iters) * self.plan.global_batch,
            steps=self._reference_steps(),
            device=self.world.device,
            **self.sizes,
        )

    def _reference_steps(
        self,
    ) -> Iterator[tuple[Callable[[], list[Iterator[MicroBatch]]], list[Samples], list[Samples]]]:
        """Every step of the training, then of the evaluations, in the form of `reference_cache.cached`."""
        evaluations = self.args.report.eval_iters
        for dataset, count in zip(self._answer_sets(), (self.args.train.steps, evaluations), strict=False):
            for number in range(count):
                consumed = number * self.plan.global_batch
                everyone: list[Samples] = [
                    [dataset.locate(n) for n in range(consumed, consumed + self.plan.global_batch)]
                ]
                yield functools.partial(self.batches, dataset, consumed), self._samples(dataset, consumed), everyone

    def _answer_sets(self) -> list[Any]:
        """The answers for training (an `Ordered`) and, if there are any, for validation: `InstructionDataset`s."""
        return [found for found in (self.feed.train, self.feed.valid) if found is not None]

    def _samples(self, dataset: SampleSource, consumed: int) -> list[Samples]:
        """The places of the pairs of this rank's micro-batches."""
        return [[dataset.locate(n) for n in numbers] for numbers in self.feed.numbers(consumed)]

    def batches(self, dataset: SampleSource, consumed: int) -> list[Iterator[MicroBatch]]:
        """This rank's micro-batches of one step, once for each model chunk."""
        batches = self.feed.batches(dataset, consumed, self.world.device, self.dtype)
        return list(itertools.tee(batches, len(self.chunks)))

    def _with_reference(self, dataset: SampleSource, consumed: int) -> list[Iterator[MicroBatch]]:
        """The micro-batches of a step; the objective gets the reference's log-probabilities of them."""
        batches = self.batches(dataset, consumed)
        if self.objective is None or self.reference is None:
            return batches
        held = list(batches[0])
        again = [drained(collections.deque(held)) for _ in self.chunks]
        self.objective.references = collections.deque(
            self.reference.log_probs(again, self._samples(dataset, consumed), **self.sizes)
        )
        return [drained(collections.deque(held)) for _ in self.chunks]

    def training_batches(self) -> list[Iterator[MicroBatch]]:
        """This rank's micro-batches of the next step, once for each model chunk; also sets the routers' loss weight."""
        batches = self._with_reference(self.feed.train, self.position.samples)
        if not self.routers:
            return batches
        if self.feed.supervised is not None:
            weight: float | torch.Tensor = self.feed.supervised
        else:
            held = list(batches[0])
            weight = router_loss_weight(held, self.world.device)
            batches = [drained(collections.deque(held)) for _ in self.chunks]
        for router in self.routers:
            router.loss_weight = weight
        return batches

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "num_microbatches": self.plan.num_microbatches,
            "seq_length": self.feed.length or self.args.train.seq_length,
            "micro_batch": self.feed.rows,
        }

    def step(self) -> StepResult:
        """One optimizer step."""
        here.at("data")
        batches = self.training_batches()
        if self.recorder is not None:
            self.recorder.begin(self.position.iteration + 1)
        result = train_step(
            self.chunks,
            self.gradients,
            self.scheduler,
            batches,
            guard=self.guard,
            objective=self.objective,
            wishes=self.exits.wishes(),
            global_batch=self.plan.global_batch,
            limits=self.spikes.limits,
            state=self.state,
            **self.sizes,
        )
        if self.recorder is not None:
            self.recorder.end()
        before, step = self.position, self.position.iteration + 1
        if result.is_damaged and self.state is not None:
            self.go_back(corrupted(self.spikes, str(self.state.problem()), step))
            return result
        why = self.spikes.judge(step, result.loss, result.grad_norm, skipped=result.skipped)
        if result.skipped and why and self.spikes.is_on:
            decode = decoder(self.args.data.tokenizer_name_or_path) if self.world.rank == 0 else None
            self.spikes.note(self.feed.train, before, self.plan.global_batch, why=why, decode=decode)
        if result.skipped and why and self.spikes.rolls_back:
            self.go_back(f"spike: {why}; it goes on without the samples of step {step}")
            return dataclasses.replace(result, spike=why)
        self.position = Position(step, before.samples + self.plan.global_batch)
        if result.skipped:
            samples = range(before.samples, self.position.samples)
            self.guard.report(step, result.loss, result.grad_norm, samples, why=why)
        if self.state is not None:
            self.state.note(step + 1)
        here.step_done(self.position.iteration)
        return dataclasses.replace(result, spike=why)

    def check_state(self) -> None:
        """Start the state check with the state that was just loaded, if --state-check-interval asks for it."""
        if interval := self.args.spikes.checks_state:
            self.state = StateCheck(interval, self.modules, self.optimizer, self.world.device)
            self.state.note(self.position.iteration + 1)

    def go_back(self, why: str) -> None:
        self.position = go_back(self.spikes, self.guard, self.saver, self.feed, position=self.position, why=why)
        self.check_state()

    def train(self) -> None:
        """All steps up to --train-iters."""
        train(self)

    def close(self) -> None:
        """Free the model, for a process that trains more than once."""
        # Autograd nodes hold megatron's hooks, these hold model and optimizer, and both hold nodes (by views of
        # parameters, and by what the dispatcher of experts keeps of the last tokens): cycles that Python's collector
        # cannot see.
        for chunk in self.chunks:
            for part in [*chunk.parameters(), *chunk.modules()]:
                vars(part).clear()

    def expert_load(self) -> ExpertLoad | None:
        arch = self.plan.arch
        return take_expert_load(self.modules, self.plan.layout.num_layers, arch.num_experts) if arch.is_moe else None

    def reporter(self) -> Reporter:
        args = self.args
        return Reporter(
            self.platform,
            self.plan.arch,
            devices=self.world.size,
            interval=args.report.log_interval,
            first=self.position.iteration,
            last=args.train.steps,
            folder=Path(args.report.tensorboard_dir) if args.report.tensorboard_dir else None,
            is_main=self.world.rank == 0,
            names=self.objective.names if self.objective else (),
            tells_times=args.report.timing_log_level > 0,
            verdict=self.plan.verdict,
            trackers=open_trackers(args.trackers, settings(args)) if self.world.rank == 0 else (),
        )

    def evaluate(self, reporter: Reporter) -> None:
        """The loss on the validation data, always on the same first samples, so that losses are comparable."""
        if self.feed.valid is None:
            return
        total = NOTHING
        for number in range(self.args.report.eval_iters):
            batches = self._with_reference(self.feed.valid, number * self.plan.global_batch)
            total += evaluate_step(self.chunks, batches, self.objective, **self.sizes)
        reporter.evaluation(self.position.iteration, "validation", total)


def _one_or_list(items: list[Callable]) -> Callable | list[Callable]:
    """megatron takes one function, or a list of one per model chunk."""
    return items if len(items) > 1 else items[0]
