"""`inference.py`: run the tasks in order; results go to files and to the console."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from qwen3_npu import log
from qwen3_npu.args.inference import DEFAULT_PROMPT, GenerateArgs, InferenceArgs
from qwen3_npu.data.text.conversation import Conversation
from qwen3_npu.distributed.launch import World, process_group
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.batch import GenerationTask, requests_of
from qwen3_npu.inference.chat.conversation import chat
from qwen3_npu.inference.chat.keyboard import Keyboard, keyboard
from qwen3_npu.inference.engine import limit_request
from qwen3_npu.inference.generation_config import with_defaults
from qwen3_npu.inference.plan import InferencePlan
from qwen3_npu.inference.prompts import read_prompts
from qwen3_npu.inference.results.files import RESULT, write_generated
from qwen3_npu.inference.results.journal import Journal, weights_identity
from qwen3_npu.inference.rewards.run import score_answers
from qwen3_npu.inference.runner import loaded
from qwen3_npu.inference.serve.run import serve
from qwen3_npu.inference.taught import PLAIN
from qwen3_npu.inference.text import Writer, for_conversations, open_writer
from qwen3_npu.platform.base import Platform

_CHAT = "chat"
# Flags of generation that change no result.
_SHOWN = ("predict_batch_size", "stream", "history_turns", "hide_thinking", "output_dir", "resume")


def run(platform: Platform, args: InferenceArgs, plan: InferencePlan) -> None:
    """The complete run, from joining the other processes to the last file."""
    with process_group(platform, args.runtime) as world:
        work = score_answers if args.scores else serve if args.serve.serve else generate
        work(platform, world, args, plan)


def generate(platform: Platform, world: World, args: InferenceArgs, plan: InferencePlan) -> None:
    """Load the model and do every task; the results of each are on the disk before the next one starts.

    Raises:
        UsageError: a prompt or a task cannot be done; nothing is loaded or written then.
    """
    flags, lines = with_defaults(args.generate, plan.generation)
    args = args._replace(generate=flags)
    if flags.prompt is None and flags.predict_data is None and flags.task != [_CHAT]:
        lines.append(f'no --prompt and no --predict-data: the prompt is "{DEFAULT_PROMPT}"')
    for line in lines:
        log.info(line)
    if _CHAT in flags.task:
        if plan.prompts.template_given == PLAIN:
            raise UsageError("--task chat needs a template: --prompt-type auto, qwen3 or --hf-chat-template")
        plan = for_conversations(plan)
    writer, plan = open_writer(plan)
    beams = [task for task in flags.task if task.startswith("beam")]
    if beams and not args.weights.use_kv_cache:
        raise UsageError(f"--no-use-kv-cache: --task {beams[0]} needs the cache; drop the flag")
    prompts = read_prompts(flags)
    texts = _texts(writer, prompts)
    for request in requests_of(writer, texts, flags.max_new_tokens):
        limit_request(request, plan.positions)
    folder = Path(flags.output_dir)
    typed = keyboard() if _CHAT in flags.task and world.rank == 0 else contextlib.nullcontext(Keyboard())
    with (
        typed as keys,
        loaded(platform, world, args.runtime, args.weights, plan=plan, rows=_rows(flags, len(prompts))) as runner,
    ):
        journal = None
        if flags.task != [_CHAT]:
            journal = Journal(runner, folder, RESULT, _asked(args, plan, texts), resume=flags.resume)
        results: list[dict[str, object]] = []
        for place, task in enumerate(flags.task):
            if task == _CHAT:
                chat(runner, writer, args, keys)
                continue
            assert journal is not None
            batch = GenerationTask(runner, writer, args, place, journal=journal)
            results += batch.run(texts)
            if runner.world.rank == 0:
                for path in write_generated(folder, results):
                    log.info(f"written: {path}")
                batch.show(prompts)
            if set(flags.task[place + 1 :]) <= {_CHAT}:
                journal.remove()


def _texts(writer: Writer, prompts: Sequence[Conversation]) -> list[str]:
    texts = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            texts.append(writer.prompt(prompt))
        except UsageError as error:
            raise UsageError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from None
    return texts


def _rows(args: GenerateArgs, prompts: int) -> int:
    """Usual number of tokens of a pass."""
    if args.stream or args.task == [_CHAT]:
        return 1
    if all(task.startswith("beam") for task in args.task):
        return args.num_beams
    return max(min(args.predict_batch_size, prompts), 1)


def _asked(args: InferenceArgs, plan: InferencePlan, texts: list[str]) -> dict[str, object]:
    """All settings on which results depend."""
    flags = dataclasses.asdict(args.generate)
    return {
        "texts": texts,
        "flags": {name: value for name, value in flags.items() if name not in _SHOWN},
        "seed": args.runtime.seed,
        "kernels": [args.runtime.kernels, args.runtime.kernel_overrides],
        "weights": [str(plan.arch), args.weights.bf16, args.weights.lora_alpha, weights_identity(args.weights)],
        "tokenizer": plan.tokenizer.identity,
        "ends": [plan.eos, plan.positions],
    }
