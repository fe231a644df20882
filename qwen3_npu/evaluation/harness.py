"""The model `qwen3-npu` of lm-evaluation-harness: all tasks of the harness, computed by this project's engine.

    torchrun --nproc-per-node 8 -m qwen3_npu.evaluation.harness --model qwen3-npu --tasks hellaswag,arc_easy \\
        --model_args load=ckpt/qwen3_14b,bf16=true,tensor-model-parallel-size=8

`--model_args` are flags of inference.py; everything else is lm_eval's own command line. Every process runs the same
tasks in any layout (copies of the model take different requests); the first one prints and writes. Tokens, truncation
and stop texts are as in the harness' model `hf`: https://github.com/EleutherAI/lm-evaluation-harness (lm_eval 0.4).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from qwen3_npu import cli, log
from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs
from qwen3_npu.data.text.conversation import Message
from qwen3_npu.distributed import environment
from qwen3_npu.errors import UsageError

if TYPE_CHECKING:
    from qwen3_npu.inference.sampling import Sampling

_GROUP = 200  # contexts that share so many first characters are computed together
_DEFAULT_ANSWER = 256  # tokens, as the harness' `hf`
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


class Qwen3Harness(TemplateLM):
    """A model that is loaded as in inference.py.

    Args:
        batch_size: number of answers that are generated at the same time.
        device: "npu", "cuda" or "cpu"; default: the best available.
        flags: flags of inference.py without the leading dashes; `_` and `-` are equal.

    Raises:
        UsageError: a flag is unknown or does not fit.
    """

    def __init__(
        self,
        batch_size: int | str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **flags: object,
    ) -> None:
        super().__init__()
        if batch_size is not None and not str(batch_size).isdecimal():
            raise UsageError(f"--batch_size {batch_size}: a number is expected; passes are made up by tokens anyhow")
        argv = _words({**flags, **({"device": device} if device else {})})
        self.args = args = InferenceArgs(*cli.parse("--model_args", "", GROUPS[:-1], FOREIGN, argv=argv).groups)
        from qwen3_npu.inference.plan import plan_inference

        world_size = environment.ranks()[1]
        self.plan = plan_inference(
            args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=world_size
        )
        for line in self.plan.describe(args.weights):
            log.info(line)
        self.slots = int(batch_size or 0) or args.generate.predict_batch_size
        self.stack = contextlib.ExitStack()
        self._open()

    def _open(self) -> None:
        from qwen3_npu.platform import select_platform

        platform = select_platform(self.args.runtime.device)
        platform.activate()
        from qwen3_npu.distributed.launch import process_group
        from qwen3_npu.inference.runner import loaded
        from qwen3_npu.inference.text import Writer

        self.writer = Writer(self.plan.tokenizer, self.plan.prompts)
        args = self.args
        world = self.stack.enter_context(process_group(platform, args.runtime))
        self.runner = self.stack.enter_context(
            loaded(platform, world, args.runtime, args.weights, plan=self.plan, rows=self.slots)
        )

    def close(self) -> None:
        """Free the model and leave the process group."""
        self.stack.close()

    # What the harness asks about tokens. `rank` and `world_size` stay 0 and 1: every process has all requests.

    @property
    def eot_token_id(self) -> int:
        """The token that begins a text without context, by transformers' tokenizer."""
        tokenizer = self.plan.tokenizer
        return tokenizer.special[tokenizer.named("eos_token") or ""]

    @property
    def max_length(self) -> int:
        return self.plan.positions

    @property
    def tokenizer_name(self) -> str:
        """A name for everything on which cached requests depend."""
        return str(self.plan.tokenizer.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        return self.writer.tokens(string)

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Apply the template of --prompt-type in --model_args; default: the tokenizer's own template."""
        from qwen3_npu.inference.text import Writer

        prompts = self.plan.prompts
        if prompts.template is None:
            prompts = dataclasses.replace(prompts, prompt_type="hf")
        if not add_generation_prompt:
            raise UsageError("an answer that is begun already (gen_prefix) is not supported with a chat template")
        writer = Writer(self.plan.tokenizer, prompts)
        return writer.text([Message(message["role"], message["content"]) for message in chat_history])

    # Requests

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Sequence[object] | None, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        from qwen3_npu.inference.scoring import Choice, Scorer

        choices = []
        for number, (texts, context, continuation) in enumerate(requests):
            group = str(texts[0])[:_GROUP] if texts else str(number)
            choices.append(Choice((number, 0), group, (*context, *continuation), len(continuation)))
        weights = self.args.weights
        tokens = 256 if self.runner.device.type == "cpu" else 4096
        scorer = Scorer(self.runner, pass_tokens=tokens, prefix_cache=weights.prefix_cache and weights.use_kv_cache)
        greedy: dict[tuple[int, int], bool] = {}
        scores = scorer.score(choices, greedy=greedy)
        return [(scores[choice.key], greedy[choice.key]) for choice in choices]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        pieces: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = [(None, *utils.make_disjoint_window(window)) for window in windows]
            pieces += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(pieces))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found: dict[int, str] = {}
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in kinds.values():
            found |= self._generated({n: requests[n].args[0] for n in numbers}, requests[numbers[0]].args[1])
        return [found[number] for number in range(len(requests))]

    def _generated(self, contexts: dict[int, str], asked: dict[str, object]) -> dict[int, str]:
        from qwen3_npu.inference.engine import Engine, Request
        from qwen3_npu.inference.text import TextStream

        runner, weights = self.runner, self.args.weights
        wanted = normalize_gen_kwargs(asked, _DEFAULT_ANSWER)
        stops = [stop for stop in handle_stop_sequences(wanted.pop("until", None), eos=None) if stop]
        limit = wanted.pop("max_gen_toks")
        room = self.max_length - limit
        if room < 1:
            raise UsageError(f"max_gen_toks {limit}: the model has {self.max_length} positions")
        requests = {
            number: Request(number, self.tok_encode(context)[-room:], limit)
            for number, context in contexts.items()
            if number % runner.data_parallel == runner.data_rank
        }
        streams = {number: TextStream(self.writer.encoder, runner.plan.eos, stops) for number in requests}

        unspoken = self.plan.tokenizer.unspoken

        def on_token(request: Request) -> bool:
            token, stream = request.tokens[-1], streams[request.number]
            if token not in unspoken:  # `hf` leaves these out of an answer, too
                stream.add(token)
            return stream.stopped

        engine = Engine(
            runner,
            slots=min(self.slots, max(len(requests), 1)),
            kv_cache=weights.use_kv_cache,
            prefix_cache=weights.prefix_cache,
        )
        engine.generate(list(requests.values()), _sampling(wanted, self.args.runtime.seed), on_token)
        for stream in streams.values():
            stream.rest()
        return dict(runner.gather([(number, stream.text) for number, stream in streams.items()]))


