#!/usr/bin/env python3
"""How fast `preprocess_data.py` is, beside others on the same machine in the same run. Prints JSON.

    python benchmarks/preprocess.py --tokenizer DIR --words wiki.valid.tokens [--mb 64] [--big-mb 1000] [--megatron DIR]
    python benchmarks/preprocess.py --tokenizer DIR --input text.jsonl

Whole processes are timed, start-up included, one after the other and then all again, so that a machine that slows down
slows down both sides of a ratio; figures are medians of --repeats runs (others: --peer-repeats). CPU seconds tell how
far another load on the machine spoils the times.
What is measured beside:
  ceiling        the tokens with nothing else: load the library, read the texts, encode them, write nothing
  megatron       Megatron-LM's tools/preprocess_data.py (--megatron: a checkout of it that runs here), or without one
  like_megatron  what it does: a pool of processes, transformers' fast tokenizer called per document, a write for each
  like_mindspeed what MindSpeed-LLM's Alpaca handler does: datasets.map with processes, the tokenizer called per message
With --words, the text is made: walks along the words of those files with new words and numbers between them, and the
sources of installed packages; no document repeats. Alpaca records are cut from the same texts.
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
from texts import make_alpaca, make_text

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("fastokens", "tokenizers", "transformers", "datasets", "orjson", "pyarrow", "numpy")

CEILING = """
import sys, time, orjson
start = time.perf_counter()
try:
    from fastokens import Tokenizer
    encode = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode_batch_flat
except ImportError:
    from tokenizers import Tokenizer
    encode = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode_batch_fast
load, encoding, batch, length = time.perf_counter() - start, 0.0, [], 0
def flush():
    global encoding, batch, length
    start = time.perf_counter()
    encode(batch)
    encoding += time.perf_counter() - start
    batch, length = [], 0
for line in open(sys.argv[2], "rb"):
    batch.append(orjson.loads(line)["text"])
    length += len(batch[-1])
    if length >= 1 << 20: flush()
flush()
print(load, encoding)
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
import os, sys
import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer

path, source, target, workers = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)

def align(row):
    question = "\\n".join(x for x in (row["instruction"], row["input"]) if x)
    prompt, answer = {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}
    return {"prompt": [prompt], "response": [answer], "system": [""], "tools": [""]}

def encode(row):
    given = f"<|im_start|>user\\n{row['prompt'][0]['content']}<|im_end|>\\n<|im_start|>assistant\\n"
    source = tokenizer.encode(given, add_special_tokens=False)
    source += tokenizer.encode("<think>\\n\\n</think>\\n\\n", add_special_tokens=False)
    answer = tokenizer.encode(row["response"][0]["content"] + "<|im_end|>\\n", add_special_tokens=False)
    ids = source + answer
    return {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "labels": [[-100] * len(source) + answer]}

# A cache of its own: not what an earlier run left.
rows = load_dataset("json", data_files=source, split="train", cache_dir=f"{target}.{os.getpid()}")
rows = rows.map(align, num_proc=int(workers), remove_columns=rows.column_names)
rows = rows.filter(lambda row: len(row["prompt"]) != 0 and len(row["response"]) != 0)
rows = rows.map(encode, num_proc=int(workers), remove_columns=rows.column_names)
files = {key: open(f"{target}_{key}.bin", "wb") for key in ("input_ids", "attention_mask", "labels")}
for batch in rows.iter(batch_size=50):
    for key, file in files.items():
        for sentences in batch[key]:
            for sentence in sentences:
                file.write(np.array(sentence, np.int32).tobytes())
