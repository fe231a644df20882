"""Write Megatron checkpoints: what every one holds (`Target`), and the files of the torch format.

Conversions and trainings write them, one file or two for each model rank; `dist_write.py` writes the other format.

<iteration>/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt   weights, args, and in a training schedule and random state
                                  /optimizer.pt         in a training: float32 weights and moments, as its parameters
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import F32, DType, widest
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile
from qwen3_npu.checkpoint.binary.torch_zip_write import PtWriter, Tensor
from qwen3_npu.checkpoint.formats.torch_read import OPTIMIZER, WEIGHTS
from qwen3_npu.checkpoint.mapping.lora import Lora
from qwen3_npu.checkpoint.mapping.source import OWN_DTYPES, Contents, FileJob, Item, Stored, is_lora
from qwen3_npu.checkpoint.mapping.table import Shard
from qwen3_npu.distributed.layout import Layout, Rank, single_layout
from qwen3_npu.files import Seal
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.arch.megatron import to_megatron

ITERATION = 1  # of a converted checkpoint, as MindSpeed-LLM writes it: loaders treat 0 and "release" specially
CHECKPOINT_VERSION = 3.0  # Megatron's checkpoint_version
STATES = ("param", "exp_avg", "exp_avg_sq")  # of each trained parameter: float32 weight and moments


def to_args(arch: Qwen3Arch, layout: Layout, dtype: DType) -> dict[str, object]:
    """Megatron's argument names and values for this model in this layout.

    Megatron's loader compares num_layers, hidden_size, num_attention_heads, add_position_embedding and the parallel
    sizes; MindSpeed-LLM's converters read the rest.
    """
    noop = layout.noop_layers
    uneven = len({len(chunk) for stage in layout.chunks for chunk in stage}) > 1
    args: dict[str, object] = {
        "num_layers": layout.num_layers,
        **to_megatron(arch),
        "padded_vocab_size": layout.padded_vocab_size,
        "make_vocab_size_divisible_by": 1,
        "tokenizer_type": "PretrainedFromHF",
        "transformer_impl": "local",
        "params_dtype": dtype,
        "bf16": dtype.torch == "bfloat16",
        "fp16": dtype.torch == "float16",
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "num_layers_per_virtual_pipeline_stage": len(layout.chunks[0][0]) if layout.virtual > 1 else None,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "context_parallel_size": 1,
        "noop_layers": ",".join(map(str, noop)) if noop else None,
        "num_layer_list": ",".join(str(len(stage[0])) for stage in layout.chunks) if uneven else None,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    if arch.is_moe:
        args["moe_grouped_gemm"] = layout.stacked_experts
    return args


def lora_args(lora: Lora) -> dict[str, object]:
    """The arguments that describe the LoRA tensors of a checkpoint."""
    said = {"lora_r": lora.r, "lora_alpha": lora.alpha, "lora_target_modules": list(lora.targets)}
    if lora.layers:
        said["lora_layers"] = {target: list(layers) for target, layers in lora.layers}
    if lora.is_dora:
        said["use_dora"] = True
    if lora.is_residual:
        said["lora_init"] = "pissa"
    return said | ({"use_rslora": True} if lora.is_stabilized else {})


@dataclasses.dataclass(frozen=True)
class Target:
    """A Megatron checkpoint to be written, in any format.

    Attributes:
        dtype, lora_dtype: of the model's weights, and of LoRA tensors.
        trained: content of every file of a training beside its tensors: args, iteration, schedule.
        kept: Hugging Face (and PEFT) names of the tensors that have another dtype. A tensor that is joined from several
            tensors has the smallest dtype that holds the values of all.
        prompts: entries of the args that tell how the prompts of a training were written.
        own: `kept` before torch_dist made the dtypes of all layers equal; the way back gives each tensor its own dtype.
    """

    contents: Contents
    layout: Layout
    dtype: DType
    lora_dtype: DType
    trained: Mapping[str, object] | None = None
    kept: Mapping[str, DType] = dataclasses.field(default_factory=dict)
    own: Mapping[str, DType] = dataclasses.field(default_factory=dict)
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def common(self) -> Mapping[str, Any]:
        """The content of every file beside its tensors."""
        if self.trained is not None:
            return self.trained
        dtype = self.dtype if self.contents.base else self.lora_dtype
        args = to_args(self.contents.arch, self.layout, dtype) | {"iteration": ITERATION, **self.prompts}
        if self.contents.lora:
            args |= lora_args(self.contents.lora)
        if own := self._narrowed():
            args[OWN_DTYPES] = own
        return {"args": argparse.Namespace(**args), "checkpoint_version": CHECKPOINT_VERSION, "iteration": ITERATION}

    def dtype_of(self, shard: Shard) -> DType:
        usual = self._usual(shard)
        return widest(self.kept.get(piece.hf, usual) for piece in shard.slices) if self.kept else usual

    def _whole(self) -> Iterator[Shard]:
        """The tensors of an unsharded model."""
        layout = dataclasses.replace(single_layout(self.contents.arch), stacked_experts=self.layout.stacked_experts)
        return self.contents.shards(layout, Rank(0, 0, 0, 0))

    def _usual(self, shard: Shard) -> DType:
        return self.lora_dtype if is_lora(shard.name) else self.dtype

    def _narrowed(self) -> dict[str, list[str]]:
        """Dtype -> names of the tensors that have it and are stored in a wider one."""
        found: dict[str, dict[str, None]] = {}
        for shard in self._whole() if self.own else ():
            stored = self.dtype_of(shard)
            for piece in shard.slices:
                own = self.own.get(piece.hf, self._usual(shard))
                if own is not stored and not piece.padding:
                    found.setdefault(own.torch, {})[piece.hf] = None
        return {dtype: list(names) for dtype, names in found.items()}

    def joined(self) -> list[str]:
        """Tensors made of several dtypes, in an unsharded model."""
        shards = self._whole() if self.kept else ()
        return [s.name for s in shards if len({self.kept.get(p.hf, self._usual(s)) for p in s.slices}) > 1]


@dataclasses.dataclass(frozen=True)
class RankState:
    """What one rank of a training saves. A conversion saves the weights of all shards and nothing else.

    Attributes:
        held: "" and `STATES` -> (chunk, name) -> dtype of the tensors that are here.
        step: optimizer steps made.
        random: states of the random generators, with `Tensor`s in place of tensors; None: not saved.
        random_data: the data of those.
    """

    held: Mapping[str, Mapping[tuple[int, str], DType]]
    step: int = 0
    random: Any = None
    random_data: tuple[np.ndarray, ...] = ()


class MegatronWriter(Protocol):
    """A module that writes a Megatron format, for conversions and trainings."""

    def jobs(self, target: Target, rank: Rank, state: RankState | None = None) -> list[FileJob]:
        """The files of one rank; with `state`, of a training's."""

    def finish(self, target: Target, stage: Path, notes: list[Any]) -> dict[str, Seal]:
        """Make the files that belong to all ranks, from the notes of all files."""


