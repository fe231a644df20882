"""Flags of Megatron and MindSpeed-LLM training scripts that change nothing here, each with the reason."""

from __future__ import annotations

from qwen3_npu.cli import Foreign

_QWEN3 = "Qwen3 is always built so"
_KERNELS = "--kernels chooses the implementation"
_ALWAYS = "always on"
# The speed-ups are those that MindSpeed's documents of these flags state; the shares are those of docs/planning.md.
_PIECES = "ATB's kernels are not used: products run in pieces (--coc-parallel-num); --use-ascend-mc2 uses torch_npu's"
_BUFFERS = "Transformer Engine's buffers are not used"
_PERMUTATION = "the exchange of sizes always overlaps the permutation; --moe-alltoall-overlap-comm hides the tokens'"
_GATHER = (
    "gathering tokens is not overlapped, 8 % of a step of the 30B at EP8 by the plan; --moe-alltoall-overlap-comm "
)
_GATHER += "leaves 2 % with --moe-token-dispatcher-type alltoall"
_ALL_MOE = "every layer of a Qwen3-MoE has experts"
_SPECS = tuple(f"mindspeed_llm.tasks.models.spec.{name}_spec layer_spec" for name in ("qwen3", "qwen2", "qwen25"))
_MIGRATION = "it is MindFormers'; docs/migration.md has the command here"
_EXPERTS = "experts are always stacked and multiplied together"

FOREIGN_TRAINING: dict[str, Foreign] = {
    # flags that repeat the architecture
    "--use-mcore-models": Foreign("there is no other implementation"),
    "--spec": Foreign("Qwen3 has one specification, and code from elsewhere is not loaded", nargs="+", only=_SPECS),
    "--transformer-impl": Foreign("there is no other implementation", nargs=1),
    "--model-type-hf": Foreign("config.json says it", nargs=1),
    "--group-query-attention": Foreign(_QWEN3),
    "--swiglu": Foreign(_QWEN3),
    "--disable-bias-linear": Foreign(_QWEN3),
    "--use-rotary-position-embeddings": Foreign(_QWEN3),
    "--normalization": Foreign("Qwen3 has RMSNorm", nargs=1, only=("RMSNorm",)),
    "--rotary-percent": Foreign("Qwen3 rotates whole heads", nargs=1, only=("1", "1.0")),
    "--moe-layer-freq": Foreign(_ALL_MOE, nargs=1, only=("-1", "1")),
    "--first-k-dense-replace": Foreign(_ALL_MOE, nargs=1, only=("-1", "0")),
    "--post-norm": Foreign("Qwen3 has no norm after attention and MLP", refused=True),
    "--override-opt_param-scheduler": Foreign("the flags always say what the schedule is"),
    "--override-opt-param-scheduler": Foreign("the flags always say what the schedule is"),
    "--use-checkpoint-opt_param-scheduler": Foreign("the flags always say what the schedule is", refused=True),
    "--use-checkpoint-opt-param-scheduler": Foreign("the flags always say what the schedule is", refused=True),
    "--muon-tp-mode": Foreign(
        "matrices are gathered, so that the layout changes nothing", nargs=1, only=("duplicated",)
    ),
    "--muon-fp32-matmul-prec": Foreign("the iteration has the weights' dtype", nargs=1),
    "--muon-no-split-qkv": Foreign("it is --no-muon-split-qkv here", refused=True),
    # kernels and numerics
    "--use-flash-attn": Foreign(_KERNELS),
    "--use-fused-rmsnorm": Foreign(_KERNELS),
    "--use-fused-swiglu": Foreign(_KERNELS),
    "--use-fused-rotary-pos-emb": Foreign(_KERNELS),
    "--use-fused-ring-attention-update": Foreign(_KERNELS),
    "--use-fused-moe-token-permute-and-unpermute": Foreign(_KERNELS),
    "--moe-permute-fusion": Foreign(_KERNELS),
    "--no-masked-softmax-fusion": Foreign(_KERNELS),
    "--use-fusion-attn-v2": Foreign(_KERNELS),
    "--no-gradient-accumulation-fusion": Foreign("gradients are accumulated in float32 without it"),
    "--gemm-gradient-accumulation-fusion": Foreign("gradients are accumulated in float32 without it"),
    "--no-bias-swiglu-fusion": Foreign(_KERNELS),
    "--enable-hf2mg-convert": Foreign("--load takes a Hugging Face directory as it is"),
    "--mg-save-dir": Foreign("--load takes a Hugging Face directory as it is, nothing is converted", nargs=1),
    "--calculate-per-token-loss": Foreign("it is the default; --loss-normalization chooses"),
    "--lora-modules-to-save": Foreign("only adapters are trained; without --lora-r everything is", "+", refused=True),
    "--lora-register-forward-hook": Foreign("no hook is needed", nargs="+"),
    "--lora-fusion": Foreign("adapters are always fused into the last matrix multiplication"),
    "--attention-softmax-in-fp32": Foreign(_ALWAYS),
    "--attention-mask-type": Foreign("attention is causal, within documents where they are packed", nargs=1),
    "--initial-loss-scale": Foreign("bfloat16 needs no loss scale", nargs=1),
    "--fp16": Foreign("float16 training is not offered; use --bf16", refused=True),
    "--moe-grouped-gemm": Foreign(_EXPERTS),
    "--moe-permutation-async-comm": Foreign(_PERMUTATION),
    "--moe-allgather-overlap-comm": Foreign(_GATHER),
    "--coc-fused-kernel": Foreign(_PIECES),
    "--tp-comm-overlap-cfg": Foreign(_BUFFERS, nargs=1),
    "--tp-comm-overlap-rs-dgrad": Foreign(_BUFFERS),
    "--tp-comm-bootstrap-backend": Foreign(_BUFFERS, nargs=1),
    "--use-cp-send-recv-overlap": Foreign("sends and receives of a ring are always overlapped"),
    # running
    "--profile-data-simplification": Foreign("traces are written as they are"),
    "--no-shared-storage": Foreign(
        "each node makes missing data caches; --save must be shared by all nodes, or give --save-per-node"
    ),
    "--distributed-backend": Foreign("--device chooses it", nargs=1),
    "--disable-gloo-group": Foreign("gloo distributes the optimizer's state when a training is resumed"),
    "--log-throughput": Foreign(_ALWAYS),
    "--tokenizer-type": Foreign("Hugging Face tokenizers only", nargs=1),
    "--tokenizer-padding-side": Foreign("padding is on the right", nargs=1, only=("right",)),
    "--padded-samples": Foreign("epochs are concatenated without padding"),
    "--full-shuffle-instruction-dataset": Foreign("each epoch has another order"),
    "--tokenizer-not-use-fast": Foreign("the fast tokenizer is always used"),
    "--workers": Foreign("raw data are preprocessed on all CPUs", nargs=1),
    "--use_parallel": Foreign(_MIGRATION, nargs="?", refused=True),
    "--run_mode": Foreign(_MIGRATION, nargs=1, refused=True),
    "--auto_trans_ckpt": Foreign(_MIGRATION, nargs="?", refused=True),
    "--num-workers": Foreign("samples are read from memory-mapped files without workers", nargs=1),
    "--no-create-attention-mask-in-dataloader": Foreign("no mask of size [sequence, sequence] is made"),
}