def _sampling(wanted: dict[str, Any], seed: int) -> Sampling:
    """The sampling of a task. Raises: UsageError: it asks for something else than greedy or sampled answers."""
    from qwen3_npu.inference.sampling import Sampling

    values = {name: wanted.pop(name) for name in _SAMPLING if name in wanted}
    if wanted:
        raise UsageError(f"generation_kwargs of the task: {', '.join(sorted(wanted))} not supported")
    sample = bool(values.pop("do_sample", False))
    if not values.get("temperature"):
        values.pop("temperature", None)
    return Sampling(sample, seed=seed, **values)


def _words(flags: dict[str, object]) -> list[str]:
    """`--model_args` as a command line."""
    words = []
    for name, value in flags.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def main() -> None:
    """lm_eval's command line, with the model `qwen3-npu`; only the first process writes."""
    rank, world_size, _ = environment.ranks()
    log.setup(rank, world_size)
    if rank > 0:
        sys.argv = _without_output(sys.argv)
        sys.stdout = open(os.devnull, "w")
    from lm_eval.__main__ import cli_evaluate

    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.argv.insert(1, "run")
    cli_evaluate()


def _without_output(argv: list[str]) -> list[str]:
    """The command line without the flags that write results."""
    kept = list(argv)
    for name in ("--output_path", "-o"):
        if name in kept:
            place = kept.index(name)
            del kept[place : place + 2]
    return [word for word in kept if not word.startswith("--output_path=") and word not in ("--log_samples", "-s")]


if __name__ == "__main__":
    # The registry must hold one class of this name, which is that of the module imported here, not of __main__.
    from qwen3_npu.evaluation import harness

    cli.run("qwen3_npu.evaluation.harness", harness.main)
else:
    register_model("qwen3-npu")(Qwen3Harness)
