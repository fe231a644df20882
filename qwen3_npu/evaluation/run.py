"""`evaluation.py`: the benchmarks one after the other; scores on the console, details in files."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen3_npu import log
from qwen3_npu.args.evaluation import CUSTOM, LM_EVAL, EvaluationArgs
from qwen3_npu.distributed.launch import World, process_group
from qwen3_npu.errors import UsageError
from qwen3_npu.evaluation.asking import Asker
from qwen3_npu.evaluation.custom import Case, is_right, load_cases
from qwen3_npu.evaluation.extract import filtered, mindspeed_letter, same_number
from qwen3_npu.evaluation.pieces import PieceEncoder
from qwen3_npu.evaluation.questions import Question, load_questions, missing_subjects
from qwen3_npu.evaluation.report import RESULTS, Sample, Summary, confusion, write_json, write_text
from qwen3_npu.evaluation.task import LIKELIHOOD, Task
from qwen3_npu.evaluation.tasks import TASKS
from qwen3_npu.inference.engine import Engine, Request
from qwen3_npu.inference.plan import InferencePlan
from qwen3_npu.inference.runner import Runner, loaded
from qwen3_npu.inference.sampling import Sampling
from qwen3_npu.inference.scoring import Choice, Scorer, choice_tokens
from qwen3_npu.inference.text import Stream, Writer
from qwen3_npu.platform.base import Platform
from qwen3_npu.progress import Progress

_LIMIT = 128  # tokens of a generated answer to a custom question


@dataclasses.dataclass(frozen=True)
class Read:
    """A task's questions, read before the model is.

    Attributes:
        contexts: text before each answer.
    """

    name: str
    task: Task | None
    items: Sequence[Any]
    contexts: list[str]
    asker: Asker | None

    @property
    def prompt_hash(self) -> str:
        return hashlib.sha256("\0".join(self.contexts).encode()).hexdigest()[:16]


def run(platform: Platform, args: EvaluationArgs, plan: InferencePlan) -> None:
    """The whole evaluation, from joining the other processes to the last file."""
    with process_group(platform, args.runtime) as world:
        evaluate(platform, world, args, plan)


def evaluate(platform: Platform, world: World, args: EvaluationArgs, plan: InferencePlan) -> None:
    """Read all questions, load the model, evaluate, write."""
    platform.return_freed_memory()
    writer = Writer(plan.tokenizer, args.prompts, backend="auto")
    if writer.args.template:
        plan = dataclasses.replace(plan, eos=tuple(sorted({*plan.eos, *writer.ends()})))
    tasks = [
        _load(name, path, args, writer)
        for name, path in zip(args.evaluate.task, args.evaluate.task_data_path, strict=True)
    ]
    rows = pass_tokens(args, world.device.type)
    with loaded(platform, world, args.runtime, args.weights, plan, rows=rows, copy_tied=False) as runner:
        results = {}
        for task in tasks:
            start = time.monotonic()
            samples, extra = _Evaluation(runner, writer, args, task).run()
            seconds = time.monotonic() - start
            summary = Summary(samples)
            if runner.world.rank == 0:
                print(summary.table(task.name), flush=True)
                if extra:
                    print(f"\n{extra}")
                rate = len(samples) / seconds
                log.info(f"{task.name}: {len(samples)} questions in {seconds:.1f} s, {rate:.2f} questions/s")
                if args.evaluate.log_samples:
                    _write_samples(task, samples, Path(args.evaluate.output_dir))
            results[task.name] = {**_facts(task, args), **summary.json(), "seconds": round(seconds, 2)}
        if runner.world.rank == 0:
            _write(results, args, plan, Path(args.evaluate.output_dir))


def pass_tokens(args: EvaluationArgs, device: str) -> int:
    """Tokens of a pass: on a CPU more of them only take memory."""
    return args.evaluate.pass_tokens or (256 if device == "cpu" else 4096)


def _load(name: str, path: str, args: EvaluationArgs, writer: Writer) -> Read:
    evaluate = args.evaluate
    if name == CUSTOM:
        cases = load_cases(path, evaluate.match, evaluate.max_eval_samples)
        return Read(name, None, cases, [writer.text(case.messages) for case in cases], None)
    task = TASKS[name]
    if evaluate.scoring != LM_EVAL and name not in ("mmlu", "cmmlu", "ceval"):
        raise UsageError(f"--scoring {evaluate.scoring} is for mmlu, cmmlu and ceval; {name} has --scoring {LM_EVAL}")
    questions = load_questions(
        task, path, shots=evaluate.num_fewshot, most=evaluate.max_eval_samples, subjects=evaluate.subjects
    )
    missing = missing_subjects(task, questions)
    if missing and not evaluate.subjects:
        log.warning(
            f"{name}: {len(missing)} of {len(task.subjects)} subjects have no file and do not count: {missing[0]} .."
        )
    asker = Asker(task, writer, language=evaluate.eval_language, scoring=evaluate.scoring)
    return Read(name, task, questions, [asker.context(question) for question in questions], asker)


class _Evaluation:
    """One task on one model."""

    def __init__(self, runner: Runner, writer: Writer, args: EvaluationArgs, read: Read) -> None:
        self.runner, self.writer, self.args, self.read = runner, writer, args, read

    def run(self) -> tuple[list[Sample], str]:
        """A sample for each question, and a table for people if the task has one; on every process."""
        read = self.read
        if read.task is None:
            return self._custom(read.items)
        if self.args.evaluate.scoring != LM_EVAL:
            said = self._generated(range(len(read.items)), self.args.evaluate.max_new_tokens or 2, ())
            return [self._by_letter(q, c, said[i]) for i, (q, c) in enumerate(self._pairs())], ""
        if read.task.method == LIKELIHOOD:
            scores = self._scores({i: read.task.choices for i in range(len(read.items))})
            return [self._by_likelihood(q, c, scores[i]) for i, (q, c) in enumerate(self._pairs())], ""
        limit = self.args.evaluate.max_new_tokens or read.task.limit
        said = self._generated(range(len(read.items)), limit, read.task.stop)
        return [self._by_filters(q, c, said[i]) for i, (q, c) in enumerate(self._pairs())], ""

    def _pairs(self) -> list[tuple[Question, str]]:
        return list(zip(self.read.items, self.read.contexts, strict=True))

    # Asking the model

    def _scores(self, choices: Mapping[int, Sequence[str]]) -> dict[int, list[float]]:
        """Log-likelihood of each choice, by question."""
        read = self.read
        delimiter = read.asker.delimiter if read.asker else ""
        encode = PieceEncoder(self.writer)
        listed = []
        for i, words in choices.items():
            group = read.items[i].subject if read.task else "all"
            tokens = choice_tokens(encode, read.contexts[i], [delimiter + word for word in words])
            listed += [Choice((i, j), group, *pair) for j, pair in enumerate(tokens)]
        scorer = Scorer(
            self.runner,
            pass_tokens=pass_tokens(self.args, self.runner.device.type),
            prefix_cache=self.args.weights.prefix_cache and self.args.weights.use_kv_cache,
        )
        progress = self._progress(len(choices))
        # A question may take several rows; what is shown are questions.
        found = scorer.score(listed, lambda share: progress(share * len(choices) / self.runner.data_parallel))
        total = scorer.computed + scorer.reused
        log.info(f"{read.name}: {scorer.computed} of {total} prompt tokens computed, the rest is shared")
        return {i: [found[i, j] for j in range(len(words))] for i, words in choices.items()}

    def _generated(self, numbers: Sequence[int], limit: int, stops: Sequence[str]) -> dict[int, str]:
        """The likeliest answer to each question."""
        runner, weights = self.runner, self.args.weights
        requests = [Request(i, self.writer.tokens(self.read.contexts[i]), limit) for i in numbers]
        mine = [r for r in requests if r.number % runner.data_parallel == runner.data_rank]
        streams = {r.number: Stream(self.writer.encoder, runner.plan.eos, stops) for r in mine}
        slots = min(self.args.evaluate.evaluation_batch_size or 8, max(len(mine), 1))
        engine = Engine(runner, slots=slots, kv_cache=weights.use_kv_cache, prefix_cache=weights.prefix_cache)
        progress = self._progress(len(requests))

        def on_token(request: Request) -> bool:
            streams[request.number].add(request.tokens[-1])
            return streams[request.number].stopped

        engine.generate(mine, Sampling(), on_token, lambda request: progress(1))
        for stream in streams.values():
            stream.rest()
        return dict(runner.gather([(number, stream.text) for number, stream in streams.items()]))

    def _progress(self, total: int) -> Callable[[float], None]:
        if self.runner.world.rank != 0:
            return lambda count: None
        progress = Progress(self.read.name, total / self.runner.data_parallel, {"questions": "questions"})
        return lambda count: progress.add(questions=count)

    # Judging the answers

    def _by_likelihood(self, question: Question, context: str, scores: list[float]) -> Sample:
        task = self.read.task
        assert task is not None
        chosen = max(range(len(scores)), key=lambda i: scores[i])  # of equals the first, as argmax
        best = sorted(scores, reverse=True)
        return self._sample(
            question,
            {"acc": float(chosen == question.gold)},
            best[0] - best[1],
            {
                "prompt": context,
                "choices": list(task.choices),
                "loglikelihoods": scores,
                "answer": task.choices[chosen],
                "expected": task.choices[question.gold],
            },
        )

    def _by_letter(self, question: Question, context: str, said: str) -> Sample:
        letter, expected = mindspeed_letter(said), question.columns["answer"]
        log_entry = {"prompt": context, "said": said, "answer": letter, "expected": expected}
        return self._sample(question, {"acc": float(letter == expected)}, None, log_entry)

    def _by_filters(self, question: Question, context: str, said: str) -> Sample:
        assert self.read.task is not None
        answers = {name: filtered(said, *rule) for name, rule in self.read.task.filters.items()}
        expected = question.columns["answer"]
        scores = {f"exact_match {name}": float(same_number(text, expected)) for name, text in answers.items()}
        return self._sample(
            question, scores, None, {"prompt": context, "said": said, "answers": answers, "expected": expected}
        )

    def _sample(
        self, question: Question, scores: dict[str, float], margin: float | None, entry: dict[str, Any]
    ) -> Sample:
        assert self.read.task is not None
        category = self.read.task.subjects[question.subject][0]
        entry = {"subject": question.subject, "number": question.number, **entry, **scores}
        return Sample(question.subject, category, scores, margin, entry)

    def _custom(self, cases: Sequence[Case]) -> tuple[list[Sample], str]:
        scored = {i: case.choices for i, case in enumerate(cases) if case.match == "choice"}
        asked = [i for i in range(len(cases)) if i not in scored]
        likelihoods = self._scores(scored) if scored else {}
        said = self._generated(asked, self.args.evaluate.max_new_tokens or _LIMIT, ()) if asked else {}
        samples, pairs = [], []
        for i, case in enumerate(cases):
            margin = None
            if i in likelihoods:
                scores = likelihoods[i]
                answer = case.choices[max(range(len(scores)), key=lambda j: scores[j])]
                best = sorted(scores, reverse=True)
                right, margin = answer == case.answer, best[0] - best[1] if len(best) > 1 else None
            else:
                answer = said[i].strip()
                right = is_right(case, answer)
            pairs.append((case.answer.strip(), case.answer.strip() if right else answer))
            entry = {"number": i, "prompt": self.read.contexts[i], "answer": answer, "expected": case.answer}
            entry |= {"category": case.category, "match": case.match, "acc": float(right)}
            samples.append(Sample(case.category, case.category, {"acc": float(right)}, margin, entry))
        return samples, confusion(pairs)


def _facts(task: Read, args: EvaluationArgs) -> dict[str, Any]:
    """What a score depends on besides the weights."""
    shots = args.evaluate.num_fewshot
    return {
        "version": task.task.version if task.task else "1",
        "scoring": args.evaluate.scoring if task.task else "custom",
        "language": task.asker.language if task.asker else None,
        "num_fewshot": shots if shots is not None else (task.task.shots if task.task else 0),
        "template": args.prompts.template,
        "questions": len(task.items),
        "prompt_hash": task.prompt_hash,
    }


def _write_samples(task: Read, samples: Sequence[Sample], folder: Path) -> None:
    path = folder / f"samples_{task.name}.jsonl"
    write_text(path, "".join(json.dumps(sample.log, ensure_ascii=False) + "\n" for sample in samples))
    log.info(f"written: {path}")


def _write(results: dict[str, Any], args: EvaluationArgs, plan: InferencePlan, folder: Path) -> None:
    path = folder / RESULTS
    content = {
        "results": results,
        "model": {"load": args.weights.load, "lora_load": args.weights.lora_load, "architecture": str(plan.arch)},
        "settings": {
            "dtype": "bfloat16" if args.weights.bf16 else "float32",
            "layout": str(plan.layout),
            **dataclasses.asdict(args.evaluate),
            **dataclasses.asdict(args.prompts),
        },
        "versions": {name: version(name) for name in ("torch", "megatron-core", "tokenizers")},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(path, content)
    log.info(f"written: {path}")
