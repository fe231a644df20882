"""Flags of `convert_ckpt.py`."""

from __future__ import annotations

import dataclasses

from qwen3_npu.args.lora import ALL_TARGETS
from qwen3_npu.cli import Foreign, flag
from qwen3_npu.model.arch.families import FAMILIES

HF, MEGATRON = "hf", "mg"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    """what to convert, and where to"""

    load_model_type: str = flag(HF, choices=[HF, MEGATRON], help="format of --load-dir")
    save_model_type: str = flag(MEGATRON, choices=[HF, MEGATRON], help="format to write")
    load_dir: str = flag(metavar="DIR", help="Hugging Face directory, or Megatron checkpoint folder")
    save_dir: str = flag(
        metavar="DIR", help="folder to write; for a folder of Hugging Face weights its subfolder mg2hf/"
    )
    ckpt_step: int | None = flag(
        None, minimum=0, help="iteration of a Megatron checkpoint to read; default: the tracker's"
    )
    model_type_hf: str | None = flag(
        None,
        choices=[name.replace("_", "-") for name in FAMILIES],
        help="checked against the model; optional, since config.json says it",
    )
    add_qkv_bias: bool | None = flag(None, help="q, k and v have a bias (Qwen2.5); checked against the model")
    hf_cfg_dir: str | None = flag(
        None, metavar="DIR", help="config.json and tokenizer files for an HF output; default: those in the checkpoint"
    )
    ignore_args: list[str] | None = flag(
        None,
        metavar="NAME",
        help="arguments in a Megatron checkpoint to ignore: unknown ones of later versions, which are else refused, "
        "if they do not change what the network computes",
    )
    params_dtype: str | None = flag(
        None, choices=["bf16", "fp16", "fp32"], help="dtype to write; default: that of the source"
    )
    ckpt_format: str = flag(
        "torch",
        choices=["torch", "torch_dist"],
        help="format of a Megatron output; that of an input is detected",
    )
    max_shard_size: float = flag(
        5.0, minimum=1e-6, maximum=1e6, unit="GB", help="largest .safetensors file of an HF output"
    )
    jobs: int | None = flag(None, minimum=1, unit="processes", help="files written in parallel; default: CPUs, up to 4")
    resume: bool = flag(False, help="continue a conversion that was interrupted")
    overwrite: bool = flag(False, help="replace an existing output")
    verify: bool = flag(
        False,
        help="afterwards compare output and source on disk, tensor by tensor and bit for bit; exit 1 if they differ",
    )
    verify_only: bool = flag(False, help="write nothing; compare --save-dir with --load-dir as --verify does")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConvertArgs:
    """LoRA: merged into the base, resharded, or exported to PEFT"""

    lora_load: str | None = flag(
        None, metavar="DIR", help="adapter (Megatron checkpoint or PEFT directory) to merge into the base in --load-dir"
    )
    lora_r: int | None = flag(
        None, minimum=1, help="rank, checked against the adapter; without --lora-load: merge the one in --load-dir"
    )
    lora_alpha: float | None = flag(
        None, above=0, help="the adapter is scaled by alpha / r; needed only if its checkpoint has no alpha"
    )
    lora_target_modules: list[str] | None = flag(
        None,
        choices=tuple(ALL_TARGETS),
        help="modules with an adapter, checked against it",
    )
    save_lora_to_hf: bool = flag(False, help="write the adapter alone, as a PEFT directory")
    lora_check: bool = flag(
        True,
        help="after a merge, print the largest difference of logits(base + adapter) and logits(merged): a few tokens "
        "through all layers in float32 on the CPU, a tensor at a time, both sides read from disk",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetArgs:
    """layout of a Megatron output"""

    target_tensor_parallel_size: int = flag(1, minimum=1, unit="ranks", help="ranks that share one layer (TP)")
    target_pipeline_parallel_size: int = flag(1, minimum=1, unit="stages", help="pipeline stages (PP)")
    target_expert_parallel_size: int = flag(1, minimum=1, unit="ranks", help="ranks that share the experts (EP)")
    expert_tensor_parallel_size: int | None = flag(
        None, minimum=1, unit="ranks", help="ranks that share one expert (ETP); default: as TP"
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, minimum=1, unit="layers", help="layers of one model chunk of an interleaved pipeline (VPP)"
    )
    num_layer_list: str | None = flag(None, metavar="N,N,..", help="layers of each pipeline stage, if uneven")
    noop_layers: str | None = flag(
        None, metavar="N,N,..", help="places of no-op layers, e.g. 94,95 to make 96 of 94 layers"
    )
    moe_grouped_gemm: bool = flag(True, help="stack experts in two tensors per layer; --no-: a pair per expert")
    make_vocab_size_divisible_by: int = flag(
        1, minimum=1, unit="rows", help="pad the vocabulary to a multiple of this times TP"
    )
    padded_vocab_size: int | None = flag(
        None, minimum=1, unit="rows", help="rows of the padded vocabulary; default: by --make-vocab-size-divisible-by"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LegacyConvertArgs:
    """MindSpeed-LLM 2.1.0 converter"""

    use_mcore_models: bool = flag(False, help="as in 2.1.0: an HF output goes to <save-dir>/mg2hf")
    model_type: str | None = flag(None, choices=["GPT"], help="as --use-mcore-models")

    @property
    def is_v1(self) -> bool:
        return self.use_mcore_models or self.model_type is not None


_CONFIG = "the architecture comes from config.json"
_TOKENIZER = "tokenizer files are copied, none is loaded"
_ALL_MOE = "every layer of a Qwen3-MoE has experts"

FOREIGN: dict[str, Foreign] = {
    "--spec": Foreign("Qwen3 has one specification", nargs="+"),
    "--transformer-impl": Foreign("one implementation on every device", nargs=1),
    "--tokenizer-model": Foreign(_TOKENIZER, nargs=1),
    "--tokenizer-name-or-path": Foreign(_TOKENIZER, nargs=1),
    "--tokenizer-type": Foreign(_TOKENIZER, nargs=1),
    "--num-layers": Foreign(_CONFIG, nargs=1),
    "--load-hf-from-config": Foreign(_CONFIG),
    "--ckpt-cfg-path": Foreign(_CONFIG, nargs=1),
    "--true-vocab-size": Foreign(_CONFIG, nargs=1),
    "--first-k-dense-replace": Foreign(_ALL_MOE, nargs=1),
    "--moe-layer-freq": Foreign(_ALL_MOE, nargs=1),
    "--mtp-num-layers": Foreign("Qwen3 has no multi-token prediction layers", nargs=1, only=("0",)),
    "--save-layer-by-layer": Foreign("tensors are always written one by one"),
    "--load-checkpoint-loosely": Foreign("a missing or unexpected tensor is always an error"),
    "--use-rotary-position-embeddings": Foreign("Qwen3 always has rotary embeddings"),
    "--add-dense-bias": Foreign("Qwen3 and Qwen2.5 have no such bias", refused=True),
    "--post-norm": Foreign("Qwen3 has no norm after attention and MLP", refused=True),
    "--w-pack": Foreign("Qwen3 has no packed weights", nargs="?", refused=True),
    "--mla-mm-split": Foreign("Qwen3 has no multi-latent attention", refused=True),
    "--moe-tp-extend-ep": Foreign("use --expert-tensor-parallel-size 1", refused=True),
    "--schedules-method": Foreign("the DualPipe layer order is not written", nargs=1, refused=True),
    "--qlora-nf4": Foreign("quantised weights are not written", refused=True),
    "--orm": Foreign("a reward model is recognized without it", refused=True),
    "--load-from-legacy": Foreign("checkpoints of legacy Megatron models are not read", refused=True),
    "--save-to-legacy": Foreign("checkpoints of legacy Megatron models are not written", refused=True),
}
