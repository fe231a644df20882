"""Flags of `inference.py`; `evaluation.py` shares those of model and prompts."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import typing

from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.model import ModelArgs, ShapeArgs
from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs
from qwen3_npu.args.preprocess import THINKING
from qwen3_npu.cli import Foreign, flag, option
from qwen3_npu.errors import UsageError

DEFAULT_PROMPT = "how are you?"  # MindSpeed-LLM v2.1.0's
_OPEN = "default: generation_config.json's, else"
GENERATION_TASKS = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat", "score")


API_KEY = "QWEN3_NPU_API_KEY"
SERVE_CONTEXT = 4096  # tokens that a slot holds
PREFILL_TOKENS = 4096  # tokens of new prompts in one pass; a longer prompt has a pass of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightArgs:
    """weights"""

    load: str = flag(
        metavar="DIR", help="Hugging Face model, or Megatron checkpoint (torch or torch_dist) of any layout"
    )
    ckpt_step: int | None = flag(None, minimum=0, unit="steps", help="iteration to load; default: the newest")
    lora_load: str | None = flag(None, metavar="DIR", help="LoRA adapter to merge: PEFT, or a Megatron checkpoint")
    lora_alpha: float | None = flag(None, above=0, help="of an adapter whose checkpoint does not say it")
    allow_nonfinite_weights: bool = flag(False, help="run weights with NaN or infinite values, too")
    bf16: bool = flag(False, help="weights and activations in bfloat16; default: float32")
    use_kv_cache: bool = flag(True, help="keep keys and values between tokens")
    prefix_cache: bool = flag(True, help="compute the beginning that prompts share only once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptArgs:
    """prompts"""

    tokenizer_name_or_path: str | None = flag(
        None, metavar="DIR", names=("--tokenizer-model",), help="tokenizer folder; default: --load or --hf-dir"
    )
    prompt_type: str | None = flag(
        None,
        choices=["auto", "none", "qwen", "qwen3", "hf"],
        help="write prompts as conversations: as MindSpeed-LLM's templates of that name, or as the tokenizer's own "
        "chat template (hf); auto: as the checkpoint was trained, else hf if the tokenizer has one, else qwen3; none: "
        "plain text; default: as the checkpoint was trained, else plain text (a chat: auto)",
    )
    hf_chat_template: bool = flag(False, help="the same as --prompt-type hf")
    plain_text: bool = flag(False, names=("--no-chat-template",), help="the same as --prompt-type none")
    enable_thinking: str | None = flag(
        None,
        choices=list(THINKING),
        help="whether the model may think before it answers; none: as the template has it by default; default: as the "
        "checkpoint was trained",
    )
    system: str = flag("", help="system message of conversations")

    def __post_init__(self) -> None:
        if self.hf_chat_template and self.prompt_type not in (None, "hf"):
            raise UsageError(f"--hf-chat-template and --prompt-type {self.prompt_type} name two templates; give one")
        if self.plain_text and (self.hf_chat_template or self.prompt_type not in (None, "none")):
            other = "--hf-chat-template" if self.hf_chat_template else f"--prompt-type {self.prompt_type}"
            raise UsageError(f"--no-chat-template and {other} contradict each other; give one")

    @property
    def template_given(self) -> str | None:
        """The template that the flags name; None if they name none."""
        return "hf" if self.hf_chat_template else "none" if self.plain_text else self.prompt_type

    @property
    def template(self) -> str | None:
        """The template of prompts; None for plain text."""
        given = self.template_given
        return None if given == "none" else given

    @property
    def thinking(self) -> bool | None:
        """--enable-thinking as a value."""
        return THINKING[self.enable_thinking or "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """generation"""

    task: list[str] = flag(
        ["greedy"],
        choices=GENERATION_TASKS,
        help="tasks, in this order; score: rate the answers of --predict-data (reward models)",
    )
    prompt: list[str] | None = flag(
        None, metavar="TEXT", help=f'prompts; without any, and without --predict-data: "{DEFAULT_PROMPT}"'
    )
    predict_data: str | None = flag(
        None, metavar="TEXT|FILE", help="a prompt, or a file of them: one a line, or .jsonl with prompt or messages"
    )
    predict_batch_size: int = flag(
        8, minimum=1, unit="sequences", help="prompts that each copy of the model processes at the same time"
    )
    max_new_tokens: int = flag(128, minimum=1, unit="tokens", help="longest answer")
    temperature: float | None = flag(None, minimum=0, help=f"logits are divided by it when sampling; {_OPEN} 0.7")
    top_k: int | None = flag(None, minimum=0, unit="tokens", help=f"sample among the likeliest; 0: all; {_OPEN} 50")
    top_p: float | None = flag(
        None,
        above=0,
        maximum=1,
        help=f"sample among the likeliest whose probabilities add up to it; 1: all; {_OPEN} 0.95",
    )
    num_beams: int = flag(4, minimum=1, unit="beams", help="sequences that a beam search follows")
    length_penalty: float = flag(
        1.0, minimum=-10, maximum=10, help="beams are ranked by log-likelihood / length to this power"
    )
    repetition_penalty: float | None = flag(
        None, above=0, help=f"logits of tokens that occurred are reduced by this factor; {_OPEN} 1"
    )
    stop: list[str] | None = flag(None, metavar="TEXT", help="texts that end an answer (they are not part of it)")
    stream: bool = flag(False, help="print answers while they are generated, one prompt after the other")
    history_turns: int = flag(3, minimum=0, unit="turns", help="questions and answers that a chat remembers")
    hide_thinking: bool = flag(False, help="do not show the model's thoughts in a chat; default: dimmed")
    output_dir: str = flag(
        ".", metavar="DIR", help="folder of text_generation_result.jsonl and .txt, and reward_result.jsonl"
    )
    resume: bool = flag(True, help="continue a run that was interrupted")

    def __post_init__(self) -> None:
        if "score" in self.task and (len(self.task) > 1 or self.prompt or not self.predict_data):
            raise UsageError("--task score stands alone and reads the answers of a file: give it with --predict-data")
        sampled = [task for task in self.task if task in ("do_sample", "beam_search_with_sampling")]
        if sampled and self.temperature == 0:
            raise UsageError(f"--task {sampled[0]} needs --temperature above 0; --task greedy has none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeArgs:
    """serving"""

    serve: bool = flag(False, help="answer requests of OpenAI's API over HTTP until Ctrl-C, instead of --task")
    serve_host: str = flag(
        "127.0.0.1", metavar="HOST", help="address to listen on; one beyond this machine needs --serve-api-key"
    )
    serve_port: int = flag(8000, minimum=0, maximum=65535, help="port to listen on; 0: a free one, which is printed")
    serve_api_key: str | None = flag(
        None,
        metavar="TEXT",
        help=f"token that requests must carry (Authorization: Bearer ..); default: the variable {API_KEY}, which "
        "other users of the machine cannot read from the command line",
    )
    serve_model_name: str | None = flag(None, metavar="TEXT", help="name in requests; default: --load's folder")
    serve_context: int | None = flag(
        None,
        minimum=2,
        unit="tokens",
        help=f"longest prompt with its answer; the cache is allocated at the start: --predict-batch-size slots of so "
        f"many; default: {SERVE_CONTEXT}, or the model's positions if it has fewer",
    )

    def __post_init__(self) -> None:
        for name in ("serve_host", "serve_port", "serve_api_key", "serve_model_name", "serve_context"):
            default = next(f.default for f in dataclasses.fields(self) if f.name == name)
            if not self.serve and getattr(self, name) != default:
                raise UsageError(f"{option(name)} says how to serve; give --serve, too, or drop the flag")
        key = self.api_key
        if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
            raise UsageError(f"--serve-api-key (or {API_KEY}) must be printable ASCII without spaces, and not empty")
        if not self.is_local and key is None:
            raise UsageError(
                f"--serve-host {self.serve_host} lets other machines in; give a token with --serve-api-key or "
                f"{API_KEY}, or listen on 127.0.0.1"
            )

    @property
    def api_key(self) -> str | None:
        """The token that requests must carry; None if they need none."""
        given = self.serve_api_key if self.serve_api_key is not None else os.environ.get(API_KEY)
        return given if self.serve else None

    @property
    def is_local(self) -> bool:
        """Whether --serve-host can be reached from this machine only."""
        try:
            return ipaddress.ip_address(self.serve_host).is_loopback
        except ValueError:
            return self.serve_host == "localhost"


class InferenceArgs(typing.NamedTuple):
    """The groups of flags."""

    model: ModelArgs
    shape: ShapeArgs
    parallel: ParallelArgs
    runtime: RuntimeArgs
    weights: WeightArgs
    prompts: PromptArgs
    generate: GenerateArgs
    serve: ServeArgs = ServeArgs()

    @property
    def scores(self) -> bool:
        """Whether the model computes rewards and generates no text."""
        return self.generate.task == ["score"]

    @property
    def output_dir(self) -> str | None:
        """Folder of the results; None if none are written."""
        return None if self.serve.serve else self.generate.output_dir

    def check(self) -> None:
        """Raises: UsageError: --serve is combined with a flag for --task."""
        if self.serve.serve:
            for field in dataclasses.fields(self.generate):
                default = field.default if field.default is not dataclasses.MISSING else ["greedy"]
                if field.name not in _SERVED and getattr(self.generate, field.name) != default:
                    raise UsageError(
                        f"{option(field.name)}: --serve does no --task, and requests say the rest; drop one of the two"
                    )


GROUPS = tuple(typing.get_type_hints(InferenceArgs).values())
# Flags of generation that --serve has, too: defaults for what a request does not say, and the number of slots.
_SERVED = ("predict_batch_size", "temperature", "top_k", "top_p", "repetition_penalty")

_TRAINED = "nothing is trained"
_LORA = "the adapter's tensors say it"
_FOUND = "the folder shows it"

SHARED_FOREIGN: dict[str, Foreign] = {
    **FOREIGN_TRAINING,
    "--reuse-fp32-param": Foreign(_TRAINED),
    "--swap-optimizer": Foreign(_TRAINED),
    "--swap-optimizer-times": Foreign(_TRAINED, nargs=1),
    "--moe-zero-memory": Foreign("nothing is kept for backward", nargs=1),
    "--micro-batch-size": Foreign("--predict-batch-size and --evaluation-batch-size are the sizes here", nargs=1),
    "--global-batch-size": Foreign(_TRAINED, nargs=1),
    "--train-iters": Foreign(_TRAINED, nargs=1),
    "--lr": Foreign(_TRAINED, nargs=1),
    "--seq-length": Foreign("the cache is as long as the prompts and answers need", nargs=1),
    "--max-length": Foreign("--max-new-tokens limits answers, the model's positions everything", nargs=1),
    "--attention-dropout": Foreign(_TRAINED, nargs=1),
    "--hidden-dropout": Foreign(_TRAINED, nargs=1),
    "--init-method-std": Foreign(_TRAINED, nargs=1),
    "--no-load-optim": Foreign(_TRAINED),
    "--no-load-rng": Foreign(_TRAINED),
    "--finetune": Foreign(_TRAINED),
    "--use-distributed-optimizer": Foreign(_TRAINED),
    "--moe-aux-loss-coeff": Foreign(_TRAINED, nargs=1),
    "--moe-router-load-balancing-type": Foreign(_TRAINED, nargs=1),
    "--moe-token-dispatcher-type": Foreign("tokens reach their experts by alltoall", nargs=1),
    "--moe-alltoall-overlap-comm": Foreign("the exchange of experts hides behind products in training only"),
    "--moe-fb-overlap": Foreign("there is no backward pass"),
    "--ckpt-format": Foreign(_FOUND, nargs=1),
    "--exit-on-missing-checkpoint": Foreign("a missing checkpoint is always an error"),
    "--lora-r": Foreign(_LORA, nargs=1),
    "--lora-target-modules": Foreign(_LORA, nargs="+"),
    "--lora-dropout": Foreign(_LORA, nargs=1),
    "--lora-fusion": Foreign("adapters are merged into the weights when they are loaded"),
    "--lora-ckpt-filter": Foreign(_FOUND),
    "--max-tokens-to-oom": Foreign("the cache is allocated before the first token", nargs=1),
    "--inference-max-requests": Foreign("--predict-batch-size is the number", nargs=1),
}

FOREIGN: dict[str, Foreign] = {
    **SHARED_FOREIGN,
    "--add-eos-token": Foreign("prompts are not ended", nargs="*"),
    "--return-output-log-probs": Foreign("log-probabilities are always in the .jsonl"),
}
