"""`inference.py`: the tasks one after the other, on the console and into files."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen3_npu import log
from qwen3_npu.args.inference import GenerateArgs, InferenceArgs
from qwen3_npu.distributed.launch import World, process_group
from qwen3_npu.errors import UsageError
from qwen3_npu.files import write_text
from qwen3_npu.inference.beam import BeamSearch, beam_search
from qwen3_npu.inference.chat import chat
from qwen3_npu.inference.engine import Engine, Request
from qwen3_npu.inference.plan import InferencePlan
from qwen3_npu.inference.prompts import Prompt, read_prompts
from qwen3_npu.inference.runner import Runner, loaded
from qwen3_npu.inference.sampling import Sampling
from qwen3_npu.inference.text import Stream, Writer
from qwen3_npu.platform.base import Platform
from qwen3_npu.progress import Progress, human

RESULT = "text_generation_result"


def run(platform: Platform, args: InferenceArgs, plan: InferencePlan) -> None:
    """Everything, from joining the other processes to the last file."""
    with process_group(platform, args.runtime) as world:
        generate(platform, world, args, plan)


def generate(platform: Platform, world: World, args: InferenceArgs, plan: InferencePlan) -> None:
    """Load the model and do every task."""
    flags = args.generate
    writer = Writer(plan.tokenizer, args.prompts)
    if args.prompts.template is not None or "chat" in flags.task:
        plan = dataclasses.replace(plan, eos=tuple(sorted({*plan.eos, *writer.ends()})))
    prompts = read_prompts(flags)
    texts = [writer.text(prompt) for prompt in prompts]
    with loaded(platform, world, args.runtime, args.weights, plan, rows=_rows(flags, len(prompts))) as runner:
        results = []
        for task in flags.task:
            if task == "chat":
                chat(runner, writer, args)
            else:
                results += _Task(runner, writer, args, task).run(prompts, texts)
        if results and runner.world.rank == 0:
            _save(results, Path(flags.output_dir))


def _rows(args: GenerateArgs, prompts: int) -> int:
    """Tokens of most passes."""
    if args.stream or args.task == ["chat"]:
        return 1
    if all(task.startswith("beam") for task in args.task):
        return args.num_beams
    return max(min(args.predict_batch_size, prompts), 1)


def sampling_of(args: GenerateArgs, seed: int, *, sample: bool) -> Sampling:
    """The flags as the engine takes them."""
    return Sampling(sample, args.temperature, args.top_k, args.top_p, args.repetition_penalty, seed)


class _Task:
    """One way of generating, for all prompts."""

    def __init__(self, runner: Runner, writer: Writer, args: InferenceArgs, task: str) -> None:
        self.runner, self.writer, self.args, self.task = runner, writer, args, task
        sample = task in ("do_sample", "beam_search_with_sampling")
        self.sampling = sampling_of(args.generate, args.runtime.seed, sample=sample)
        self.streams: dict[int, Stream] = {}

    def run(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[dict[str, Any]]:
        """Answers to all prompts, in their order, on every process; rank 0 prints them."""
        args, runner = self.args.generate, self.runner
        requests = [Request(i, self.writer.tokens(text), args.max_new_tokens) for i, text in enumerate(texts)]
        mine = [r for r in requests if r.number % runner.data_parallel == runner.data_rank]
        start = time.monotonic()
        scores = self._beams(mine) if self.task.startswith("beam") else self._tokens(mine)
        seconds = time.monotonic() - start
        done = sorted(runner.gather([(r.number, r, self._answer(r), scores.get(r.number)) for r in mine]))
        results = []
        for number, request, answer, score in done:
            result = {
                "task": self.task,
                "prompt": texts[number],
                "answer": answer,
                "finish": request.finish,
                "prompt_tokens": request.prompt,
                "tokens": request.generated,
                **({"score": score} if score is not None else {"logprobs": [round(x, 6) for x in request.logprobs]}),
            }
            results.append(result)
            if runner.world.rank == 0 and not args.stream:
                print(_shown(prompts[number], answer), flush=True)
        count = sum(len(r["tokens"]) for r in results)
        log.info(
            f"{self.task}: {len(results)} prompts, {count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s"
        )
        return results

    def _tokens(self, requests: list[Request]) -> dict[int, float]:
        args, runner = self.args.generate, self.runner
        weights = self.args.weights
        engine = Engine(
            runner,
            slots=1 if args.stream else min(args.predict_batch_size, max(len(requests), 1)),
            kv_cache=weights.use_kv_cache,
            prefix_cache=weights.prefix_cache,
        )
        shows = args.stream and runner.world.rank == 0 and runner.data_parallel == 1
        total = sum(r.limit for r in requests)
        progress = Progress(self.task, total, {"tokens": "tokens"}) if runner.world.rank == 0 and not shows else None

        def on_token(request: Request) -> bool:
            stream = self._stream(request)
            piece = stream.add(request.tokens[-1])
            if shows:
                sys.stdout.write(piece)
                sys.stdout.flush()
            if progress is not None:
                progress.add(tokens=1)
            return stream.stopped

        for batch in [[r] for r in requests] if shows else [requests]:
            if shows:
                print(f"You:\n{self.writer.encoder.decode(batch[0].tokens)}\n\nqwen3_npu:", flush=True)
            engine.generate(batch, self.sampling, on_token)
            if shows:
                print(self.streams[batch[0].number].rest() + "\n", flush=True)
        if progress is not None:
            progress.close()
        if engine.cache is not None:
            size = human(engine.cache.bytes, "B")
            log.info(f"cache: {engine.slots} x {engine.cache.capacity} tokens, {size} on each process")
        if engine.reused:
            log.info(f"prefix cache: {engine.reused} of {engine.reused + engine.computed} prompt tokens were there")
        return {}

    def _beams(self, requests: list[Request]) -> dict[int, float]:
        args, runner = self.args.generate, self.runner
        if not self.args.weights.use_kv_cache:
            raise UsageError(f"--no-use-kv-cache: --task {self.task} needs the cache; drop the flag")
        search = BeamSearch(args.num_beams, args.length_penalty, self.sampling)
        scores = {r.number: beam_search(runner, r, search, self._ends()) for r in requests}
        while runner.anyone(False):
            runner.idle()
        return scores

    def _ends(self) -> Callable[[list[int]], bool] | None:
        stops = self.args.generate.stop
        if not stops:
            return None
        return lambda tokens: any(stop in self.writer.encoder.decode(tokens) for stop in stops)

    def _stream(self, request: Request) -> Stream:
        if request.number not in self.streams:
            stops = self.args.generate.stop or ()
            self.streams[request.number] = Stream(self.writer.encoder, self.runner.plan.eos, stops)
        return self.streams[request.number]

    def _answer(self, request: Request) -> str:
        stream = self.streams.pop(request.number, None) or Stream(
            self.writer.encoder, self.runner.plan.eos, self.args.generate.stop or ()
        )
        for token in request.generated[len(stream.tokens) :]:
            stream.add(token)
        stream.rest()
        return stream.text


def _shown(prompt: Prompt, answer: str) -> str:
    return f"You:\n{prompt[-1].content}\n\nqwen3_npu:\n{answer}\n"


def _save(results: list[dict[str, Any]], folder: Path) -> None:
    """Both files, each whole or not at all."""
    records = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    texts = "".join(f"[{r['task']}]\n{r['prompt']}\n---\n{r['answer']}\n\n" for r in results)
    for ending, content in ((".jsonl", records), (".txt", texts)):
        path = folder / (RESULT + ending)
        write_text(path, content)
        log.info(f"written: {path}")
