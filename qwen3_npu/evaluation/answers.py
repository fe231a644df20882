"""The model's answers to a task's questions; every answer is in the journal before the next pass."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

from qwen3_npu import log
from qwen3_npu.args.evaluation import EvaluationArgs
from qwen3_npu.evaluation.asking import Asker
from qwen3_npu.evaluation.custom import Case
from qwen3_npu.evaluation.paragraphs import ParagraphEncoder
from qwen3_npu.evaluation.questions import Question
from qwen3_npu.evaluation.task import Task
from qwen3_npu.inference.engine import Engine, Request
from qwen3_npu.inference.results.journal import Journal
from qwen3_npu.inference.runner import Runner
from qwen3_npu.inference.sampling import Sampling
from qwen3_npu.inference.scoring import Choice, Key, Scorer, choice_tokens
from qwen3_npu.inference.text import TextStream, Writer
from qwen3_npu.progress import Progress


@dataclasses.dataclass(frozen=True)
class TaskQuestions:
    """A task's questions, read before the model is loaded.

    Attributes:
        task, questions, asker: of a benchmark.
        cases: of --task custom.
        contexts: the text before each answer.
    """

    name: str
    contexts: list[str]
    task: Task | None = None
    questions: Sequence[Question] = ()
    asker: Asker | None = None
    cases: Sequence[Case] = ()

    @property
    def prompt_hash(self) -> str:
        return hashlib.sha256("\0".join(self.contexts).encode()).hexdigest()[:16]

    def group(self, number: int) -> str:
        """Key of a group of questions that probably have a common beginning."""
        return self.questions[number].subject if self.questions else "all"


class TaskAnswers:
    """Answers of one model to one task."""

    def __init__(
        self, runner: Runner, writer: Writer, args: EvaluationArgs, read: TaskQuestions, *, journal: Journal
    ) -> None:
        self.runner, self.writer, self.args, self.read, self.journal = runner, writer, args, read, journal
        self.earlier = [entry for entry in journal.entries if entry["task"] == read.name]

    def scores(self, choices: Mapping[int, Sequence[str]]) -> dict[int, list[float]]:
        """Log-likelihood of each choice, by question."""
        read = self.read
        delimiter = read.asker.delimiter if read.asker else ""
        encode = ParagraphEncoder(self.writer)
        listed = []
        for i, words in choices.items():
            tokens = choice_tokens(encode, read.contexts[i], [delimiter + word for word in words])
            listed += [Choice((i, j), read.group(i), *pair) for j, pair in enumerate(tokens)]
        self._say_truncated({c.key[0] for c in listed if len(c.tokens) > self.runner.plan.positions + 1}, len(choices))
        scorer = Scorer(
            self.runner,
            pass_tokens=pass_tokens(self.args, self.runner.device.type),
            prefix_cache=self.args.weights.prefix_cache and self.args.weights.use_kv_cache,
        )
        known: dict[Key, float] = {(i, j): score for e in self.earlier for i, j, score in e.get("scores", ())}

        def on_scores(scores: list[tuple[Key, float]]) -> None:
            self.journal.add(task=read.name, scores=[[*key, score] for key, score in scores])

        progress = self._progress(len(choices))
        # A question may take several rows; progress counts questions.
        found = scorer.score(
            listed,
            lambda share: progress(share * len(choices) / self.runner.data_parallel),
            known=known,
            on_scores=on_scores,
        )
        total = scorer.computed + scorer.reused
        log.info(f"{read.name}: {scorer.computed} of {total} prompt tokens computed, the rest is shared")
        return {i: [found[i, j] for j in range(len(words))] for i, words in choices.items()}

    def generated(self, numbers: Sequence[int], limit: int, stops: Sequence[str]) -> dict[int, str]:
        """The likeliest answer to each question."""
        runner, weights = self.runner, self.args.weights
        earlier: dict[int, str] = {e["number"]: e["said"] for e in self.earlier if "said" in e}
        requests = [self._request(i, limit) for i in numbers]
        self._say_truncated({request.number for request, is_truncated in requests if is_truncated}, len(requests))
        mine = [
            request
            for request, _ in requests
            if request.number % runner.data_parallel == runner.data_rank and request.number not in earlier
        ]
        streams = {r.number: TextStream(self.writer.encoder, runner.plan.eos, stops) for r in mine}
        slots = min(self.args.evaluate.evaluation_batch_size or 8, max(len(mine), 1))
        engine = Engine(runner, slots=slots, kv_cache=weights.use_kv_cache, prefix_cache=weights.prefix_cache)
        progress = self._progress(len(requests))

        def on_token(request: Request) -> bool:
            streams[request.number].add(request.tokens[-1])
            return streams[request.number].stopped

        def on_done(request: Request) -> None:
            streams[request.number].rest()
            self.journal.add(task=self.read.name, number=request.number, said=streams[request.number].text)
            progress(1)

        engine.generate(mine, Sampling(), on_token, on_done)
        return {**earlier, **dict(runner.gather([(number, stream.text) for number, stream in streams.items()]))}

    def _request(self, number: int, limit: int) -> tuple[Request, bool]:
        """The request of a question, and whether it lost its beginning so that the answer fits (as in the harness)."""
        tokens = self.writer.tokens(self.read.contexts[number])
        room = self.runner.plan.positions - limit
        if self.read.task is None or len(tokens) <= room or room < 1:
            return Request(number, tokens, limit), False
        return Request(number, tokens[-room:], limit), True

    def _say_truncated(self, truncated: set[int], count: int) -> None:
        if truncated:
            log.warning_once(
                f"{self.read.name}: {len(truncated)} of {count} prompts are longer than the model's "
                f"{self.runner.plan.positions} positions and lose their beginning, as in lm-evaluation-harness"
            )

    def _progress(self, total: int) -> Callable[[float], None]:
        if self.runner.world.rank != 0:
            return lambda count: None
        progress = Progress(self.read.name, total / self.runner.data_parallel, {"questions": "questions"})
        return lambda count: progress.add(questions=count)


def pass_tokens(args: EvaluationArgs, device: str) -> int:
    """Number of tokens of a pass. On a CPU more tokens only need more memory."""
    return args.evaluate.pass_tokens or (256 if device == "cpu" else 4096)


def asked(args: EvaluationArgs, facts: Mapping[str, object]) -> dict[str, object]:
    """All settings on which answers depend, besides the model: flags, and the tasks' facts."""
    unimportant = ("output_dir", "resume", "log_samples", "task_data_path")
    flags = {name: value for name, value in dataclasses.asdict(args.evaluate).items() if name not in unimportant}
    return {"flags": flags, "tasks": dict(facts), "kernels": [args.runtime.kernels, args.runtime.kernel_overrides]}
