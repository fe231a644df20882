#!/usr/bin/env python3
"""How fast `preprocess_data.py` is, beside others on the same machine in the same run. Prints JSON.

    python benchmarks/preprocess.py --tokenizer DIR --input text.jsonl [--megatron DIR] [--repeats 3] [--workers 2]

Whole processes are timed, start-up included. What is measured beside:
  ceiling        the same tokens with nothing else: load the library, encode all texts, write nothing
  megatron       Megatron-LM's tools/preprocess_data.py (--megatron: a checkout of it that runs here), or without one
  like_megatron  what it does: a pool of processes, transformers' fast tokenizer called per document, a write for each
  like_mindspeed what MindSpeed-LLM's Alpaca handler does: datasets.map with processes, the tokenizer called per message
Alpaca records are cut from the same texts, so they are distinct as well.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("fastokens", "tokenizers", "transformers", "datasets", "orjson", "pyarrow", "numpy")

CEILING = """
import sys, time, orjson
texts = [orjson.loads(line)["text"] for line in open(sys.argv[2], "rb")]
size = 1 << 20
batches, batch, length = [], [], 0
for text in texts:
    batch.append(text); length += len(text)
    if length >= size: batches.append(batch); batch, length = [], 0
batches.append(batch)
start = time.perf_counter()
try:
    from fastokens import Tokenizer
    encode = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode_batch_flat
except ImportError:
    from tokenizers import Tokenizer
    encode = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode_batch_fast
loaded = time.perf_counter()
for batch in batches: encode(batch)
end = time.perf_counter()
print(loaded - start, end - loaded)
"""

LIKE_MEGATRON = """
import json, multiprocessing, sys
import numpy as np
from transformers import AutoTokenizer

def start(path):
    global tokenizer
    tokenizer = AutoTokenizer.from_pretrained(path)

def encode(line):
    return tokenizer(json.loads(line)["text"])["input_ids"] + [tokenizer.eos_token_id]

if __name__ == "__main__":
    path, source, target, workers = sys.argv[1:]
    with multiprocessing.get_context("fork").Pool(int(workers), start, (path,)) as pool, open(target, "wb") as out:
        for ids in pool.imap(encode, open(source, encoding="utf-8"), 32):
            out.write(np.array(ids, np.int32).tobytes())
"""

LIKE_MINDSPEED = """
import sys
import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer

path, source, target, workers = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)

def align(row):
    question = "\\n".join(x for x in (row["instruction"], row["input"]) if x)
    answer = {"role": "assistant", "content": row["output"]}
    return {"prompt": [{"role": "user", "content": question}], "response": [answer]}

def encode(row):
    given = f"<|im_start|>user\\n{row['prompt'][0]['content']}<|im_end|>\\n<|im_start|>assistant\\n"
    source = tokenizer.encode(given, add_special_tokens=False)
    source += tokenizer.encode("<think>\\n\\n</think>\\n\\n", add_special_tokens=False)
    answer = tokenizer.encode(row["response"][0]["content"] + "<|im_end|>\\n", add_special_tokens=False)
    ids = source + answer
    return {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "labels": [[-100] * len(source) + answer]}

rows = load_dataset("json", data_files=source, split="train", cache_dir=target + ".cache")
rows = rows.map(align, num_proc=int(workers), remove_columns=rows.column_names)
rows = rows.map(encode, num_proc=int(workers), remove_columns=rows.column_names)
files = {key: open(f"{target}_{key}.bin", "wb") for key in ("input_ids", "attention_mask", "labels")}
for batch in rows.iter(batch_size=50):
    for key, file in files.items():
        for sentences in batch[key]:
            for sentence in sentences:
                file.write(np.array(sentence, np.int32).tobytes())
