"""Resume from --load and --lora-load: weights, LoRA adapters, or a complete training state, saved in any layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from qwen3_npu import log
from qwen3_npu.args.lora import FreezeArgs, spelled
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint.binary.dtypes import F32, full
from qwen3_npu.checkpoint.binary.pickles import TensorRef
from qwen3_npu.checkpoint.folders import StoredModel, restore_backup
from qwen3_npu.checkpoint.formats.adapters import SharedA
from qwen3_npu.checkpoint.formats.dist_read import DistReader
from qwen3_npu.checkpoint.formats.huggingface import HfReader
from qwen3_npu.checkpoint.formats.open import Checkpoint, find_whole, reader
from qwen3_npu.checkpoint.formats.peft import PeftReader
from qwen3_npu.checkpoint.formats.torch_read import MegatronReader
from qwen3_npu.checkpoint.mapping.frozen import frozen_weights
from qwen3_npu.checkpoint.mapping.lora import LORA_SCORE
from qwen3_npu.checkpoint.mapping.source import is_lora, listed, read_shard, read_tensor
from qwen3_npu.checkpoint.mapping.table import SCORE
from qwen3_npu.checkpoint.training import optimizer_state
from qwen3_npu.checkpoint.training.compare import check_resumed, check_same_model, model_facts
from qwen3_npu.checkpoint.training.live import Ranks, load_weights, parameters_of, to_torch
from qwen3_npu.checkpoint.training.save import Position, Trained
from qwen3_npu.checkpoint.training.state import DistState, TorchState
from qwen3_npu.distributed.launch import model_rank
from qwen3_npu.errors import UsageError
from qwen3_npu.files import same_folder
from qwen3_npu.model.lora.embedding import LoraEmbedding
from qwen3_npu.model.lora.experts import LoraExperts
from qwen3_npu.model.lora.linear import LoraLinear

AdapterSource = SharedA | Checkpoint


def load(
    trained: Trained, args: CheckpointArgs, lora_load: str | None = None, facts: Mapping[str, object] | None = None
) -> Position:
    """Weights and, when resuming, everything else. Every rank must call this.

    Args:
        lora_load: --lora-load.
        facts: settings of this training, as its checkpoints store them; a resumed training is compared with them.

    Raises:
        UsageError: the folder holds nothing (and is not --save), is damaged, or does not fit the model or its adapter.
    """
    base = _open_base(trained, args)
    adapter = _open_adapter(trained, base, lora_load)
    if adapter is not None:
        load_weights(
            adapter,
            trained.layout,
            model_rank(),
            trained.chunks,
            contents=trained.contents,
            loads=is_lora,
            allow_nonfinite=args.allow_nonfinite_weights,
        )
    if base is not None:
        # What a checkpoint holds beside a PiSSA adapter is what that has left of the weights.
        residual = {} if adapter is base else _residual(trained, is_new=adapter is None)
        load_weights(
            base,
            trained.layout,
            model_rank(),
            trained.chunks,
            contents=trained.contents,
            loads=lambda name: not is_lora(name) and (base.arch.reward or name != SCORE.megatron),
            change=lambda parameter, weight: residual.get(id(parameter), lambda whole: whole)(weight),
            allow_nonfinite=args.allow_nonfinite_weights,
        )
    if trained.contents.lora and adapter is None:
        for module in (module for chunk in trained.chunks for module in chunk.modules()):
            if isinstance(module, LoraLinear | LoraExperts | LoraEmbedding):
                module.begin()
    if trained.contents.arch.reward and adapter is None:
        _take_head(trained, base)
    state = adapter if trained.contents.lora else base
    position = _resume(trained, args, state, facts or {})
    for source in {id(source): source for source in (base, adapter) if source is not None}.values():
        source.close()
    return position


def _residual(trained: Trained, *, is_new: bool) -> dict[int, Callable[[torch.Tensor], torch.Tensor]]:
    """Parameter's id -> a function from the weight to PiSSA's residual; `is_new`: it also initializes the adapter."""
    found: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
    for module in (module for chunk in trained.chunks for module in chunk.modules()):
        if isinstance(module, LoraLinear) and module.from_base:
            found[id(module.base_layer.weight)] = functools.partial(module.residual, is_new=is_new)
        elif isinstance(module, LoraExperts) and module.from_base:
            for which in module.adapted:
                weight = getattr(module, f"weight{which}")
                found[id(weight)] = functools.partial(module.residual, which, is_new=is_new)
    return found


def _open_base(trained: Trained, args: CheckpointArgs) -> Checkpoint | None:
    """The model in --load; None if the weights stay random."""
    lora = trained.contents.lora
    if args.load is None:
        if lora:
            raise UsageError("--lora-r trains an adapter of a given model; give it with --load")
        log.info(f"weights: random ({'--from-scratch' if args.from_scratch else 'no --load'})")
        return None
    opened = _open(args.load, args.ckpt_step, "--load", trained)
    if opened is None:
        starts = args.save is not None and same_folder(args.load, args.save)
        if args.exit_on_missing_checkpoint or not starts or lora:
            raise UsageError(f"--load {args.load} holds no checkpoint and no Hugging Face model")
        log.info(f"weights: random ({args.load} holds no checkpoint yet)")
        return None
    arch = opened.arch.as_reward() if trained.contents.arch.reward else opened.arch
    check_same_model(arch, trained.contents.arch, f"--load {args.load}")
    if isinstance(opened, HfReader):
        opened.check()
    there = opened.contents
    if not there.base:
        raise UsageError(
            f"--load {args.load} holds a LoRA adapter only; give the model it belongs to with --load and this folder "
            f"with --lora-load"
        )
    if there.lora and not lora:
        raise UsageError(
            f"--load {args.load} holds a {there.lora} beside the weights; train on with --lora-r {there.lora.r} "
            f"--lora-alpha {there.lora.alpha:g}, or merge it with convert_ckpt.py"
        )
    log.info(f"weights: {opened.folder} ({opened})")
    return opened


def _take_head(trained: Trained, base: Checkpoint | None) -> None:
    """Load the head of a reward model. Beside an adapter it is trained and has another name than in the base."""
    if base is None or not base.arch.reward:
        log.info("reward head: new, drawn by --seed")
    elif trained.contents.lora:
        parameters = parameters_of(trained.chunks)
        for place in [place for place in parameters if place[1] == LORA_SCORE]:
            held = read_tensor(base, SCORE.hf[0], tuple(parameters[place].shape), F32)
            parameters[place].data.copy_(to_torch(held, F32))


def _open_adapter(trained: Trained, base: Checkpoint | None, lora_load: str | None) -> AdapterSource | None:
    """The source of the LoRA adapter; None if it is new."""
    lora = trained.contents.lora
    if lora is None:
        return None
    adapter: AdapterSource
    if lora_load is None:
        if base is None or base.contents.lora is None:
            log.info("LoRA adapter: new")
            return None
        check_same_model(base.arch, trained.contents.arch, f"--load {base.folder}, which holds an adapter,")
        adapter = base
    else:
        opened = _open(lora_load, None, "--lora-load", trained)
        if opened is None:
            raise UsageError(f"--lora-load {lora_load} holds neither a checkpoint nor a PEFT adapter")
        check_same_model(opened.arch, trained.contents.arch, f"--lora-load {lora_load}")
        if base is not None and base.contents.lora is not None and base.contents.lora.is_residual:
            raise UsageError(
                f"--load {base.folder} holds what PiSSA has left of a model, beside its own adapter: give the model, "
                f"or drop --lora-load {lora_load}"
            )
        if isinstance(opened, PeftReader) and base is not None:
            opened.check_carried(base)
        adapter = SharedA(opened) if isinstance(opened, PeftReader) else opened
    there = adapter.contents.lora
    if there is None:
        raise UsageError(f"--lora-load {lora_load} holds no LoRA adapter")
    if there != lora:
        raise UsageError(
            f"the LoRA adapter to start from is {there}; the flags ask for {lora}: give --lora-r {there.r} "
            f"--lora-alpha {there.alpha:g} --lora-target-modules {spelled(there.targets, there.layers)}"
            f"{' --use-rslora' * there.is_stabilized}{' --no-use-rslora' * (lora.is_stabilized > there.is_stabilized)}"
            f"{' --use-dora' * there.is_dora}{' --no-use-dora' * (lora.is_dora > there.is_dora)}"
            f"{' --lora-init pissa' * there.is_residual}"
            f"{' --lora-init kaiming' * (lora.is_residual > there.is_residual)}"
        )
    if lora_load is not None:
        log.info(f"LoRA adapter: {lora_load}")
    return adapter


def newest_whole(load: str, step: int | None, flag: str = "--load") -> StoredModel | None:
    """The newest complete checkpoint of a folder, also after an interrupted save; None if there is none. Every rank
    must call this."""
    if dist.get_rank() == 0:
        restore_backup(Path(load))
    return find_whole(load, step, peers=Ranks(), flag=flag)


def _open(load: str, step: int | None, flag: str, trained: Trained) -> Checkpoint | None:
    found = newest_whole(load, step, flag)
    if found is None:
        return None
    lora, arch = trained.contents.lora, trained.contents.arch
    return reader(found, lora_alpha=lora.alpha if lora else None, arch=arch, prefer=model_rank())


def _resume(
    trained: Trained, args: CheckpointArgs, source: AdapterSource | None, facts: Mapping[str, object]
) -> Position:
    """Load everything but the weights, if `source` is a training's checkpoint and the training resumes."""
    why, state = None, None
    if args.finetune:
        why = "--finetune"
    elif not isinstance(source, (MegatronReader, DistReader)):
        why = "nothing to resume"
    else:
        state = DistState(source) if isinstance(source, DistReader) else TorchState(source)
        if "opt_param_scheduler" not in state.common:
            why = "the checkpoint has weights only"
    if state is None or why is not None:
        trained.optimizer.reload_model_params()
        log.info(f"training starts at step 0 ({why})")
        return Position()
    if args.load_optim and not state.has_optimizer and _is_foreign(state):
        raise UsageError(
            f"{state.folder} holds the optimizer state of Megatron or MindSpeed-LLM (distrib_optim.pt): only weights "
            f"can be loaded; give --finetune"
        )
    assert source is not None, "`state` is of it"
    saved, model = vars(state.common["args"]), trained.contents.arch
    now = {**facts, **model_facts(model)}
    check_resumed({**saved, **model_facts(source.arch)}, now, args.allow_changed, str(state.folder))
    if args.load_optim:
        fresh = _newly_trained(trained, saved)
        _load_optimizer(trained, state, fresh, allow_nonfinite=args.allow_nonfinite_weights)
    else:
        trained.optimizer.reload_model_params()
    _load_schedule(trained, state.common["opt_param_scheduler"])
    if args.load_rng:
        _load_random(trained, state)
    position = Position(state.common["iteration"], state.common["args"].consumed_train_samples)
    log.info(f"resumed: {state.folder} ({state.layout}) at step {position.iteration}, sample {position.samples}")
    return position