"""


def measure(command: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """Seconds of a whole process, CPU seconds and the most memory of it and its children, in MB."""
    most = 0
    with tempfile.TemporaryFile() as said:
        before, start = os.times(), time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=said, stderr=said
        )

        def watch() -> None:
            nonlocal most
            while process.poll() is None:
                most = max(most, _memory(process.pid))
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        seconds, after = time.perf_counter() - start, os.times()
        watcher.join()
        said.seek(0)
        text = said.read().decode(errors="replace")
    if status:
        sys.exit(f"{shlex.join(command)} failed:\n{text[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    result = {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": most / 1e6}
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


def each_time(slow: list[dict[str, float]], fast: list[dict[str, float]]) -> list[float]:
    """Ratios of runs that followed each other."""
    return [round(one["seconds"] / two["seconds"], 2) for one, two in zip(slow, fast, strict=True)]


def version(name: str) -> str | None:
    """Of an installed library."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commands(args: argparse.Namespace, folder: Path, alpaca: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """What is measured: name -> (command, environment)."""
    python, tokenizer, workers, source = sys.executable, args.tokenizer, str(args.workers), args.input
    ours = [python, "preprocess_data.py", "--tokenizer-name-or-path", tokenizer, "--workers", workers]
    text = ["--handler-name", "GeneralPretrainHandler", "--append-eod"]
    chat = ["--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3"]
    threads, single = {"RAYON_NUM_THREADS": workers}, {"TOKENIZERS_PARALLELISM": "false"}
    found = {
        "pretrain": ([*ours, *text, "--input", source, "--output-prefix", str(folder / "ours")], {}),
        "ceiling": ([python, "-c", CEILING, tokenizer, source], threads),
        "alpaca": ([*ours, *chat, "--input", str(alpaca), "--output-prefix", str(folder / "chat")], {}),
        "like_mindspeed": (
            [python, "-c", LIKE_MINDSPEED, tokenizer, str(alpaca), str(folder / "ms"), workers],
            single,
        ),
    }
    if args.megatron:
        tool = [python, f"{args.megatron}/tools/preprocess_data.py", "--tokenizer-type", "HuggingFaceTokenizer"]
        tool += ["--tokenizer-model", tokenizer, "--workers", workers, "--append-eod"]
        tool += ["--input", source, "--output-prefix", str(folder / "megatron")]
        path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), args.megatron])
        found["megatron"] = (tool, {"PYTHONPATH": path})
    else:
        like = [python, "-c", LIKE_MEGATRON, tokenizer, source, str(folder / "like.bin"), workers]
        found["like_megatron"] = (like, single)
    if args.big_mb:
        big = str(folder / "big.jsonl")
        found["big"] = ([*ours, *text, "--input", big, "--output-prefix", str(folder / "big")], {})
        found["big_ceiling"] = ([python, "-c", CEILING, tokenizer, big], threads)
    return found


def measured(
    args: argparse.Namespace, what: dict[str, tuple[list[str], dict[str, str]]]
) -> dict[str, list[dict[str, float]]]:
    """All runs. One command after the other and then again: a machine that slows down slows down all of them."""
    runs: dict[str, list[dict[str, float]]] = {}
    for turn in range(args.repeats):
        for name, (command, environment) in what.items():
            if turn < args.peer_repeats or name in ("pretrain", "ceiling", "alpaca"):
                print(f"{name} ..", file=sys.stderr, flush=True)
                runs.setdefault(name, []).append(measure(command, environment))
    return runs


def arguments() -> argparse.Namespace:
    """The flags, with full paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of the Qwen3 tokenizer")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", help=".jsonl of distinct texts under `text`, 64 MB or so")
    source.add_argument("--words", nargs="+", help="files of plain text to make such an input of")
    parser.add_argument("--mb", type=float, default=64, help="size of the input made of --words")
    parser.add_argument(
        "--big-mb", type=float, default=0, help="size of a bigger input, the same texts again and again"
    )
    parser.add_argument("--megatron", help="checkout of Megatron-LM")
    parser.add_argument("--repeats", type=int, default=5, help="runs of preprocess_data.py and of the ceiling")
    parser.add_argument("--peer-repeats", type=int, default=1, help="runs of the others and of the bigger input")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--alpaca-mb", type=float, default=64, help="size of the Alpaca records cut from the input")
    args = parser.parse_args()
    args.tokenizer = os.path.abspath(args.tokenizer)
    return args


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alpaca, made = folder / "alpaca.jsonl", folder / "text.jsonl"
        if args.words:
            make_text(args.words, made, int(args.mb * 1e6))
        args.input = os.path.abspath(args.input or made)
        records = make_alpaca(Path(args.input), alpaca, int(args.alpaca_mb * 1e6))
        sizes = {"text": os.path.getsize(args.input) / 1e6, "alpaca": os.path.getsize(alpaca) / 1e6}
        if args.big_mb:
            data = Path(args.input).read_bytes()
            with (folder / "big.jsonl").open("wb") as out:
                for _ in range(max(round(args.big_mb / sizes["text"]), 1)):
                    out.write(data)
            sizes["big"] = os.path.getsize(folder / "big.jsonl") / 1e6
        runs = measured(args, commands(args, folder, alpaca))
        tokens = os.path.getsize(folder / "ours_text_document.bin") // 4
        peer = folder / ("megatron_text_document.bin" if args.megatron else "like.bin")
        same = (folder / "ours_text_document.bin").read_bytes() == peer.read_bytes()
    seconds = {what: statistics.median(run["seconds"] for run in found) for what, found in runs.items()}
    cpu = {what: statistics.median(run["cpu_seconds"] for run in found) for what, found in runs.items()}
    peer_name = "megatron" if args.megatron else "like_megatron"

    def ratio(slow: str, fast: str) -> dict[str, float]:
        return {"time": round(seconds[slow] / seconds[fast], 2), "cpu": round(cpu[slow] / cpu[fast], 2)}

    report = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]},
        "versions": {library: version(library) for library in LIBRARIES},
        "input_mb": {what: round(size, 1) for what, size in sizes.items()},
        "tokens": tokens,
        "alpaca_records": records,
        "medians": {what: medians(found) for what, found in runs.items()},
        "pretrain": {
            "mb_per_s": round(sizes["text"] / seconds["pretrain"], 1),
            "tokens_per_s": round(tokens / seconds["pretrain"]),
            "times_faster_than_" + peer_name: ratio(peer_name, "pretrain"),
            "same_tokens_as_" + peer_name: same,
            "times_the_ceiling": ratio("pretrain", "ceiling"),
            "times_the_ceiling_each_time": each_time(runs["pretrain"], runs["ceiling"]),
        },
        "alpaca": {
            "records_per_s": round(records / seconds["alpaca"]),
            "times_faster_than_like_mindspeed": ratio("like_mindspeed", "alpaca"),
        },
    }
    if args.big_mb:
        report["big"] = {
            "mb_per_s": round(sizes["big"] / seconds["big"], 1),
            "times_the_ceiling": ratio("big", "big_ceiling"),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
