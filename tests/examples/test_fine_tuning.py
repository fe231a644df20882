"""The fine-tuning scripts as a user runs them, on a tiny model: data, training, merging, answers in transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 16
REAL = Path(os.environ.get("QWEN3_NPU_TEST_DATA", ROOT.parent / "shared" / "data")) / "sft" / "alpaca_en_demo.json"
ON_CPU = ["--device", "cpu", "--no-bf16", "--no-sequence-parallel", "--weight-decay", "0"]


def script(name: str, *flags: str, **environment: Any) -> str:
    """Run a script of examples/qwen3; its output."""
    env = {**os.environ, "PYTHON": sys.executable, "NPUS_PER_NODE": "1", "TP": "1", "PP": "1", "WORKERS": "1"}
    env |= {"MASTER_PORT": str(29500 + os.getpid() % 400), **{key: str(value) for key, value in environment.items()}}
    folder = Path(environment["FOLDER"])
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "qwen3" / name), *flags],
        env=env,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def records() -> list[dict[str, str]]:
    """Short Alpaca samples; sentences to finish where the real ones are not at hand."""
    if REAL.is_file():
        real = [r for r in json.loads(REAL.read_text(encoding="utf-8")) if len(r["output"]) > 10]
        return sorted(real, key=lambda r: len(r["instruction"] + r["input"] + r["output"]))[:SAMPLES]
    text = (ROOT / "examples" / "quickstart" / "text.txt").read_text(encoding="utf-8")
    sentences = sorted((s.split(" ") for s in re.findall(r"\S[^.]+\.", text)), key=len)
    halves = [(" ".join(words[:4]), " ".join(words[4:])) for words in sentences if len(words) > 5]
    return [{"instruction": first, "input": "", "output": rest} for first, rest in dict(halves).items()][:SAMPLES]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a tiny model `hf` whose tokenizer is trained on them, and prepared data `data/alpaca`."""
    folder = tmp_path_factory.mktemp("fine-tuning")
    samples = records()
    (folder / "alpaca.json").write_text(json.dumps(samples), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(" ".join(sample.values()) for sample in samples), encoding="utf-8")
    make = [sys.executable, str(ROOT / "examples" / "quickstart" / "make_model.py"), "--text", "text.txt"]
    subprocess.run([*make, "--out", "hf"], cwd=folder, check=True, capture_output=True)
    script(
        "data_convert_qwen3_instruction.sh",
        FOLDER=folder,
        INPUT="alpaca.json",
        OUTPUT_PREFIX="data/alpaca",
        TOKENIZER_PATH="hf",
        SEQ_LENGTH=512,
    )
    return folder


def test_full_fine_tuning_learns_its_answers(work: Path) -> None:
    from transformers import AutoModelForCausalLM

    from qwen3_npu.data.train.token_file import open_indexed

    output = script(
        "tune_qwen3_14b_4K_full_ptd.sh",
        *[*ON_CPU, "--lr", "3e-3", "--min-lr", "5e-4", "--log-interval", "10", "--enable-mg2hf-convert"],
        FOLDER=work,
        OMP_NUM_THREADS=2,
        HF_DIR="hf",
        CKPT_SAVE_DIR="full",
        DATA_PATH="data/alpaca",
        SEQ_LENGTH=512,
        MBS=8,
        GBS=8,
        TRAIN_ITERS=100,
    )
    losses = [float(loss) for loss in re.findall(r"\| loss ([\d.]+)", output)]
    assert losses[0] > 3
    assert losses[-1] < 0.1
    script("ckpt_convert_qwen3_mcore2hf.sh", FOLDER=work, MCORE_DIR="full", HF_OUT_DIR="trained")
    exported = work / "full" / "mg2hf_iteration100" / "model.safetensors"
    assert exported.read_bytes() == (work / "trained" / "model.safetensors").read_bytes()

    model = AutoModelForCausalLM.from_pretrained(work / "trained", dtype=torch.float32)
    ids, labels = (open_indexed(work / f"data/alpaca_packed_{name}_document") for name in ("input_ids", "labels"))
    ends = np.cumsum(ids.lengths)
    wrong = 0
    for start, end in zip(ends - ids.lengths, ends, strict=True):
        learned = np.flatnonzero(labels.tokens[start:end] != -100)
        prompt = torch.tensor(ids.tokens[start : start + learned[0]].astype(np.int64))[None]
        answer = ids.tokens[start + learned[0] : start + learned[-1] + 1].tolist()
        made = model.generate(prompt, do_sample=False, max_new_tokens=len(answer), eos_token_id=None, pad_token_id=0)
        wrong += made[0, prompt.shape[1] :].tolist() != answer
    assert wrong == 0, f"{wrong} of {len(ends)} answers are not reproduced"


def test_lora_scripts(work: Path) -> None:
    from transformers import AutoModelForCausalLM

    script("ckpt_convert_qwen3_hf2mcore.sh", FOLDER=work, HF_DIR="hf", MCORE_DIR="mcore", TP=1, PP=2)
    output = script(
        "tune_qwen3_14b_4K_lora_ptd.sh",
        *[*ON_CPU, "--lr", "5e-3", "--log-interval", "3", "--save-hf-interval", "12", "--hf-save-dir", "exported"],
        FOLDER=work,
        NPUS_PER_NODE=2,
        PP=2,
        HF_DIR="hf",
        CKPT_LOAD_DIR="mcore",
        CKPT_SAVE_DIR="lora",
        DATA_PATH="data/alpaca",
        SEQ_LENGTH=512,
        MBS=8,
        GBS=SAMPLES,
        TRAIN_ITERS=12,
    )
    assert "parameters are trained" in output
    losses = [float(loss) for loss in re.findall(r"\| loss ([\d.]+)", output)]
    assert losses[-1] < losses[0] - 0.05
    merged = {"FOLDER": work, "MCORE_DIR": "mcore", "LORA_DIR": "lora"}
    script("ckpt_convert_qwen3_mcore2hf_lora.sh", **merged, HF_OUT_DIR="merged")
    exported = work / "exported" / "mg2hf_iteration12" / "model.safetensors"
    assert exported.read_bytes() == (work / "merged" / "model.safetensors").read_bytes()
    script("ckpt_convert_qwen3_mcore2mcore_lora.sh", **merged, MERGED_DIR="merged_mcore", TP=2, PP=1)
    script("ckpt_convert_qwen3_mcore2hf.sh", FOLDER=work, MCORE_DIR="merged_mcore", HF_OUT_DIR="merged_again")
    tokens = torch.arange(40)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32)(tokens).logits
        for name in ("merged", "merged_again", "hf")
    ]
    assert torch.equal(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() > 0.01
