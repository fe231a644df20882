"""Train: build, load, step, report, evaluate, save."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

from qwen3_npu import kernels, log
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.checkpoint import training_state
from qwen3_npu.checkpoint.training_state import Position, Trained
from qwen3_npu.data import pretrain
from qwen3_npu.data.batches import Batch, micro_batches, sample_numbers
from qwen3_npu.distributed.context_parallel import ContextParallel, shard
from qwen3_npu.distributed.launch import World, model_parallel, process_group
from qwen3_npu.model.build import build_model
from qwen3_npu.model.config import transformer_config
from qwen3_npu.model.sequence import Sequence
from qwen3_npu.model.spec import Parts
from qwen3_npu.platform.base import Platform
from qwen3_npu.training.exits import Exits
from qwen3_npu.training.guard import NanGuard
from qwen3_npu.training.optimizer import build_optimizer, build_scheduler, wrap_model
from qwen3_npu.training.plan import Plan
from qwen3_npu.training.report import Reporter
from qwen3_npu.training.step import StepResult, evaluate_step, train_step


def run(platform: Platform, args: PretrainArgs, plan: Plan, fingerprint: str) -> None:
    """The whole training, from joining the other processes to the last checkpoint.

    Args:
        fingerprint: of the data files.
    """
    if args.checkpoint.save:
        training_state.check_writable(args.checkpoint.save)
    with process_group(platform, args.runtime) as world, model_parallel(plan.layout, args.parallel, args.runtime):
        trainer = Trainer(platform, world, args, plan)
        trainer.load()
        trainer.open_data(fingerprint)
        trainer.train()


class Trainer:
    """One process's part of a training."""

    def __init__(self, platform: Platform, world: World, args: PretrainArgs, plan: Plan) -> None:
        self.platform, self.world, self.args, self.plan = platform, world, args, plan
        chosen = kernels.select(args.runtime.kernels, platform.name, args.runtime.kernel_overrides)
        log.info(f"device: {world.size} x {platform.device_name()}; kernels: {chosen}")
        config = transformer_config(
            plan.arch, plan.layout, args.parallel, args.train, overlaps_p2p_safely=platform.overlaps_p2p_safely
        )
        self.dtype = config.params_dtype
        context_parallel = None
        if args.parallel.context_parallel_size > 1:
            context_parallel = ContextParallel(args.parallel.context_parallel_algo, chosen)
        parts = Parts(
            chosen,
            context_parallel=context_parallel,
            recompute_activation=args.train.recompute_activation_function,
            loss_chunk=args.train.loss_chunk_size if args.train.loss_compute_mode == "chunk" else 0,
        )
        self.modules = build_model(plan.arch, config, plan.layout, parts)
        self.chunks = wrap_model(config, self.modules, args.optimizer)
        self.optimizer = build_optimizer(self.chunks, args.optimizer, bf16=args.train.bf16)
        self.scheduler = build_scheduler(self.optimizer, args.optimizer, args.train, plan.global_batch)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if args.optimizer.overlap_grad_reduce:
            config.no_sync_func = _one_or_list([chunk.no_sync for chunk in self.chunks])
            if args.optimizer.overlap_param_gather:
                config.param_sync_func = _one_or_list([chunk.start_param_sync for chunk in self.chunks])
        self.trained = Trained(plan.arch, plan.layout, self.modules, self.optimizer, self.scheduler)
        self.position = Position()
        self.splits: Any = None
        self.guard = NanGuard(args.exits.max_skipped_updates)
        self.exits = Exits(args.exits)

    def load(self) -> None:
        """Weights and, when resuming, everything else."""
        self.position = training_state.load(self.trained, self.args.checkpoint)

    def open_data(self, fingerprint: str) -> None:
        """The samples of each split."""
        train, report = self.args.train, self.args.report
        evaluations = train.train_iters // report.eval_interval + 1
        samples = tuple(n * self.plan.global_batch for n in (train.train_iters, evaluations * report.eval_iters, 0))
        self.splits = pretrain.build_splits(
            self.args.data,
            fingerprint=fingerprint,
            seq_length=train.seq_length,
            seed=self.args.runtime.seed,
            samples=samples,  # type: ignore[arg-type]
        )

    def batches(self, dataset: Any, consumed: int) -> list[Iterator[Batch]]:
        """This rank's micro-batches of one step, once for each model chunk."""
        numbers = {
            "global_batch": self.plan.global_batch,
            "micro_batch": self.args.train.micro_batch_size,
            "data_parallel": self.plan.data_parallel,
            "data_rank": parallel_state.get_data_parallel_rank(),
        }
        return [
            micro_batches(
                dataset,
                sample_numbers(consumed, **numbers),
                pretrain.collate,
                self.sequence,
                self.shard,
                self.world.device,
            )
            for _ in self.chunks
        ]

    def sequence(self, positions: torch.Tensor) -> Sequence:
        """What the layers need to know of tokens at these positions."""
        return Sequence(positions, None, self.plan.arch.rope_theta, self.plan.arch.head_dim, self.dtype)

    def shard(self, fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This context-parallel rank's part of the sequences."""
        parallel = self.args.parallel
        rank = parallel_state.get_context_parallel_rank()
        return shard(fields, parallel.context_parallel_algo, parallel.context_parallel_size, rank)

    @property
    def sizes(self) -> dict[str, int]:
        train = self.args.train
        return {
            "num_microbatches": self.plan.num_microbatches,
            "seq_length": train.seq_length,
            "micro_batch": train.micro_batch_size,
        }

    def step(self) -> StepResult:
        """One optimizer step."""
        result = train_step(
            self.chunks,
            self.optimizer,
            self.scheduler,
            self.batches(self.splits.train, self.position.samples),
            self.guard,
            global_batch=self.plan.global_batch,
            **self.sizes,
        )
        before = self.position
        self.position = Position(before.iteration + 1, before.samples + self.plan.global_batch)
        if result.skipped:
            samples = range(before.samples, self.position.samples)
            self.guard.report(self.position.iteration, result.loss, result.grad_norm, samples)
        return result

    def train(self) -> None:
        """All steps up to --train-iters."""
        args, last = self.args, self.args.train.train_iters
        if self.position.iteration >= last:
            log.info(f"nothing to do: step {self.position.iteration} of --train-iters {last} is reached")
            return
        reporter = self._reporter()
        if args.train.manual_gc:
            gc.disable()
        stop: str | None = None
        while self.position.iteration < last and stop is None:
            result = self.step()
            iteration = self.position.iteration
            reporter.step(iteration, result)
            if args.train.manual_gc_interval and iteration % args.train.manual_gc_interval == 0:
                gc.collect()
            if args.report.eval_iters and (iteration % args.report.eval_interval == 0 or iteration == last):
                self.evaluate(reporter)
            stop = self.exits.reason(iteration, self.world.device)
            due = args.checkpoint.save_interval and iteration % args.checkpoint.save_interval == 0
            if args.checkpoint.save and (due or stop or iteration == last):
                self.save()
                reporter.restart_clock()
        reporter.close()
        if stop is not None:
            log.info(f"stopped after step {self.position.iteration} of {last}: {stop}")

    def _reporter(self) -> Reporter:
        args = self.args
        return Reporter(
            self.platform,
            self.plan.arch,
            seq_length=args.train.seq_length,
            tokens_per_step=self.plan.global_batch * args.train.seq_length,
            devices=self.world.size,
            interval=args.report.log_interval,
            first=self.position.iteration,
            last=args.train.train_iters,
            folder=Path(args.report.tensorboard_dir) if args.report.tensorboard_dir else None,
            speaks=self.world.rank == 0,
        )

    def evaluate(self, reporter: Reporter) -> None:
        """The loss on the validation share, always on its first samples, so that losses compare."""
        if self.splits.valid is None:
            return
        total, tokens = 0.0, 0
        for number in range(self.args.report.eval_iters):
            batches = self.batches(self.splits.valid, number * self.plan.global_batch)
            loss, count = evaluate_step(self.chunks, batches, **self.sizes)
            total, tokens = total + loss * count, tokens + count
        reporter.evaluation(self.position.iteration, "validation", total / max(tokens, 1))

    def save(self) -> None:
        """A checkpoint of this step."""
        extra = {**dataclasses.asdict(self.args.train), "seed": self.args.runtime.seed}
        folder = training_state.save(self.trained, self.position, self.args.checkpoint, extra, self.plan.config)
        log.info(f"saved: {folder}")


def _one_or_list(items: list) -> Any:
    """megatron takes one function, or a list of one per model chunk."""
    return items if len(items) > 1 else items[0]