"""


def measure(command: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """Seconds of a whole process and the most memory that it and its children held, in MB."""
    start, most = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=said, stderr=said
        )

        def watch() -> None:
            nonlocal most
            while process.poll() is None:
                most = max(most, _memory(process.pid))
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        seconds = time.perf_counter() - start
        watcher.join()
        said.seek(0)
        text = said.read().decode(errors="replace")
    if status:
        sys.exit(f"{shlex.join(command)} failed:\n{text[-2000:]}")
    result = {"seconds": seconds, "peak_mb": most / 1e6}
    if command[1] == "-c" and command[2] == CEILING:
        result["load_seconds"], result["encode_seconds"] = map(float, text.split()[-2:])
    return result


def _memory(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    except psutil.Error:
        return 0


def medians(runs: list[dict[str, float]]) -> dict[str, object]:
    """The median of each figure; all times as well."""
    found: dict[str, object] = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
    found["all_seconds"] = [round(run["seconds"], 2) for run in runs]
    return found


def make_alpaca(source: Path, target: Path, size: int) -> int:
    """Alpaca records of about 1 kB, cut from texts; how many."""
    count = written = 0
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
        for line in lines:
            text = json.loads(line)["text"]
            for start in range(0, len(text) - 1000, 1000):
                row = {
                    "instruction": text[start : start + 150],
                    "input": "",
                    "output": text[start + 150 : start + 1000],
                }
                written += out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            if written > size:
                break
    return count


def version(name: str) -> str | None:
    """Of an installed library."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commands(args: argparse.Namespace, folder: Path, alpaca: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """What is measured: name -> (command, environment)."""
    python, tokenizer, workers = sys.executable, args.tokenizer, str(args.workers)
    common = ["--tokenizer-name-or-path", tokenizer, "--workers", workers]
    ours = [python, "preprocess_data.py", *common, "--output-prefix"]
    text = ["--input", args.input, "--handler-name", "GeneralPretrainHandler", "--append-eod"]
    sft = ["--input", str(alpaca), "--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    like = ["-c", LIKE_MEGATRON, tokenizer, args.input, str(folder / "like.bin"), workers]
    found = {
        "pretrain": ([*ours, str(folder / "ours"), *text], {}),
        "ceiling": ([python, "-c", CEILING, tokenizer, args.input], paths | {"RAYON_NUM_THREADS": workers}),
        "like_megatron": ([python, *like], {"TOKENIZERS_PARALLELISM": "false"}),
        "alpaca": ([*ours, str(folder / "chat"), *sft], {}),
        "like_mindspeed": (
            [python, "-c", LIKE_MINDSPEED, tokenizer, str(alpaca), str(folder / "ms"), workers],
            {"TOKENIZERS_PARALLELISM": "false"},
        ),
    }
    if args.megatron:
        tool = [python, f"{args.megatron}/tools/preprocess_data.py", "--tokenizer-type", "HuggingFaceTokenizer"]
        tool += ["--tokenizer-model", tokenizer, "--workers", workers, "--append-eod"]
        tool += ["--input", args.input, "--output-prefix", str(folder / "megatron")]
        path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), args.megatron])
        found["megatron"] = (tool, {"PYTHONPATH": path})
        del found["like_megatron"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of the Qwen3 tokenizer")
    parser.add_argument("--input", required=True, help=".jsonl of distinct texts under `text`, 64 MB or so")
    parser.add_argument("--megatron", help="checkout of Megatron-LM")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--alpaca-mb", type=float, default=20, help="size of the Alpaca records cut from the input")
    args = parser.parse_args()
    args.input, args.tokenizer = os.path.abspath(args.input), os.path.abspath(args.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alpaca = folder / "alpaca.jsonl"
        records = make_alpaca(Path(args.input), alpaca, int(args.alpaca_mb * 1e6))
        runs: dict[str, list[dict[str, float]]] = {}
        # One after the other and then again: a machine that slows down slows down all of them.
        for _ in range(args.repeats):
            for what, (command, environment) in commands(args, folder, alpaca).items():
                runs.setdefault(what, []).append(measure(command, environment))
        tokens = os.path.getsize(folder / "ours_text_document.bin") // 4
        same = None
        if args.megatron:
            made = [(folder / f"{who}_text_document.bin").read_bytes() for who in ("ours", "megatron")]
            same = made[0] == made[1]
        megabytes = [os.path.getsize(p) / 1e6 for p in (args.input, alpaca)]
    results = {what: medians(found) for what, found in runs.items()}
    seconds = {what: statistics.median(run["seconds"] for run in found) for what, found in runs.items()}
    load, encode = (results["ceiling"][key] for key in ("load_seconds", "encode_seconds"))
    peer = "megatron" if args.megatron else "like_megatron"
    report = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]},
        "versions": {library: version(library) for library in LIBRARIES},
        "input": {
            "text_mb": round(megabytes[0], 1),
            "tokens": tokens,
            "alpaca_mb": round(megabytes[1], 1),
            "records": records,
        },
        "medians": results,
        "pretrain": {
            "mb_per_s": round(megabytes[0] / seconds["pretrain"], 1),
            "tokens_per_s": round(tokens / seconds["pretrain"]),
            "times_faster_than_" + peer: round(seconds[peer] / seconds["pretrain"], 1),
            "same_bytes_as_megatron": same,
            "times_the_ceiling_of_load_and_encode": round(seconds["pretrain"] / (float(load) + float(encode)), 2),
            "times_the_ceiling_process": round(seconds["pretrain"] / seconds["ceiling"], 2),
        },
        "alpaca": {
            "records_per_s": round(records / seconds["alpaca"]),
            "times_faster_than_like_mindspeed": round(seconds["like_mindspeed"] / seconds["alpaca"], 1),
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
