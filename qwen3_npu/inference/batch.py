"""One task of generation for all prompts. Each answer is written when it is complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from qwen3_npu import console, log
from qwen3_npu.args.inference import InferenceArgs
from qwen3_npu.data.text.conversation import Conversation
from qwen3_npu.inference.beam import BeamSearch, beam_search
from qwen3_npu.inference.engine import Engine, Request
from qwen3_npu.inference.results.journal import Journal
from qwen3_npu.inference.runner import Runner
from qwen3_npu.inference.sampling import sampling_of
from qwen3_npu.inference.text import TextStream, Writer
from qwen3_npu.progress import Progress, human

PromptResult = dict[str, Any]


def requests_of(writer: Writer, texts: Sequence[str], limit: int) -> list[Request]:
    """A request for each prompt's text."""
    return [Request(i, writer.tokens(text), limit) for i, text in enumerate(texts)]


class GenerationTask:
    """One task.

    Attributes:
        results: prompt's number -> answer; during the task of this copy of the model, at the end of all copies.
    """

    def __init__(self, runner: Runner, writer: Writer, args: InferenceArgs, place: int, *, journal: Journal) -> None:
        """Args: place: index of the task in --task."""
        self.runner, self.writer, self.args, self.place, self.journal = runner, writer, args, place, journal
        self.task = args.generate.task[place]
        sample = self.task in ("do_sample", "beam_search_with_sampling")
        self.sampling = sampling_of(args.generate, args.runtime.seed, sample=sample)
        self.streams: dict[int, TextStream] = {}
        self.results: dict[int, PromptResult] = {}
        self.shown: set[int] = set()

    def run(self, texts: Sequence[str]) -> list[PromptResult]:
        """Answers to all prompts, in their order, on every process."""
        runner = self.runner
        earlier = {e["number"]: e["result"] for e in self.journal.entries if e["place"] == self.place}
        requests = requests_of(self.writer, texts, self.args.generate.max_new_tokens)
        mine = [r for r in requests if r.number % runner.data_parallel == runner.data_rank and r.number not in earlier]
        start = time.monotonic()
        if self.task.startswith("beam"):
            self._beams(mine, texts)
        else:
            self._tokens(mine, texts)
        seconds = time.monotonic() - start
        made = dict(runner.gather(list(self.results.items())))
        self.results = {**earlier, **made}
        count = sum(len(result["tokens"]) for result in made.values())
        log.info(f"{self.task}: {len(made)} prompts, {count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s")
        return [result for _, result in sorted(self.results.items())]

    def show(self, prompts: Sequence[Conversation]) -> None:
        """Print the answers that were not streamed."""
        for number, result in sorted(self.results.items()):
            if number not in self.shown:
                console.show(f"You:\n{prompts[number].messages[-1].content}\n\nqwen3_npu:\n{result['answer']}\n")

    def _done(self, request: Request, text: str, score: float | None = None) -> None:
        result: PromptResult = {
            "task": self.task,
            "prompt": text,
            "answer": self._answer(request),
            "finish": request.finish,
            "prompt_tokens": request.prompt,
            "tokens": request.generated,
            **({"score": score} if score is not None else {"logprobs": [round(x, 6) for x in request.logprobs]}),
        }
        self.results[request.number] = result
        self.journal.add(place=self.place, number=request.number, result=result)

    def _tokens(self, requests: list[Request], texts: Sequence[str]) -> None:
        args, runner = self.args.generate, self.runner
        weights = self.args.weights
        engine = Engine(
            runner,
            slots=1 if args.stream else min(args.predict_batch_size, max(len(requests), 1)),
            kv_cache=weights.use_kv_cache,
            prefix_cache=weights.prefix_cache,
        )
        alone = args.stream and runner.data_parallel == 1
        shows = alone and runner.world.rank == 0
        total = sum(r.limit for r in requests)
        progress = Progress(self.task, total, {"tokens": "tokens"}) if runner.world.rank == 0 and not shows else None

        def on_token(request: Request) -> bool:
            stream = self._stream(request)
            piece = stream.add(request.tokens[-1])
            if shows:
                console.show(piece, "")
            if progress is not None:
                progress.add(tokens=1)
            return stream.stopped

        def on_done(request: Request) -> None:
            rest = self._stream(request).rest()
            self._done(request, texts[request.number])
            if shows:
                console.show(rest + "\n")
                self.shown.add(request.number)

        for batch in [[r] for r in requests] if alone else [requests]:
            if shows:
                console.show(f"You:\n{self.writer.encoder.decode(batch[0].tokens)}\n\nqwen3_npu:")
            engine.generate(batch, self.sampling, on_token, on_done)
        if progress is not None:
            progress.close()
        if engine.cache is not None:
            size = human(engine.cache.bytes, "B")
            log.info(f"cache: {engine.slots} x {engine.cache.capacity} tokens, {size} on each process")
        if engine.reused:
            log.info(f"prefix cache: {engine.reused} of {engine.reused + engine.computed} prompt tokens were cached")

    def _beams(self, requests: list[Request], texts: Sequence[str]) -> None:
        search = BeamSearch(self.args.generate.num_beams, self.args.generate.length_penalty, self.sampling)
        for request in requests:
            score = beam_search(self.runner, request, search, self._ends())
            self._done(request, texts[request.number], score)
        while self.runner.anyone(False):
            self.runner.idle()

    def _ends(self) -> Callable[[list[int]], bool] | None:
        stops = self.args.generate.stop
        if not stops:
            return None
        return lambda tokens: any(stop in self.writer.encoder.decode(tokens) for stop in stops)

    def _stream(self, request: Request) -> TextStream:
        if request.number not in self.streams:
            stops = self.args.generate.stop or ()
            self.streams[request.number] = TextStream(self.writer.encoder, self.runner.plan.eos, stops)
        return self.streams[request.number]

    def _answer(self, request: Request) -> str:
        stream = self._stream(request)
        for token in request.generated[len(stream.tokens) :]:
            stream.add(token)
        stream.rest()
        del self.streams[request.number]
        return stream.text
