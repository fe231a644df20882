"""Scripts of generation and evaluation as a user starts them; tests/parallel runs each of them in its layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quiz
import tiny

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "examples" / "qwen3"


class Ran:
    """A finished script."""

    def __init__(self, process: subprocess.Popen, typed: str, folder: Path) -> None:
        self.out, _ = process.communicate(typed, timeout=240)
        self.code, self.folder = process.returncode, folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Scripts, run at the same time: each spends most of its time on starting."""
    root = tmp_path_factory.mktemp("examples")
    model = quiz.write_tokenizer(tiny.write_model(root / "hf", tiny.arch(vocab_size=800)))
    mmlu = quiz.write_mmlu(root / "mmlu" / "data", 2)
    given = {
        "generate_qwen3_14b_ptd": {"PREDICT_DATA": "Once upon", "MAX_NEW_TOKENS": "4", "TASK": "greedy do_sample"},
        "chat_qwen3_14b_ptd": {"MAX_NEW_TOKENS": "4", "TP": "2", "NPUS_PER_NODE": "2"},
        "evaluate_qwen3_14b_ptd": {"DATA_PATH": str(mmlu)},
    }
    started = {}
    for number, (name, variables) in enumerate(given.items()):
        folder = root / name
        folder.mkdir()
        common = {"HF_DIR": str(model), "CKPT_LOAD_DIR": str(model), "TP": "1", "NPUS_PER_NODE": "1"}
        common |= {"MASTER_PORT": str(6100 + os.getpid() % 800 * 8 + number), "PYTHON": sys.executable}
        process = subprocess.Popen(
            ["bash", str(SCRIPTS / f"{name}.sh"), "--device", "cpu", "--no-bf16"],
            env=os.environ | common | variables | {"OMP_NUM_THREADS": "1"},
            cwd=folder,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started[name] = process, folder
    typed = {"chat_qwen3_14b_ptd": "hello\n/clear\nhello\n/exit\n"}
    return {name: Ran(process, typed.get(name, ""), folder) for name, (process, folder) in started.items()}


def test_generate(ran: dict[str, Ran]) -> None:
    run = ran["generate_qwen3_14b_ptd"]
    assert run.code == 0, run.out[-3000:]
    lines = (run.folder / "text_generation_result.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["task"] for record in records] == ["greedy", "do_sample"]
    assert records[0]["prompt"] == "<|im_start|>user\nOnce upon<|im_end|>\n<|im_start|>assistant\n"
    assert 1 <= len(records[0]["tokens"]) <= 4
    assert records[0]["answer"] in (run.folder / "text_generation_result.txt").read_text()


def test_chat(ran: dict[str, Ran]) -> None:
    run = ran["chat_qwen3_14b_ptd"]
    assert run.code == 0, run.out[-3000:]
    assert run.out.count("qwen3_npu: ") == 2


def test_evaluate(ran: dict[str, Ran]) -> None:
    run = ran["evaluate_qwen3_14b_ptd"]
    assert run.code == 0, run.out[-3000:]
    assert "mmlu acc" in run.out
    assert json.loads((run.folder / "results.json").read_text())["results"]["mmlu"]["questions"] == 9