def _is_foreign(state: TorchState | DistState) -> bool:
    """Whether the checkpoint has optimizer state of another program."""
    return "optimizer" in state.common or any(state.folder.rglob("distrib_optim.pt"))


def _load_schedule(trained: Trained, saved: dict[str, Any]) -> None:
    """Take the position from the checkpoint and the schedule from the flags. The log says what changed."""
    trained.scheduler.load_state_dict(saved)
    now = trained.scheduler.state_dict()
    changed = [f"{key} {saved[key]} -> {value}" for key, value in now.items() if key in saved and saved[key] != value]
    if changed:
        log.info(f"schedule: the flags decide, not the checkpoint (steps in samples): {', '.join(changed)}")


_STATE_WORDS = {"param": "float32 weight", "exp_avg": "first moment", "exp_avg_sq": "second moment"}


def _newly_trained(trained: Trained, saved: Mapping[str, Any]) -> frozenset[str]:
    """Hugging Face names of the weights that were frozen when the checkpoint was saved, and are trained now."""
    patterns = {name: saved.get(name) or [] for name in ("freeze_include", "freeze_exclude")}
    found = frozen_weights(trained.contents.arch, FreezeArgs(**patterns)) - trained.frozen
    if found:
        log.warning_once(f"trained from here on, with new moments, since the checkpoint has none: {listed(found)}")
    return found


