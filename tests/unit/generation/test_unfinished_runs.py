"""Results are written as they come: nothing is lost by a kill, a closed or plain console, or an interrupted chat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quiz
import tiny
from qwen3_npu import cli
from qwen3_npu.args import evaluation, inference
from qwen3_npu.inference.plan import plan_inference
from qwen3_npu.inference.results.journal import Journal
from qwen3_npu.platform import select_platform

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_model(tmp_path_factory.mktemp("model") / "hf", tiny.arch(vocab_size=800))
    return quiz.write_tokenizer(folder)


def generate(process: Any, model: Path, out: Path, *flags: object) -> list[dict[str, Any]]:
    from qwen3_npu.inference.run import generate

    out.mkdir(exist_ok=True)
    words = ["--load", str(model), "--device", "cpu", "--output-dir", str(out), *map(str, flags)]
    args = inference.InferenceArgs(*cli.parse("test", "", inference.GROUPS, inference.FOREIGN, argv=words).groups)
    plan = plan_inference(args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=1)
    generate(select_platform("cpu"), process, args, plan)
    return [json.loads(line) for line in (out / "text_generation_result.jsonl").read_text().splitlines()]


def evaluate(process: Any, model: Path, out: Path, *flags: object) -> dict[str, Any]:
    from qwen3_npu.evaluation.run import evaluate

    out.mkdir(exist_ok=True)
    words = ["--load", str(model), "--device", "cpu", "--output-dir", str(out), "--log-samples", *map(str, flags)]
    args = evaluation.EvaluationArgs(*cli.parse("test", "", evaluation.GROUPS, evaluation.FOREIGN, argv=words).groups)
    plan = plan_inference(args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=1)
    evaluate(select_platform("cpu"), process, args, plan)
    return json.loads((out / "results.json").read_text())["results"]


class Killed(BaseException):
    """As if the process ended here."""


def kill_at(monkeypatch: pytest.MonkeyPatch, entry: int) -> list[dict[str, Any]]:
    """End the run before it writes result `entry`; returns what it wrote before."""
    written: list[dict[str, Any]] = []
    add = Journal.add

    def counted(self: Journal, **fields: Any) -> None:
        if len(written) == entry:
            raise Killed
        written.append(fields)
        add(self, **fields)

    monkeypatch.setattr(Journal, "add", counted)
    return written


TASKS = ("--task", "greedy", "do_sample", "--prompt", "Once", "The keeper", "A ship", "--max-new-tokens", 5)


def test_a_killed_generation_goes_on_where_it_stopped(
    process: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(process, model, tmp_path / "whole", *TASKS)
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            generate(process, model, out, *TASKS)
    journal = out / "text_generation_result.unfinished.0.jsonl"
    with journal.open("a") as file:
        file.write('{"place": 1, "number": 2, "resu')  # cut in the middle of a line
    with monkeypatch.context() as patch:
        second = kill_at(patch, 99)
        assert generate(process, model, out, *TASKS) == whole
    assert len(second) == 2, "what was there is not generated again"
    assert not journal.exists()


def test_another_question_is_not_answered_with_old_results(
    process: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--prompt", "Once", "The keeper", "--max-new-tokens")
    expected = generate(process, model, tmp_path / "other", *flags, 4)
    for extra in ((4,), (5, "--no-resume")):
        with monkeypatch.context() as patch:
            kill_at(patch, 1)
            with pytest.raises(Killed):
                generate(process, model, tmp_path / "out", *flags, 5)
        with monkeypatch.context() as patch:
            second = kill_at(patch, 99)
            found = generate(process, model, tmp_path / "out", *flags, *extra)
            assert len(second) == 2, "everything anew"
        assert found == expected or extra != (4,)


def test_a_killed_evaluation_gives_the_same_scores(
    process: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_npu.inference.scoring._PASSES_PER_REPORT", 1)
    mmlu = quiz.write_mmlu(tmp_path / "mmlu", 1)
    cases = tmp_path / "cases.jsonl"
    cases.write_text("".join(json.dumps({"instruction": f"Say {n}", "output": "x"}) + "\n" for n in range(4)))
    flags = ("--task", "mmlu", "custom", "--task-data-path", mmlu, cases, "--max-new-tokens", 3, "--pass-tokens", 64)
    with monkeypatch.context() as patch:
        passes = kill_at(patch, 999)
        whole = evaluate(process, model, tmp_path / "whole", *flags)
    samples = (tmp_path / "whole" / "samples_mmlu.jsonl").read_bytes()
    for kill in (3, len(passes) - 2):
        out = tmp_path / f"killed {kill}"
        with monkeypatch.context() as patch:
            kill_at(patch, kill)
            with pytest.raises(Killed):
                evaluate(process, model, out, *flags)
        assert (out / "results.json").exists() == (kill != 3), "written after each task"
        with monkeypatch.context() as patch:
            second = kill_at(patch, 999)
            found = evaluate(process, model, out, *flags)
        assert len(second) == len(passes) - kill
        for results in (found, whole):
            for task in results.values():
                task.pop("seconds", None)
        assert found == whole
        assert (out / "samples_mmlu.jsonl").read_bytes() == samples, "log-likelihoods bit by bit"
        assert not list(out.glob("*.unfinished*"))


def test_results_outlive_the_console(model: Path, tmp_path: Path) -> None:
    """A closed stdout, and one that knows ASCII only; each as a command."""
    command = [sys.executable, str(ROOT / "inference.py"), "--load", str(model), "--device", "cpu"]
    command += ["--prompt", "\u5317\u4eac \U0001f600", "--max-new-tokens", "2", "--output-dir"]
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    read, write = os.pipe()
    os.close(read)
    jobs = [
        subprocess.Popen([*command, str(tmp_path / "closed")], stdout=write, stderr=subprocess.PIPE, text=True),
        subprocess.Popen(
            [*command, str(tmp_path / "ascii")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=plain
        ),
    ]
    os.close(write)
    (_, closed), (shown, ascii_errors) = (job.communicate() for job in jobs)
    assert [job.returncode for job in jobs] == [0, 0], closed + ascii_errors
    assert "Traceback" not in closed + ascii_errors
    assert closed.count("standard output cannot be written") == 1
    assert "\\u5317\\u4eac \\U0001f600" in shown
    for name in ("closed", "ascii"):
        (record,) = map(json.loads, (tmp_path / name / "text_generation_result.jsonl").read_text("utf-8").splitlines())
        assert record["prompt"] == "\u5317\u4eac \U0001f600"
