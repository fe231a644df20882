"""Flags of the training itself: batch, steps, optimizer, data, checkpoints, reports."""

from __future__ import annotations

import dataclasses

from qwen3_npu.args.preference import PREFERENCE_STAGES
from qwen3_npu.args.rules.resume import REFUSED
from qwen3_npu.cli import flag
from qwen3_npu.errors import UsageError
from qwen3_npu.files import same_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """batch and steps"""

    micro_batch_size: int = flag(1, minimum=1, unit="samples", help="samples per device and forward pass")
    global_batch_size: int | None = flag(
        None,
        minimum=1,
        unit="samples",
        help="samples per optimizer step; default: one micro-batch per data-parallel rank",
    )
    train_iters: int | None = flag(
        None, minimum=0, unit="steps", help="optimizer steps of the whole training; or give one of the next two"
    )
    train_samples: int | None = flag(
        None,
        minimum=1,
        unit="samples",
        help="samples of the whole training; a last incomplete --global-batch-size is dropped",
    )
    epochs: float | None = flag(None, above=0, help="passes over the data; the last step may repeat some samples")
    seq_length: int = flag(4096, minimum=1, unit="tokens", help="tokens of a sample")
    bf16: bool = flag(False, help="weights and activations in bfloat16, optimizer state in float32; default: float32")
    fp32_residual_connection: bool = flag(
        False, help="with --bf16: keep the residual stream in float32, also between pipeline stages"
    )
    attention_dropout: float = flag(0.0, minimum=0, below=1, help="dropout of attention weights")
    hidden_dropout: float = flag(0.0, minimum=0, below=1, help="dropout of the residual branches")
    init_method_std: float = flag(0.02, minimum=0, help="standard deviation of random initial weights")
    recompute_granularity: str | None = flag(
        None, choices=["full", "selective"], help="recompute whole layers, or --recompute-modules of them, in backward"
    )
    recompute_method: str | None = flag(None, choices=["uniform", "block"], help="which layers `full` recomputes")
    recompute_num_layers: int | None = flag(
        None, minimum=1, unit="layers", help="uniform: layers per recomputed group; block: layers to recompute"
    )
    recompute_modules: list[str] = flag(
        ["core_attn"],
        choices=["core_attn", "mlp", "moe", "layernorm"],
        help="what `selective` recomputes; core_attn saves memory with --kernels reference only: the others keep no "
        "scores",
    )
    recompute_activation_function: bool = flag(False, help="recompute the MLP's activation in backward")
    recompute_norm: bool = flag(False, help="recompute the norms before attention and MLP in backward")
    swap_attention: bool = flag(
        False,
        help="keep the activations of attention on the host until backward needs them; with "
        "--recompute-num-layers N the MLP of N layers is recomputed, and attention is not",
    )
    swap_modules: str = flag(
        "self_attention",
        metavar="NAME,NAME,..",
        help="modules of --swap-attention: self_attention, input_layernorm, pre_mlp_layernorm",
    )
    loss_compute_mode: str = flag(
        "default", choices=["default", "chunk"], help="chunk: compute the logits of --loss-chunk-size tokens at a time"
    )
    loss_normalization: str = flag(
        "token",
        choices=["token", "micro-batch"],
        help="a step's loss is the mean over all its supervised tokens, or (as MindSpeed-LLM does without "
        "--calculate-per-token-loss) the mean of its micro-batches' means",
    )
    loss_chunk_size: int = flag(1024, minimum=1, unit="tokens", help="tokens whose logits exist at the same time")
    moe_aux_loss_coeff: float | None = flag(
        None, minimum=0, help="weight of the load-balancing loss; default: config.json's router_aux_loss_coef"
    )
    moe_z_loss_coeff: float | None = flag(None, minimum=0, help="weight of the router's z loss")
    moe_expert_capacity_factor: float | None = flag(
        None,
        above=0,
        help="capacity of an expert, as a multiple of its even share of tokens; tokens above it are "
        "dropped; default: none",
    )
    moe_token_drop_policy: str = flag("probs", choices=["probs", "position"], help="which tokens are dropped first")
    moe_pad_expert_input_to_capacity: bool = flag(False, help="pad every expert's tokens to its capacity")
    moe_router_load_balancing_type: str = flag(
        "aux_loss", choices=["aux_loss", "softmax_topk", "none"], help="softmax_topk and none: no balancing loss"
    )
    moe_token_dispatcher_type: str = flag(
        "alltoall", choices=["alltoall", "alltoall_seq", "allgather"], help="how tokens reach their experts"
    )
    moe_alltoall_overlap_comm: bool = flag(
        False,
        help="send tokens to their experts in up to four pieces: one travels while another is computed",
    )
    moe_zero_memory: str = flag(
        "disable",
        choices=["disable", "level0", "level1"],
        help="level0: compute the experts' first product and activation again in backward; level1: the whole MoE "
        "layer with its exchanges, as --recompute-modules moe",
    )
    moe_router_dtype: str | None = flag(None, choices=["fp32", "fp64"], help="router's dtype; default: the model's")
    manual_gc: bool = flag(False, help="collect Python's garbage at the same steps on all ranks")
    manual_gc_interval: int = flag(0, minimum=0, help="steps between collections; 0: never")

    def __post_init__(self) -> None:
        lengths = {"--train-iters": self.train_iters, "--train-samples": self.train_samples, "--epochs": self.epochs}
        if sum(value is not None for value in lengths.values()) != 1:
            given = [f"{name} {value}" for name, value in lengths.items() if value is not None]
            what = " and ".join(given) or "how long is the training?"
            raise UsageError(f"{what}: give exactly one of {', '.join(lengths)}")
        if self.recompute_granularity == "full" and None in (self.recompute_method, self.recompute_num_layers):
            raise UsageError("--recompute-granularity full needs --recompute-method and --recompute-num-layers")
        if self.recompute_granularity != "full" and not self.swap_attention:
            for name in ("recompute-method", "recompute-num-layers"):
                if getattr(self, name.replace("-", "_")) is not None:
                    raise UsageError(f"--{name} needs --recompute-granularity full or --swap-attention")
        if self.recompute_granularity != "selective" and self.recompute_modules != ["core_attn"]:
            raise UsageError("--recompute-modules needs --recompute-granularity selective")
        if self.fp32_residual_connection and not self.bf16:
            raise UsageError("--fp32-residual-connection needs --bf16; without it everything is in float32")
        if self.moe_pad_expert_input_to_capacity and self.moe_expert_capacity_factor is None:
            raise UsageError("--moe-pad-expert-input-to-capacity needs --moe-expert-capacity-factor")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training. With --train-samples and --epochs they are known once the data are."""
        assert self.train_iters is not None, "training.prepare.length.settled makes steps of samples and epochs"
        return self.train_iters


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerArgs:
    """optimizer and learning rate"""

    optimizer: str = flag(
        "adam",
        choices=["adam", "muon"],
        help="muon: orthogonal updates of the layers' matrices (with LoRA: of adapters' A and B), AdamW for the rest",
    )
    muon_momentum: float = flag(0.95, minimum=0, below=1, help="decay rate of the momentum")
    muon_use_nesterov: bool = flag(False, help="use Nesterov's momentum")
    muon_scale_mode: str = flag(
        "spectral",
        choices=["spectral", "shape_scaling", "unit_rms_norm"],
        help="factor of updates: the square root of the larger side, of max(1, out / in), or of out / in",
    )
    muon_extra_scale_factor: float = flag(
        1.0, above=0, help="further factor; 0.2 with `spectral` gives updates as large as AdamW's, for a shared --lr"
    )
    muon_num_ns_steps: int = flag(5, minimum=1, maximum=99, help="steps of the Newton-Schulz iteration")
    muon_split_qkv: bool = flag(True, help="update queries, keys and values as three matrices, not as one")
    lr: float = flag(minimum=0, help="highest learning rate")
    min_lr: float = flag(0.0, minimum=0, help="lowest learning rate")
    lr_decay_style: str = flag("linear", choices=["constant", "linear", "cosine", "WSD"], help="shape of the decay")
    lr_decay_iters: int | None = flag(None, minimum=1, unit="steps", help="end of the decay; default: --train-iters")
    lr_warmup_iters: int = flag(0, minimum=0, unit="steps", help="linear warm-up")
    lr_decay_samples: int | None = flag(
        None, minimum=1, unit="samples", help="with --train-samples: end of the decay; default: --train-samples"
    )
    lr_warmup_samples: int = flag(0, minimum=0, unit="samples", help="with --train-samples: linear warm-up")
    lr_warmup_fraction: float | None = flag(None, minimum=0, below=1, help="warm-up as a fraction of the decay steps")
    lr_warmup_init: float = flag(0.0, minimum=0, help="learning rate at the start of the warm-up")
    lr_wsd_decay_iters: int | None = flag(None, minimum=1, unit="steps", help="last steps in which WSD decays")
    lr_wsd_decay_style: str = flag(
        "exponential", choices=["exponential", "linear", "cosine", "minus_sqrt"], help="shape of WSD's decay"
    )
    weight_decay: float = flag(0.01, minimum=0, help="decoupled weight decay, of matrices only")
    adam_beta1: float = flag(0.9, minimum=0, below=1, help="decay rate of the first moment")
    adam_beta2: float = flag(0.999, minimum=0, below=1, help="decay rate of the second moment")
    adam_eps: float = flag(1e-8, above=0, help="added to the square root of the second moment")
    clip_grad: float = flag(1.0, minimum=0, help="largest gradient norm; 0: no clipping")
    use_distributed_optimizer: bool = flag(False, help="shard optimizer state over data-parallel ranks (ZeRO-1)")
    reuse_fp32_param: bool = flag(
        False,
        help="keep only the lower halves of float32 weights beside the 16-bit ones: 2 bytes less of each weight's "
        "share; needs --bf16 and --use-distributed-optimizer",
    )
    swap_optimizer: bool = flag(
        False,
        help="keep float32 weights and moments on the host: 12 bytes less of each weight's share on the device (8 "
        "without --bf16); every step copies them to the device and back; needs --use-distributed-optimizer",
    )
    swap_optimizer_times: int = flag(
        16, minimum=1, help="slices of a step of --swap-optimizer; two of them are on the device at a time"
    )
    overlap_grad_reduce: bool = flag(False, help="reduce gradients while backward runs")
    overlap_param_gather: bool = flag(False, help="gather parameters while forward runs")

    def __post_init__(self) -> None:
        warmups = {"--lr-warmup-iters": self.lr_warmup_iters, "--lr-warmup-samples": self.lr_warmup_samples}
        if len(given := [n for n, v in {**warmups, "--lr-warmup-fraction": self.lr_warmup_fraction}.items() if v]) > 1:
            raise UsageError(f"{' and '.join(given)} say the same thing; give one")
        for name, is_on in (("swap-optimizer", self.swap_optimizer), ("reuse-fp32-param", self.reuse_fp32_param)):
            if is_on and not self.use_distributed_optimizer:
                raise UsageError(f"--{name} needs --use-distributed-optimizer")
            if is_on and self.optimizer == "muon":
                raise UsageError(
                    f"--{name} updates weights slice by slice, and --optimizer muon needs whole matrices; drop one of "
                    "the two"
                )
        if self.swap_optimizer and self.reuse_fp32_param:
            raise UsageError("--reuse-fp32-param and --swap-optimizer exclude each other; --swap-optimizer saves more")
        if self.min_lr > self.lr:
            raise UsageError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None:
            raise UsageError("--lr-decay-style WSD needs --lr-wsd-decay-iters")
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise UsageError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")


# What --data-path may hold, and the stages that learn it.
DATA_KINDS = {
    "text": "--stage pt",
    "instruction data": "--stage sft",
    "pairs": "--stage dpo, orpo, simpo or rm",
    "labelled answers": "--stage kto",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataArgs:
    """data"""

    data_path: list[str] = flag(
        metavar="[WEIGHT] PREFIX", help="prefix of a .bin/.idx pair, or several with weights: 0.3 a 0.7 b"
    )
    split: str = flag("969,30,1", metavar="A,B,C", help="shares of documents for training, validation and test")
    stage: str = flag(
        "pt",
        choices=["pt", "sft", *PREFERENCE_STAGES],
        help="pretraining, fine-tuning on instruction data, or learning from preferred answers",
    )
    is_instruction_dataset: bool = flag(False, help="--data-path holds instruction data, as --stage sft says too")
    variable_seq_lengths: bool = flag(
        False,
        names=("--no-pad-to-seq-lengths",),
        help="pad each micro-batch of instruction data to its longest sample, not to --seq-length",
    )
    pad_to_multiple_of: int = flag(
        8, minimum=1, unit="tokens", help="with --variable-seq-lengths: round lengths up to it"
    )
    reset_attention_mask: bool = flag(False, help="attention stays within each document of a sequence")
    reset_position_ids: bool = flag(False, help="positions restart in each document (instruction data: as above)")
    eod_mask_loss: bool = flag(False, help="do not predict the token after the end of a document")
    shuffle: bool = flag(True, help="use instruction data in another order in each epoch")
    data_cache_path: str | None = flag(
        None, metavar="DIR", help="folder of index caches; default: cache/ beside the first prefix"
    )
    tokenizer_name_or_path: str | None = flag(
        None,
        metavar="DIR",
        names=("--tokenizer-model",),
        help="tokenizer folder; its config.json may be the architecture",
    )

    def __post_init__(self) -> None:
        if self.is_instruction and self.eod_mask_loss:
            raise UsageError("--eod-mask-loss is for pretraining text; instruction data say themselves what is learned")
        if self.variable_seq_lengths and self.stage == "pt" and not self.is_instruction:
            raise UsageError("--no-pad-to-seq-lengths is for instruction data (--stage sft); text fills its sequences")

    @property
    def is_preference(self) -> bool:
        return self.stage in PREFERENCE_STAGES

    @property
    def kind(self) -> str:
        """The kind of data that the training reads, one of `DATA_KINDS`."""
        if self.is_preference:
            return "labelled answers" if self.stage == "kto" else "pairs"
        return "instruction data" if self.is_instruction else "text"

    @property
    def is_instruction(self) -> bool:
        return self.stage == "sft" or self.is_instruction_dataset

    @property
    def per_document(self) -> bool:
        """Whether attention stays within the conversations of a pack."""
        return self.reset_attention_mask or self.reset_position_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointArgs:
    """checkpoints"""

    load: str | None = flag(None, metavar="DIR", help="checkpoint folder to start from or to resume")
    from_scratch: bool = flag(
        False,
        help="pretraining from random weights, without --load; with --load and --save naming one folder the training "
        "resumes what it has saved there",
    )
    save: str | None = flag(None, metavar="DIR", help="checkpoint folder to write")
    save_interval: int | None = flag(None, minimum=1, help="steps between checkpoints; the last step is always saved")
    max_failed_saves: int = flag(
        3,
        minimum=0,
        help="number of consecutive checkpoints that may fail (full disk) before the training ends; each is a warning",
    )
    save_total_limit: int | None = flag(
        None, minimum=1, help="number of this training's checkpoints to keep; older ones are deleted; default: all"
    )
    ckpt_format: str = flag("torch", choices=["torch", "torch_dist"], help="format to write; both are read")
    save_per_node: bool = flag(
        False,
        help="--save is a local disk of each node, which other nodes do not see: each gets the complete checkpoint",
    )
    async_save: bool = flag(False, help="copy the state to the host and write it while the training continues")
    save_hf_interval: int | None = flag(
        None, minimum=1, help="steps between Hugging Face directories, each beside a checkpoint in --save"
    )
    enable_mg2hf_convert: bool = flag(False, help="write a Hugging Face directory of the last step")
    hf_save_dir: str | None = flag(
        None, metavar="DIR", help="their folder, as mg2hf_iteration<N>; default: --save, which all nodes must share"
    )
    ckpt_step: int | None = flag(None, minimum=0, unit="steps", help="iteration to load; default: the newest")
    finetune: bool = flag(False, help="load only the weights: step 0, new optimizer, new data order")
    load_optim: bool = flag(True, help="load the optimizer's state")
    load_rng: bool = flag(True, help="load the random generators' state")
    save_optim: bool = flag(True, help="save the optimizer's state")
    save_rng: bool = flag(True, help="save the random generators' state")
    allow_nonfinite_weights: bool = flag(
        False, help="start from weights and optimizer state with NaN or infinite values, too"
    )
    allow_changed: list[str] = flag(
        [],
        choices=list(REFUSED),
        help="resume although these settings differ from the checkpoint's; the position in the data "
        "may then be meaningless",
    )
    exit_on_missing_checkpoint: bool = flag(False, help="an empty --load is an error, not a start from random weights")

    def __post_init__(self) -> None:
        if self.save_per_node and self.save is None:
            raise UsageError("--save-per-node needs --save")
        if (self.save_hf_interval or self.enable_mg2hf_convert) and self.save is None:
            raise UsageError("--save-hf-interval and --enable-mg2hf-convert convert checkpoints; they need --save")
        if self.from_scratch and self.finetune:
            raise UsageError("--from-scratch and --finetune contradict each other: fine-tuning needs weights (--load)")
        if self.from_scratch and self.load is not None and (self.save is None or not same_folder(self.load, self.save)):
            raise UsageError(
                f"--from-scratch and --load {self.load} contradict each other; drop one (--load may only be --save, "
                f"to resume)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitArgs:
    """when to stop early"""

    max_skipped_updates: int = flag(
        10,
        minimum=0,
        unit="steps",
        help="consecutive steps that may be skipped for NaN or Inf in loss or gradients",
    )
    exit_signal_handler: bool = flag(False, help="on SIGTERM or SIGUSR1 save a checkpoint and end")
    exit_duration_in_mins: float | None = flag(None, minimum=0, unit="min", help="save and end after this time")
    exit_interval: int | None = flag(None, minimum=1, unit="steps", help="save and end at the next multiple of it")
