"""`evaluation.py`: run the benchmarks in order; details go to files, scores to the console."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from qwen3_npu import console, log
from qwen3_npu.args.evaluation import CUSTOM, LM_EVAL, EvaluationArgs
from qwen3_npu.distributed.launch import World, process_group
from qwen3_npu.errors import UsageError
from qwen3_npu.evaluation.answers import TaskAnswers, TaskQuestions, asked, pass_tokens
from qwen3_npu.evaluation.asking import Asker
from qwen3_npu.evaluation.custom import Case, is_right, load_cases, plain
from qwen3_npu.evaluation.extract import filtered, mindspeed_letter, same_number
from qwen3_npu.evaluation.questions import Question, load_questions, missing_subjects
from qwen3_npu.evaluation.report import RESULTS, ScoredQuestion, Summary, confusion
from qwen3_npu.evaluation.task import LIKELIHOOD, Task
from qwen3_npu.evaluation.tasks import TASKS
from qwen3_npu.inference.plan import InferencePlan
from qwen3_npu.inference.results.files import write_json, write_lines
from qwen3_npu.inference.results.journal import Journal, weights_identity
from qwen3_npu.inference.runner import loaded
from qwen3_npu.inference.text import Writer
from qwen3_npu.platform.base import Platform

_LIMIT = 128  # tokens of a generated answer to a custom question


def run(platform: Platform, args: EvaluationArgs, plan: InferencePlan) -> None:
    """The complete evaluation, from joining the other processes to the last file."""
    with process_group(platform, args.runtime) as world:
        evaluate(platform, world, args, plan)


def evaluate(platform: Platform, world: World, args: EvaluationArgs, plan: InferencePlan) -> None:
    """Read all questions, load the model, evaluate; the results of each task are written before the next one starts."""
    platform.return_freed_memory()
    writer = Writer(plan.tokenizer, plan.prompts, backend="auto")
    if writer.args.template:
        plan = dataclasses.replace(plan, eos=tuple(sorted({*plan.eos, *writer.ends()})))
    tasks = [
        _load(name, path, args, writer)
        for name, path in zip(args.evaluate.task, args.evaluate.task_data_path, strict=True)
    ]
    facts = {task.name: _facts(task, writer, args) for task in tasks}
    folder = Path(args.evaluate.output_dir)
    rows = pass_tokens(args, world.device.type)
    with loaded(platform, world, args.runtime, args.weights, plan=plan, rows=rows, copy_tied=False) as runner:
        model = [str(plan.arch), str(plan.layout), plan.positions, plan.eos, weights_identity(args.weights)]
        model += [args.weights.bf16, args.weights.lora_alpha, plan.tokenizer.identity]
        journal = Journal(
            runner, folder, "results", {"model": model, **asked(args, facts)}, resume=args.evaluate.resume
        )
        results = {}
        for task in tasks:
            start = time.monotonic()
            samples, extra = _Judge(TaskAnswers(runner, writer, args, task, journal=journal)).run()
            seconds = time.monotonic() - start
            summary = Summary(samples)
            results[task.name] = {**facts[task.name], **summary.json(), "seconds": round(seconds, 2)}
            if runner.world.rank == 0:
                if args.evaluate.log_samples:
                    _write_samples(task, samples, folder)
                _write(results, args, plan, folder)
                console.show(summary.table(task.name) + (f"\n\n{extra}" if extra else ""))
                rate = len(samples) / seconds
                log.info(f"{task.name}: {len(samples)} questions in {seconds:.1f} s, {rate:.2f} questions/s")
        journal.remove()


def _load(name: str, path: str, args: EvaluationArgs, writer: Writer) -> TaskQuestions:
    evaluate = args.evaluate
    if name == CUSTOM:
        cases = load_cases(path, evaluate.match, evaluate.max_eval_samples, evaluate.mapping())
        return TaskQuestions(name, [writer.prompt(case.prompt) for case in cases], cases=cases)
    task = TASKS[name]
    if evaluate.scoring != LM_EVAL and name not in ("mmlu", "cmmlu", "ceval"):
        raise UsageError(f"--scoring {evaluate.scoring} is for mmlu, cmmlu and ceval; {name} has --scoring {LM_EVAL}")
    questions = load_questions(
        task, path, shots=evaluate.num_fewshot, most=evaluate.max_eval_samples, subjects=evaluate.subjects
    )
    missing = missing_subjects(task, questions)
    if missing and not evaluate.subjects:
        log.warning_once(
            f"{name}: {len(missing)} of {len(task.subjects)} subjects have no file and are not counted: {missing[0]} .."
        )
    asker = Asker(task, writer, language=evaluate.eval_language, scoring=evaluate.scoring)
    return TaskQuestions(name, [asker.context(question) for question in questions], task, questions, asker=asker)


class _Judge:
    """Compares answers with the expected ones."""

    def __init__(self, answers: TaskAnswers) -> None:
        self.answers, self.read, self.flags = answers, answers.read, answers.args.evaluate

    def run(self) -> tuple[list[ScoredQuestion], str]:
        """A sample for each question, and a table if the task has one; on every process."""
        task = self.read.task
        if task is None:
            return self._custom(self.read.cases)
        numbers = range(len(self.read.questions))
        pairs = list(zip(self.read.questions, self.read.contexts, strict=True))
        if self.flags.scoring != LM_EVAL:
            said = self.answers.generated(numbers, self.flags.max_new_tokens or 2, ())
            return [self._by_letter(task, q, c, said[i]) for i, (q, c) in enumerate(pairs)], ""
        if task.method == LIKELIHOOD:
            scores = self.answers.scores({i: task.choices for i in numbers})
            return [self._by_likelihood(task, q, c, scores[i]) for i, (q, c) in enumerate(pairs)], ""
        said = self.answers.generated(numbers, self.flags.max_new_tokens or task.limit, task.stop)
        return [self._by_filters(task, q, c, said[i]) for i, (q, c) in enumerate(pairs)], ""

    def _by_likelihood(self, task: Task, question: Question, context: str, scores: list[float]) -> ScoredQuestion:
        chosen = max(range(len(scores)), key=lambda i: scores[i])  # the first of equal ones, as argmax
        best = sorted(scores, reverse=True)
        entry = {
            "prompt": context,
            "choices": list(task.choices),
            "loglikelihoods": scores,
            "answer": task.choices[chosen],
            "expected": task.choices[question.gold],
        }
        return _sample(task, question, {"acc": float(chosen == question.gold)}, best[0] - best[1], entry=entry)

    def _by_letter(self, task: Task, question: Question, context: str, said: str) -> ScoredQuestion:
        letter, expected = mindspeed_letter(said), question.columns["answer"]
        entry = {"prompt": context, "said": said, "answer": letter, "expected": expected}
        return _sample(task, question, {"acc": float(letter == expected)}, None, entry=entry)

    def _by_filters(self, task: Task, question: Question, context: str, said: str) -> ScoredQuestion:
        answers = {name: filtered(said, *rule) for name, rule in task.filters.items()}
        expected = question.columns["answer"]
        scores = {f"exact_match {name}": float(same_number(text, expected)) for name, text in answers.items()}
        entry = {"prompt": context, "said": said, "answers": answers, "expected": expected}
        return _sample(task, question, scores, None, entry=entry)

    def _custom(self, cases: Sequence[Case]) -> tuple[list[ScoredQuestion], str]:
        scored = {i: case.choices for i, case in enumerate(cases) if case.match == "choice"}
        asked = [i for i in range(len(cases)) if i not in scored]
        likelihoods = self.answers.scores(scored) if scored else {}
        said = self.answers.generated(asked, self.flags.max_new_tokens or _LIMIT, ()) if asked else {}
        samples, pairs = [], []
        for i, case in enumerate(cases):
            margin = None
            if i in likelihoods:
                scores = likelihoods[i]
                answer = case.choices[max(range(len(scores)), key=lambda j: scores[j])]
                best = sorted(scores, reverse=True)
                right, margin = answer == case.answer, best[0] - best[1] if len(best) > 1 else None
            else:
                answer = plain(said[i])
                right = is_right(case, answer)
            pairs.append((plain(case.answer), plain(case.answer) if right else answer))
            entry = {"number": i, "prompt": self.read.contexts[i], "answer": answer, "expected": case.answer}
            entry |= {"category": case.category, "match": case.match, "acc": float(right)}
            samples.append(ScoredQuestion(case.category, case.category, {"acc": float(right)}, margin, log=entry))
        return samples, confusion(pairs)


def _sample(
    task: Task, question: Question, scores: dict[str, float], margin: float | None, *, entry: Mapping[str, object]
) -> ScoredQuestion:
    category = task.subjects[question.subject][0]
    log_entry = {"subject": question.subject, "number": question.number, **entry, **scores}
    return ScoredQuestion(question.subject, category, scores, margin, log=log_entry)


def _facts(task: TaskQuestions, writer: Writer, args: EvaluationArgs) -> dict[str, object]:
    """All facts on which a score depends, besides the weights."""
    shots = args.evaluate.num_fewshot
    return {
        "version": task.task.version if task.task else "1",
        "scoring": args.evaluate.scoring if task.task else "custom",
        "language": task.asker.language if task.asker else None,
        "num_fewshot": shots if shots is not None else (task.task.shots if task.task else 0),
        "template": writer.args.template,
        "enable_thinking": writer.args.enable_thinking,
        "questions": len(task.contexts),
        "prompt_hash": task.prompt_hash,
    }


def _write_samples(task: TaskQuestions, samples: Sequence[ScoredQuestion], folder: Path) -> None:
    path = folder / f"samples_{task.name}.jsonl"
    write_lines(path, (sample.log for sample in samples))
    log.info(f"written: {path}")


def _write(results: Mapping[str, object], args: EvaluationArgs, plan: InferencePlan, folder: Path) -> None:
    path = folder / RESULTS
    content = {
        "results": results,
        "model": {"load": args.weights.load, "lora_load": args.weights.lora_load, "architecture": str(plan.arch)},
        "settings": {
            "dtype": "bfloat16" if args.weights.bf16 else "float32",
            "layout": str(plan.layout),
            **dataclasses.asdict(args.evaluate),
            **dataclasses.asdict(plan.prompts),
        },
        "versions": {name: version(name) for name in ("torch", "megatron-core", "tokenizers")},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(path, content)
    log.info(f"written: {path}")
