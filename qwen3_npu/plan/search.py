"""Search all legal layouts of a number of devices, and rank those that fit by predicted tokens per second. No torch.

The checks of the flags (`args/rules/fit.py`, `distributed/layout.py`) decide whether a layout is legal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from qwen3_npu.args.lora import FreezeArgs, LoraArgs
from qwen3_npu.args.model import ModelArgs, ShapeArgs
from qwen3_npu.args.parallel import OverlapArgs, ParallelArgs, RuntimeArgs
from qwen3_npu.args.preference import PreferenceArgs
from qwen3_npu.args.preprocess import InstructionArgs, RecordArgs, TokenizerArgs
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.args.profile import ProfileArgs
from qwen3_npu.args.rules.fit import Fit, fit_flags
from qwen3_npu.args.tools.plan import PlanArgs, VerdictArgs
from qwen3_npu.args.trackers import ReportArgs, TrackerArgs
from qwen3_npu.args.training import CheckpointArgs, DataArgs, ExitArgs, OptimizerArgs, TrainArgs
from qwen3_npu.args.watch import SpikeArgs, WatchArgs
from qwen3_npu.distributed.layout import exchange_pieces
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.plan.candidate import SAVINGS, LayoutCandidate
from qwen3_npu.plan.device import GIB, Device
from qwen3_npu.plan.from_args import setup_of
from qwen3_npu.plan.shape import Shape
from qwen3_npu.plan.verdict import PlanVerdict

_MICRO = (1, 2, 4)
_WORTH = 0.1  # an optimizer state of a smaller share of the memory is not worth swapping
_HIDING = 40  # so many of the fastest layouts are also tried with hidden communication


def search(shape: Shape, arch: Qwen3Arch, args: PlanArgs, device: Device) -> list[LayoutCandidate]:
    """Every layout that fits, the fastest first.

    Raises:
        UsageError: none fits; the message names the smallest one and remedies.
    """
    fitting: list[LayoutCandidate] = []
    nearest: PlanVerdict | None = None
    for flags, sizes in _legal(arch, args, device):
        best: LayoutCandidate | None = None
        for found in _memory_choices(shape, flags, sizes, device, known=bool(fitting)):
            if found.verdict.fits:
                best = found if best is None else min(best, found, key=_by_rate)
            elif not fitting and (nearest is None or found.verdict.peak < nearest.peak):
                nearest = found.verdict
        fitting += [best] if best is not None else []
    if not fitting:
        raise UsageError(_nothing_fits(nearest, shape, arch, args, device=device))
    fitting.sort(key=_by_rate)
    fastest = map(_hiding, map(_exchanging, map(_swapping, fitting[:_HIDING])))
    return sorted([*fastest, *fitting[_HIDING:]], key=_by_rate)


def _memory_choices(
    shape: Shape, flags: PretrainArgs, sizes: Fit, device: Device, *, known: bool
) -> Iterator[LayoutCandidate]:
    """Variants of a layout that save memory: recomputation; then less of the optimizer's state on the device, while
    this needs less recomputation.

    Args:
        known: another layout fits, so hopeless ones are skipped.
    """
    least = None  # fewest recomputed layers that fit
    plain = setup_of(flags, sizes)
    per_chunk = max(len(chunk) for stage in sizes.layout.chunks for chunk in stage)
    counts: Sequence[int] = sorted({0, -(-per_chunk // 4), -(-per_chunk // 2), per_chunk})
    for saving in SAVINGS if not flags.lora.on else SAVINGS[:1]:
        for count in counts:
            if least is not None and count >= least:
                break
            setup = dataclasses.replace(plain, recompute=count * plain.virtual, **saving.of_setup)
            verdict = PlanVerdict(shape, setup, device)
            yield LayoutCandidate(verdict, flags, count, saving)
            if verdict.fits:
                least = count
            if verdict.fits or (known and verdict.is_hopeless):
                break
        if least == 0 or (known and verdict.optimizer_share < _WORTH):
            return


def _by_rate(found: LayoutCandidate) -> float:
    return -found.verdict.tokens_per_second


def _swapping(found: LayoutCandidate) -> LayoutCandidate:
    """The variants with attention's activations on the host instead of recomputed layers, if they fit."""
    setup = found.verdict.setup
    if not setup.recompute:
        return found
    plain = {"recompute": 0, "swapped": ("self_attention",), "swapped_layers": max(map(sum, setup.layers))}
    swapped = found.changed(plain, {"train": {"swap_attention": True}})
    swapped = dataclasses.replace(swapped, recomputed=0)
    return swapped if swapped.verdict.fits and _by_rate(swapped) < _by_rate(found) else found