def jobs(target: Target, rank: Rank, state: RankState | None = None) -> list[FileJob]:
    """The files of one rank. `state` is given by trainings only."""
    found: list[FileJob] = [RankWeightFile(target, rank, state)]
    if state is not None and state.held.keys() & STATES:
        found.append(StateFile(target, rank, state))
    return found


def finish(target: Target, stage: Path, notes: list[object]) -> dict[str, Seal]:
    """Files that belong to all ranks: none."""
    return {}


@dataclasses.dataclass(frozen=True)
class _RankFile:
    """A file of one rank; see `FileJob`."""

    target: Target
    rank: Rank
    state: RankState | None
    file: ClassVar[str]

    @property
    def name(self) -> str:
        return f"{self.target.layout.folder(self.rank)}/{self.file}"

    def _held(self, key: str) -> list[tuple[Shard, DType]]:
        """The rank's tensors of a kind ("": weights), chunk by chunk: the order in which the file announces them."""
        shards = sorted(self.target.contents.shards(self.target.layout, self.rank), key=lambda shard: shard.chunk)
        if self.state is None:
            return [(s, self.target.dtype_of(s)) for s in shards]
        held = self.state.held[key]
        return [(s, held[s.chunk, s.name]) for s in shards if (s.chunk, s.name) in held]


class RankWeightFile(_RankFile):
    """One rank's `model_optim_rng.pt`."""

    file = WEIGHTS

    def _key(self, chunk: int) -> str:
        return "model" if self.target.layout.virtual == 1 else f"model{chunk}"

    def items(self) -> list[Item]:
        return [Item(f"{self._key(s.chunk)}.{s.name}", s, dtype) for s, dtype in self._held("")]

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> tuple[Seal, object]:
        models: dict[str, dict[str, Tensor]] = {self._key(chunk): {} for chunk in range(self.target.layout.virtual)}
        for _, shard, dtype, _ in self.items():
            models[self._key(shard.chunk)][shard.name] = Tensor(dtype, shard.shape)
        content = {**self.target.common, **models}
        last: tuple[np.ndarray, ...] = ()
        if self.state is not None and self.state.random is not None:
            content["rng_state"], last = self.state.random, self.state.random_data
        return write_archive(path, content, itertools.chain(tensors, last)), None

    def stored(self, path: Path) -> dict[str, Stored]:
        file = PtFile(path)
        file.close()
        models = {key: value for key, value in file.content.items() if key.startswith("model")}
        return {
            f"{key}.{name}": Stored(ref.dtype, ref.shape)
            for key, model in models.items()
            for name, ref in model.items()
        }


class StateFile(_RankFile):
    """One rank's `optimizer.pt`, of a training."""

    file = OPTIMIZER

    def items(self) -> list[Item]:
        return [Item(f"{key}.{s.chunk}.{s.name}", s, F32, key) for key in STATES for s, _ in self._held(key)]

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> tuple[Seal, object]:
        held: dict[str, dict[int, dict[str, Tensor]]] = {key: {} for key in STATES}
        for _, shard, dtype, key in self.items():
            held[key].setdefault(shard.chunk, {})[shard.name] = Tensor(dtype, shard.shape)
        assert self.state is not None
        return write_archive(path, {"step": self.state.step, "state": held}, tensors), None

    def stored(self, path: Path) -> dict[str, Stored]:
        raise AssertionError("a conversion writes none")


def write_archive(path: Path, content: Mapping[str, object], tensors: Iterator[np.ndarray]) -> Seal:
    """A torch archive: plain data with `Tensor`s in it, and the data of these in order; flushed to disk."""
    writer = PtWriter(path, dict(content))
    for data in tensors:
        writer.write(data)
    seal = writer.close()
    assert seal is not None
    return seal
