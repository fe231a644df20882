#!/usr/bin/env python3
"""How fast MMLU is scored, 5-shot, beside lm-evaluation-harness with transformers; same weights, same run. Prints JSON.

    python benchmarks/evaluate.py [--size qwen3-0.6b] [--folder DIR] [--questions 48] [--theirs 8] [--data DIR]
                                  [--tokenizer DIR] [--threads 2]

Questions are made up (about as long as those of MMLU) unless --data and --tokenizer name files and a tokenizer.
Each side is a process of its own, so that its peak memory is its own; start-up and loading are not timed.
Targets: 4 x the questions per second, peak memory at most 1.3 x the weights.
The bound is the ratio of prompt tokens to tokens that are not shared.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "quickstart")]

from random_model import make_model  # noqa: E402

from qwen3_npu.model.arch import parameter_count  # noqa: E402
from qwen3_npu.model.sizes import SIZES  # noqa: E402

SUBJECT = "anatomy"
TARGET, MEMORY_TARGET = 4.0, 1.3
WORDS = [
    "the",
    "of",
    "which",
    "best",
    "describes",
    "structure",
    "nerve",
    "that",
    "a",
    "bone",
    "in",
    "is",
    "causes",
    "most",
    "likely",
    "following",
]


def write_data(folder: Path, questions: int) -> Path:
    """A subject in the release's layout."""
    draw = random.Random(0)
    for split, count in (("dev", 5), ("test", questions)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with (folder / split / f"{SUBJECT}_{split}.csv").open("w", newline="") as stream:
            for _ in range(count):
                texts = [" ".join(draw.choices(WORDS, k=n)) for n in (8, 2, 2, 2, 2)]
                csv.writer(stream).writerow([*texts, draw.choice("ABCD")])
    return folder


def theirs(model: Path, data: Path, questions: int) -> dict[str, float]:
    """lm-evaluation-harness in this process."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for split in ("dev", "test"):
            with (data / split / f"{SUBJECT}_{split}.csv").open(newline="") as stream:
                rows = [{"question": q, "choices": c, "answer": "ABCD".index(a)} for q, *c, a in csv.reader(stream)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": "local_anatomy",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("dev", "test")}},
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "output_type": "multiple_choice",
            "description": "The following are multiple choice questions (with answers) about anatomy.\n\n",
            "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
            "D. {{choices[3]}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
        (folder / "task.yaml").write_text(json.dumps(task))
        os.environ |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        lm = HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=1, device="cpu")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        start = time.perf_counter()
        found = lm_eval.simple_evaluate(
            lm, tasks=["local_anatomy"], num_fewshot=5, limit=questions, task_manager=manager, bootstrap_iters=0
        )
        seconds = time.perf_counter() - start
    samples = found["samples"]["local_anatomy"]
    return {
        "questions": len(samples),
        "seconds": seconds,
        "scores": [[r[0] for r in s["filtered_resps"]] for s in samples],
    }


def ours(model: Path, data: Path, questions: int) -> dict[str, float]:
    """This project in this process, by its command."""
    import runpy

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--load", str(model), "--task", "mmlu", "--task-data-path", str(data), "--subjects", SUBJECT]
        flags += ["--device", "cpu", "--max-eval-samples", str(questions), "--log-samples", "--output-dir", folder]
        sys.argv = ["evaluation.py", *flags]
        sys.stdout = sys.stderr
        try:
            runpy.run_path(str(ROOT / "evaluation.py"), run_name="__main__")
        except SystemExit as stopped:
            if stopped.code:
                raise
        sys.stdout = sys.__stdout__
        result = json.loads((Path(folder) / "results.json").read_text())["results"]["mmlu"]
        samples = [json.loads(line) for line in (Path(folder) / "samples_mmlu.jsonl").read_text().splitlines()]
    scores = [sample["loglikelihoods"] for sample in samples]
    return {"questions": result["questions"], "seconds": result["seconds"], "scores": scores}


SIDES = {"lm-eval": theirs, "qwen3_npu": ours}


def token_counts(model: Path, data: Path, questions: int) -> tuple[float, float]:
    """Mean tokens of a prompt, and of those that are the same in all prompts."""
    from qwen3_npu.args.inference import PromptArgs
    from qwen3_npu.data.text.tokenizer import open_tokenizer
    from qwen3_npu.evaluation.asking import Asker
    from qwen3_npu.evaluation.questions import load_questions
    from qwen3_npu.evaluation.tasks import TASKS
    from qwen3_npu.inference.text import Writer

    writer = Writer(open_tokenizer(str(model)), PromptArgs())
    asker = Asker(TASKS["mmlu"], writer, language=None, scoring="lm-eval")
    found = load_questions(TASKS["mmlu"], str(data), shots=5, most=questions, subjects=[SUBJECT])
    tokens = [writer.tokens(asker.context(question)) for question in found]
    shared = next(i for i, column in enumerate(zip(*tokens, strict=False)) if len(set(column)) > 1)
    return sum(map(len, tokens)) / len(tokens), shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="qwen3-0.6b")
    parser.add_argument("--folder", type=Path, help="folder of the random weights, kept; default: a temporary one")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--theirs", type=int, default=8, help="questions that lm-evaluation-harness gets")
    parser.add_argument("--data", type=Path, help="MMLU's files")
    parser.add_argument("--tokenizer", type=Path, help="a Qwen3 tokenizer")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        result = SIDES[args.side](args.folder, args.data, args.questions)
        result["peak bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("RESULT " + json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(compare(args, Path(temporary)), indent=2))


def compare(args: argparse.Namespace, temporary: Path) -> dict[str, Any]:
    model = make_model((args.folder or temporary) / args.size, SIZES[args.size])
    if args.tokenizer:
        for file in args.tokenizer.iterdir():
            shutil.copy(file, model)
    else:
        from make_model import train_tokenizer

        train_tokenizer(ROOT / "examples" / "quickstart" / "text.txt", model, 768)
    data = args.data or write_data(temporary / "data", args.questions)
    counts = {"lm-eval": args.theirs, "qwen3_npu": args.questions}
    found = {side: one_side(side, model, data, count, args.threads) for side, count in counts.items()}
    rate = {side: result["questions"] / result["seconds"] for side, result in found.items()}
    weights = parameter_count(SIZES[args.size]) * 4
    mean, shared = token_counts(model, data, args.questions)
    asked = args.questions
    bound = asked * mean / (asked * (mean - shared) + shared)
    pairs = list(zip(found["lm-eval"]["scores"], found["qwen3_npu"]["scores"], strict=False))
    ratio = rate["qwen3_npu"] / rate["lm-eval"]
    memory = {side: result["peak bytes"] / weights for side, result in found.items()}
    return {
        "command": " ".join(sys.argv),
        **{f"{side} questions/s": round(value, 3) for side, value in rate.items()},
        "ratio": round(ratio, 2),
        "target": TARGET,
        "met": ratio >= TARGET,
        "bound by prompt tokens": round(bound, 2),
        "prompt tokens": round(mean, 1),
        "shared": shared,
        **{f"{side} peak memory / weights": round(value, 2) for side, value in memory.items()},
        "memory target": MEMORY_TARGET,
        "memory met": memory["qwen3_npu"] <= MEMORY_TARGET,
        "weights GB": round(weights / 1e9, 2),
        "largest difference of log-likelihoods": max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)),
    }


def one_side(side: str, model: Path, data: Path, questions: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(model), "--data", str(data)]
    command += ["--questions", str(questions)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


if __name__ == "__main__":
    main()
