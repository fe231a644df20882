"""Distinct text for benchmarks, and records cut from it."""

from __future__ import annotations

import itertools
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def texts(words: list[str]) -> Iterator[str]:
    """Endless distinct texts: one third sources of installed packages while there are any, the rest walks."""
    rng = random.Random(1)
    known = " ".join(Path(name).read_text(encoding="utf-8") for name in words).split(" ")
    after: dict[str, list[str]] = {}
    for one, two in itertools.pairwise(known):
        after.setdefault(one, []).append(two)
    sources = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    rng.shuffle(sources)
    seen = set()
    for count in itertools.count():
        if count % 3 == 0 and sources:
            text = sources.pop().read_text(encoding="utf-8", errors="ignore")[:50_000]
            if text and text not in seen:
                seen.add(text)
                yield text
            continue
        word, walk = rng.choice(known), []
        for _ in range(rng.randint(200, 3000)):
            walk.append(word)
            if rng.random() < 0.03:
                letters = "".join(rng.choices("abcdefghijklmnoprstuvwyz", k=rng.randint(3, 11)))
                walk.append(letters if rng.random() < 0.7 else str(rng.randrange(10**6)))
            word = rng.choice(after.get(word) or known)
        yield " ".join(walk)


def make_text(words: list[str], target: Path, size: int) -> None:
    """.jsonl of about `size` bytes."""
    written = 0
    with target.open("w", encoding="utf-8") as out:
        for text in texts(words):
            written += out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if written >= size:
                return


def make_alpaca(source: Path, target: Path, size: int) -> int:
    """Alpaca records, as long as Stanford Alpaca's (52 thousand in 23 MB), cut from such texts; how many."""
    count = written = 0
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
        for line in lines:
            text = json.loads(line)["text"]
            for start in range(0, len(text) - 400, 400):
                question, answer = text[start : start + 80], text[start + 80 : start + 400]
                row = {"instruction": question, "input": "", "output": answer}
                written += out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            if written > size:
                break
    return count
