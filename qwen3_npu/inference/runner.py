"""The model, loaded and ready to run forward passes: packed tokens in, logits of chosen tokens out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from qwen3_npu import kernels, log
from qwen3_npu.args.inference import WeightArgs
from qwen3_npu.args.parallel import RuntimeArgs
from qwen3_npu.args.training import TrainArgs
from qwen3_npu.checkpoint.formats.open import ALONE, Opened, Sources
from qwen3_npu.checkpoint.training.live import Ranks, load_weights
from qwen3_npu.data.train.batches import fetched, moved
from qwen3_npu.distributed.launch import World, model_parallel, model_rank
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.plan import InferencePlan
from qwen3_npu.model.arch.rope import Rope
from qwen3_npu.model.build import build_model
from qwen3_npu.model.cache import CachedSequence, Kept, KVCache, PrefixedSequence
from qwen3_npu.model.config import transformer_config
from qwen3_npu.model.frozen import FrozenLinear, freeze_linears, run_layers
from qwen3_npu.model.sequence import TokenSequence
from qwen3_npu.model.spec import Parts
from qwen3_npu.platform.base import Platform

T = TypeVar("T")


@contextlib.contextmanager
def loaded(
    platform: Platform,
    world: World,
    runtime: RuntimeArgs,
    weights: WeightArgs,
    *,
    plan: InferencePlan,
    rows: int = 1,
    copy_tied: bool = True,
) -> Iterator[Runner]:
    """A loaded model, among the job's other processes.

    Args:
        rows: usual number of tokens of a pass; the layout of weights is chosen for it.
        copy_tied: an output layer that shares the embedding's weight may have a copy in another layout.
    """
    with model_parallel(plan.layout, plan.parallel, runtime), torch.inference_mode():
        yield Runner(platform, world, runtime, weights, plan=plan, rows=rows, copy_tied=copy_tied)


class Runner:
    """One process's part of the model.

    Attributes:
        data_rank, data_parallel: number of this copy of the model, and number of copies.
        vocab_size: number of logits of a token, without padding; 1 for a reward model.
        last: whether this process has the logits.
        leads: whether this process is the first one of its copy of the model.
    """

    def __init__(
        self,
        platform: Platform,
        world: World,
        runtime: RuntimeArgs,
        weights: WeightArgs,
        *,
        plan: InferencePlan,
        rows: int,
        copy_tied: bool,
    ) -> None:
        self.world, self.plan, self.arch = world, plan, plan.arch
        chosen = kernels.select_kernels(runtime.kernels, platform.name, runtime.kernel_overrides)
        log.info(f"device: {world.size} x {platform.device_name()}; kernels: {chosen}")
        train = TrainArgs(train_iters=0, bf16=weights.bf16)
        config = transformer_config(
            plan.arch, plan.layout, plan.parallel, train, overlaps_p2p_safely=platform.overlaps_p2p_safely
        )
        config.perform_initialization = False  # every weight is loaded
        self.dtype, self.device = config.params_dtype, world.device
        (self.model,) = build_model(plan.arch, config, plan.layout, Parts(chosen))
        self.model.eval().requires_grad_(False)
        source = open_source(weights)
        if source.arch.reward != plan.arch.reward:
            is_one = f"{weights.lora_load or weights.load} holds {'a' if source.arch.reward else 'no'} reward model"
            raise UsageError(f"{is_one}; --task score is for those, and only for those")
        if not source.arch.same_weights(plan.arch):
            raise UsageError(f"--load {weights.load} holds {source.arch}; the model is {plan.arch}")
        if change := plan.arch.unlike(source.arch):
            raise UsageError(
                f"--load {weights.load} was trained with {change} ({plan.found_in}); drop --hf-dir or correct it"
            )
        load_weights(
            source,
            plan.layout,
            model_rank(),
            [self.model],
            allow_nonfinite=weights.allow_nonfinite_weights,
        )
        source.close()
        freeze_linears(self.model, chosen, rows)
        self.pipeline = parallel_state.get_pipeline_model_parallel_group()
        self.stage, self.last = self.pipeline.rank(), self.pipeline.rank() == self.pipeline.size() - 1
        self.data_rank, self.data_parallel = parallel_state.get_data_parallel_rank(), plan.data_parallel
        self.leads = self.stage == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
        self.vocab_size = 1 if plan.arch.reward else plan.arch.vocab_size
        if self.last:
            self.head = self._head(chosen, rows, copy_tied)
        self.sent: tuple[dist.Work | None, torch.Tensor] | None = None
        # Copies of the model that share experts exchange tokens in every pass: they must make the same number.
        self.in_step = plan.layout.expert > 1 and self.data_parallel > 1

    def _head(self, chosen: kernels.Kernels, rows: int, copy_tied: bool) -> torch.nn.Module:
        """The output layer or reward head. A weight that is also the embedding keeps its layout, beside any copy."""
        if self.arch.reward:
            return self.model.score
        layer = self.model.output_layer
        if not self.arch.tie_word_embeddings or isinstance(layer, FrozenLinear):
            return layer
        shared = self.model.shared_embedding_or_output_weight()
        return FrozenLinear(layer, shared, chosen if copy_tied else kernels.select_kernels("reference"), rows)

    # What passes attend to

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """A cache for `slots` sequences of up to `capacity` tokens."""
        return KVCache(
            [layer.layer_number for layer in self.model.decoder.layers],
            slots=slots,
            capacity=capacity,
            groups=max(self.arch.num_key_value_heads // self.plan.layout.tensor, 1),
            head_dim=self.arch.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def cached(self, cache: KVCache, kept: Sequence[Kept]) -> CachedSequence:
        """A `CachedSequence` of new tokens."""
        places = [place for k in kept for place in range(k.start, k.start + k.length)]
        return CachedSequence(self._positions(places), None, *self._facts, cache=cache, kept=tuple(kept))

    def packed(self, lengths: Sequence[int], cache: KVCache | None = None, prefix: int = 0) -> TokenSequence:
        """Complete documents, or continuations of a prefix in slot 0 of a cache."""
        boundaries = [0]
        places: list[int] = []
        for length in lengths:
            boundaries.append(boundaries[-1] + length)
            places += range(prefix, prefix + length)
        if prefix:
            assert cache is not None
            return PrefixedSequence(
                self._positions(places), tuple(boundaries), *self._facts, cache=cache, prefix=prefix
            )
        return TokenSequence(self._positions(places), tuple(boundaries), *self._facts)

    @property
    def _facts(self) -> tuple[Rope, torch.dtype]:
        return self.arch.rope, self.dtype

    def _positions(self, places: list[int]) -> torch.Tensor:
        return self._numbers([places])

    def _numbers(self, numbers: list[int] | list[list[int]]) -> torch.Tensor:
        """Numbers on the device, by an asynchronous copy."""
        return moved({"numbers": torch.tensor(numbers)}, self.device)["numbers"]

    # Passes

    def forward(self, tokens: Sequence[int], sequence: TokenSequence, wanted: Sequence[int]) -> torch.Tensor | None:
        """One pass through the whole model.

        Args:
            tokens: packed as `sequence` says.
            wanted: indices of the tokens whose logits are needed.

        Returns:
            Logits [len(wanted), vocabulary] in the model's dtype on the last pipeline stage, None on the others; of a
            reward model [len(wanted), 1] in float32.
        """
        hidden = self._first(tokens) if self.stage == 0 else self._received(len(tokens))
        hidden = run_layers(self.model.decoder, hidden, sequence)
        if not self.last:
            self._send(hidden)
            return None
        if not wanted:
            return hidden.new_empty(0, self.vocab_size)
        if len(wanted) < len(tokens):
            hidden = hidden[self._numbers(list(wanted))]
        if self.arch.reward:
            return self.head(hidden)
        logits, _ = self.head(hidden)
        return gather_from_tensor_model_parallel_region(logits[:, 0])[:, : self.vocab_size]

    def idle(self) -> None:
        """A pass without own tokens, for other copies of the model that share experts (see `in_step`)."""
        self.forward([0], self.packed([1]), [])

    def anyone(self, busy: bool) -> bool:
        """Whether this copy of the model has work; or any copy, if copies must make the same number of passes."""
        if not self.in_step:
            return busy
        flag = torch.tensor([int(busy)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
        return bool(flag.item())

    def _first(self, tokens: Sequence[int]) -> torch.Tensor:
        return self.model.embedding(self._numbers([list(tokens)]), None)

    def _received(self, tokens: int) -> torch.Tensor:
        hidden = torch.empty(tokens, 1, self.arch.hidden_size, dtype=self.dtype, device=self.device)
        dist.recv(hidden, dist.get_global_rank(self.pipeline, self.stage - 1), group=self.pipeline)
        return hidden

    def _send(self, hidden: torch.Tensor) -> None:
        # Not waited for: while the next stage computes, this one may start the next pass.
        self._finish_send()
        hidden = hidden.contiguous()
        work = dist.isend(hidden, dist.get_global_rank(self.pipeline, self.stage + 1), group=self.pipeline)
        assert work is not None  # this rank is in the group
        self.sent = work, hidden

    def _finish_send(self) -> None:
        if self.sent is not None:
            work, _ = self.sent
            if work is not None:
                work.wait()
            self.sent = None

    # Results

    def share(self, values: torch.Tensor) -> torch.Tensor:
        """The last stage's values, on every process of this copy of the model.

        Args:
            values: of the same shape and dtype everywhere.
        """
        self._finish_send()
        values = values.contiguous()
        if self.plan.layout.tensor > 1:
            # Ranks have the same logits; if a device rounds differently, they still continue with one text.
            group = parallel_state.get_tensor_model_parallel_group()
            dist.broadcast(values, dist.get_global_rank(group, 0), group=group)
        if self.pipeline.size() > 1:
            last = dist.get_global_rank(self.pipeline, self.pipeline.size() - 1)
            dist.broadcast(values, last, group=self.pipeline)
        return values

    def share_scored(
        self, scored: tuple[torch.Tensor, torch.Tensor] | None, count: int
    ) -> tuple[list[int], list[float]]:
        """The last stage's numbers and scores, on every process of this copy of the model.

        Args:
            scored: [count] int64 and [count] float32, or None.
        """
        # One transfer: the scores travel as the bits that they are (not every device knows float64).
        both = torch.zeros(2, count, dtype=torch.int64, device=self.device)
        if scored is not None:
            both[0], both[1] = scored[0], scored[1].float().contiguous().view(torch.int32)
        numbers, bits = fetched(self.share(both))
        return numbers.tolist(), bits.to(torch.int32).view(torch.float32).tolist()

    def gather(self, mine: list[T]) -> list[T]:
        """The lists of all copies of the model as one, on every process."""
        if self.data_parallel == 1:
            return mine
        parts: list[list[T]] = [[] for _ in range(self.data_parallel)]
        dist.all_gather_object(parts, mine, group=parallel_state.get_data_parallel_group())
        return [item for part in parts for item in part]

    def told(self, value: bool, *, everyone: bool = False) -> bool:
        """The value of the first process of this copy of the model, on all processes of the copy.

        Args:
            everyone: take the value of rank 0, on every process.
        """
        group = dist.group.WORLD if everyone else parallel_state.get_model_parallel_group()
        assert group is not None
        if group.size() == 1:
            return value
        flag = torch.tensor([int(value)], device=self.device)
        dist.broadcast(flag, dist.get_global_rank(group, 0), group=group)
        return bool(flag.item())

    def agreed(self, value: T) -> T:
        """Rank 0's value on every process."""
        if self.world.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]


def open_source(weights: WeightArgs) -> Opened:
    """The weights, merged with the adapter of --lora-load or with one in --load itself."""
    sources = Sources(
        weights.load, iteration=weights.ckpt_step, lora_load=weights.lora_load, lora_alpha=weights.lora_alpha
    )
    sources, _ = sources.checked(peers=Ranks() if dist.is_initialized() else ALONE)
    base = sources.open_base()
    if not base.contents.base:
        raise UsageError(
            f"--load {weights.load} holds an adapter only; give it as --lora-load, and its model as --load"
        )
    if weights.lora_load is None and base.contents.lora is None:
        return base
    if weights.lora_load is not None:
        sources.open_adapter(base).close()
    base.close()
    return dataclasses.replace(sources, merge=True)()
