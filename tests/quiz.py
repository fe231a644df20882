"""A small MMLU in the release's layout, with answers that tables of numbers spoil, and a tokenizer to read it with."""

from __future__ import annotations

import csv
import random
from pathlib import Path

SUBJECTS = ("anatomy", "formal_logic", "us_foreign_policy")
_WORDS = ("the", "of", "bone", "nerve", "logic", "premise", "treaty", "state", "law", "war", "set", "all", "cell")


def write_mmlu(root: Path, questions: int = 9) -> Path:
    """`root`/dev and `root`/test, three subjects of different length."""
    draw = random.Random(0)
    for split, count in (("dev", 5), ("test", questions)):
        (root / split).mkdir(parents=True)
        for extra, subject in enumerate(SUBJECTS):
            rows = []
            for number in range(count + extra):
                text = " ".join(draw.choices(_WORDS, k=draw.randint(3, 25)))
                choices = [" ".join(draw.choices(_WORDS, k=draw.randint(1, 4))) for _ in range(4)]
                if number == 1:
                    choices = ["None", "NA", "N/A", "nan"]
                elif number == 2:
                    choices = ["0", "1.50", "", '"quoted", with a comma']
                rows.append([f"{text.capitalize()}?\nWhich", *choices, "ABCD"[number % 4]])
            with (root / split / f"{subject}_{split}.csv").open("w", newline="") as stream:
                csv.writer(stream).writerows(rows)
    return root


def write_tokenizer(folder: Path) -> Path:
    """The example's tokenizer of Qwen's kind, trained on a text."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "quickstart"))
    import make_model

    text = Path(make_model.__file__).with_name("text.txt")
    folder.mkdir(parents=True, exist_ok=True)
    make_model.train_tokenizer(text, folder, 768)
    return folder