def _load_optimizer(
    trained: Trained, state: TorchState | DistState, fresh: frozenset[str], *, allow_nonfinite: bool
) -> None:
    """Load the optimizer state. The checkpoint has none of the weights in `fresh`: they start with moments of 0."""
    if not state.has_optimizer:
        raise UsageError(f"{state.folder} was saved without optimizer state; give --no-load-optim or --finetune")
    rank, parameters = model_rank(), parameters_of(trained.chunks)
    sources = {key: state.optimizer(key, trained.optimized, rank) for key in optimizer_state.KEYS}
    wanted = {(shard.chunk, shard.name): shard for shard in trained.optimized.shards(trained.layout, rank)}

    wrong: list[str] = []

    def read(chunk: int, name: str, key: str) -> torch.Tensor:
        shard = wanted[chunk, name]
        if fresh.issuperset(piece.hf for piece in shard.slices):
            weight = parameters[chunk, name].detach().float().cpu()
            return weight if key == "param" else torch.zeros_like(weight)
        tensor = to_torch(read_shard(sources[key], shard, F32), F32)
        if not allow_nonfinite and not tensor.isfinite().all():
            wrong.append(f"the {_STATE_WORDS[key]} of {name}")
        return tensor

    names = optimizer_state.parameter_names(trained.chunks)
    optimizer_state.restore(trained.optimizer, names, state.step, read)
    for source in sources.values():
        source.close()
    # All ranks have read before one of them stops: some of the state travels between them.
    if found := Ranks().first_problem(wrong[0] if wrong else None):
        raise UsageError(
            f"{state.folder} holds optimizer state that is not finite (NaN or infinity): {found}; load an earlier "
            f"checkpoint, or continue with --allow-nonfinite-weights, or with its weights alone: --no-load-optim"
        )


def _load_random(trained: Trained, state: TorchState | DistState) -> None:
    if state.layout != trained.layout:
        log.info(f"random state: new, since the checkpoint's layout is {state.layout}")
        return
    found = state.random(model_rank())
    if found is None:
        raise UsageError(f"{state.folder} was saved without random state; give --no-load-rng or --finetune")
    content, archive = found

    def tensor(ref: TensorRef) -> torch.Tensor:
        return torch.from_numpy(archive.read(ref, ref.shape, full(ref.shape)))

    if tensor(content["cuda_rng_state"]).numel() != torch.cuda.get_rng_state().numel():
        raise UsageError(f"{state.folder} has the random state of another kind of device; give --no-load-rng")
    torch.set_rng_state(tensor(content["torch_rng_state"]))
    torch.cuda.set_rng_state(tensor(content["cuda_rng_state"]))
    tracker = {name: tensor(ref) for name, ref in content["rng_tracker_states"].items()}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)