def _hiding(found: LayoutCandidate) -> LayoutCandidate:
    """The variants with tensor-parallel communication hidden in pieces, if they are faster."""
    if found.verdict.setup.tensor == 1 or found.layout.lora.qlora:
        return found
    hidden = found.changed({"overlap_tensor": True}, {"overlap": {"use_ascend_coc": True}})
    return hidden if hidden.verdict.time.total < found.verdict.time.total else found


def _exchanging(found: LayoutCandidate) -> LayoutCandidate:
    """The variants with all tokens gathered, or their exchange hidden in pieces, if they are faster."""
    setup, shape = found.verdict.setup, found.verdict.shape
    if setup.expert == 1:
        return found
    ways = [found.changed({"gathered": True}, {"train": {"moe_token_dispatcher_type": "allgather"}})]
    if exchange_pieces(shape.num_experts // setup.expert) > 1:
        ways.append(found.changed({"overlap_experts": True}, {"train": {"moe_alltoall_overlap_comm": True}}))
    return min([found, *(way for way in ways if way.verdict.fits)], key=_by_rate)


def _nothing_fits(nearest: PlanVerdict | None, shape: Shape, arch: Qwen3Arch, args: PlanArgs, *, device: Device) -> str:
    if nearest is None:
        return (
            f"no layout of {args.devices} devices is legal for this model at --seq-length {args.seq_length} and "
            f"--global-batch-size {args.global_batch_size}; give a batch that more device counts divide"
        )
    changes = [("--lora-r 16", dataclasses.replace(args, lora_r=16))] if not args.lora_r else []
    changes += [(f"--seq-length {n}", dataclasses.replace(args, seq_length=n)) for n in _halves(args.seq_length)]
    for devices in (args.devices * 2**n for n in range(1, 7)):
        more = dataclasses.replace(args, devices=devices, global_batch_size=max(args.global_batch_size, devices))
        changes.append((f"--devices {devices}", more))
    found: dict[str, str] = {}  # kind of change -> the smallest change that fits
    for words, changed in changes:
        kind = words.split()[0]
        if kind not in found and _any_fits(shape, arch, changed, device):
            found[kind] = words
    remedies = f"it fits with {', or '.join(found.values())}" if found else "give a device with more memory"
    return (
        f"nothing fits {args.devices} x {device.name}: the smallest layout needs {nearest.peak / GIB:.1f} GiB of "
        f"{nearest.limit / GIB:.1f}; {remedies}"
    )


def _halves(length: int) -> list[int]:
    """Shorter lengths, down to 512 tokens."""
    return [length // 2**n for n in range(1, 12) if length // 2**n >= 512]


def _any_fits(shape: Shape, arch: Qwen3Arch, args: PlanArgs, device: Device) -> bool:
    return any(
        found.verdict.fits
        for flags, sizes in _legal(arch, args, device)
        for found in _memory_choices(shape, flags, sizes, device, known=False)
    )


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def _legal(arch: Qwen3Arch, args: PlanArgs, device: Device) -> Iterator[tuple[PretrainArgs, Fit]]:
    """Flags of every layout and micro-batch that the parser's checks accept."""
    base = _base_flags(args)
    for parallel in _layouts(arch, args, device):
        for micro in _MICRO if args.stage != "kto" else _MICRO[1:]:  # kto pairs answers of a micro-batch
            train = dataclasses.replace(base.train, micro_batch_size=micro)
            flags = base._replace(parallel=parallel, train=train)
            try:
                yield flags, fit_flags(flags, arch, args.devices)
            except UsageError:
                break  # a larger micro-batch fits no better


def _layouts(arch: Qwen3Arch, args: PlanArgs, device: Device) -> Iterator[ParallelArgs]:
    """Candidates. Sizes that do not divide are skipped early to save time."""
    layers, world = arch.num_hidden_layers, args.devices
    for tensor in _divisors(world, device.node):
        for pipeline in _divisors(world // tensor, layers):
            for context in _divisors(world // tensor // pipeline, 64 if args.seq_length >= 8192 else 1):
                copies = world // tensor // pipeline // context
                if args.global_batch_size % copies:
                    continue
                for expert, expert_tensor in _expert_sizes(arch, tensor, copies * context * tensor):
                    for virtual in _virtual_sizes(layers, pipeline):
                        yield _parallel(
                            arch, tensor, pipeline, context, expert=expert, expert_tensor=expert_tensor, virtual=virtual
                        )


def _expert_sizes(arch: Qwen3Arch, tensor: int, ranks: int) -> list[tuple[int, int]]:
    if not arch.is_moe:
        return [(1, tensor)]
    return [
        (expert, etp)
        for etp in sorted({1, tensor})
        for expert in _divisors(arch.num_experts, ranks // etp)
        if ranks % (expert * etp) == 0
    ]


def _padded(layers: int, pipeline: int) -> int:
    return -(-layers // pipeline) * pipeline


def _virtual_sizes(layers: int, pipeline: int) -> list[int | None]:
    """Layers of a virtual chunk; None: no interleaving."""
    if pipeline == 1:
        return [None]
    per_stage = _padded(layers, pipeline) // pipeline
    # More than four chunks save less time than their messages cost, and each is one more layout to evaluate.
    return [None, *(d for d in _divisors(per_stage, per_stage) if per_stage // 4 <= d < per_stage)]


def _parallel(
    arch: Qwen3Arch,
    tensor: int,
    pipeline: int,
    context: int,
    *,
    expert: int,
    expert_tensor: int,
    virtual: int | None,
) -> ParallelArgs:
    layers = arch.num_hidden_layers
    noop = range(layers, _padded(layers, pipeline))
    heads = arch.num_attention_heads // tensor
    return ParallelArgs(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        num_layers_per_virtual_pipeline_stage=virtual,
        noop_layers=",".join(map(str, noop)) or None,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor if arch.is_moe else None,
        context_parallel_size=context,
        context_parallel_algo="ulysses_cp_algo" if heads % context == 0 else "megatron_cp_algo",
        sequence_parallel=tensor > 1,
    )


def _base_flags(args: PlanArgs) -> PretrainArgs:
    tuned = args.stage != "pt"
    return PretrainArgs(
        model=ModelArgs(model=args.model, hf_dir=args.hf_dir),
        shape=ShapeArgs(max_position_embeddings=args.seq_length),
        parallel=ParallelArgs(),
        overlap=OverlapArgs(),
        runtime=RuntimeArgs(),
        train=TrainArgs(train_iters=1, seq_length=args.seq_length, global_batch_size=args.global_batch_size, bf16=True),
        optimizer=OptimizerArgs(
            lr=1e-5, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=not args.lora_r
        ),
        freeze=FreezeArgs(),
        lora=LoraArgs(lora_r=args.lora_r, qlora=args.qlora, qlora_double_quant=args.qlora_double_quant),
        data=DataArgs(data_path=["DATA"], stage=args.stage, reset_attention_mask=tuned and args.pack),
        record=RecordArgs(),
        tokenizer=TokenizerArgs(),
        instruction=InstructionArgs(),
        checkpoint=CheckpointArgs(),
        exits=ExitArgs(),
        report=ReportArgs(),
        trackers=TrackerArgs(),
        profile=ProfileArgs(),
        watch=WatchArgs(),
        spikes=SpikeArgs(),
        verdict=VerdictArgs(),
        preference=PreferenceArgs(),
    )
