"""README.md of an export: a model card of the Hugging Face Hub that describes the model and its training. No torch.

Format: https://huggingface.co/docs/hub/model-cards. The facts are the args of the converted checkpoint. Folders are
written without their paths. An existing README.md that was not written here is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_npu import __version__, log
from qwen3_npu.errors import UsageError, printable
from qwen3_npu.files import write_text
from qwen3_npu.schema import read_record, shown

CARD = "README.md"
_MARK = "<!-- written by qwen3_npu"
# Entries of a checkpoint's args, in the order of the card.
_TRAINED = {
    "stage": "stage",
    "iteration": "steps",
    "consumed_train_samples": "samples seen",
    "seq_length": "tokens of a sample, at most",
    "global_batch_size": "samples per step",
    "lr": "learning rate",
    "min_lr": "lowest learning rate",
    "lr_decay_style": "schedule",
    "loss_normalization": "loss normalization",
    "prompt_type": "prompts are written as",
    "enable_thinking": "thinking",
    "seed": "seed",
}


def write_card(folder: Path, title: str, facts: Mapping[str, Any], args: argparse.Namespace, *, scores: Path) -> None:
    """Write the model card into an export.

    Args:
        title: name of the model.
        facts: of the sources: "source" and, if there is one, "adapter", with their folder and layout.
        args: of the checkpoint that was trained last; empty if a Hugging Face model is converted.
        scores: results.json of evaluation.py; left out if it is not there.
    """
    path = folder / CARD
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        log.info(f"{path} was not written by convert_ckpt.py and is kept; no model card is written")
        return
    lines = ["---", "library_name: transformers", "tags:", "- qwen3", "- qwen3_npu", "---", ""]
    lines += [f"{_MARK} {__version__}; a conversion writes it anew -->", f"# {title}", ""]
    for name, fact in facts.items():
        lines.append(f"- {name}: {Path(fact['folder']).name} ({fact['layout']})")
    lines += [*_trained(vars(args)), *_scores(scores)]
    write_text(path, "\n".join(lines) + "\n")


def _trained(args: Mapping[str, Any]) -> list[str]:
    """The rows about the training; empty if the checkpoint was not saved by this project's training."""
    if "data_digest" not in args:
        return []
    lines = ["", "## Training", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {shown(args[key])} |" for key, name in _TRAINED.items() if args.get(key) is not None]
    for prefix, digest in zip(args.get("data_path", ()), args["data_digest"], strict=False):
        lines.append(f"| data | {printable(Path(str(prefix)).name)} (SHA-256 {shown(digest)}) |")
    return lines


def _scores(path: Path) -> list[str]:
    """The scores of evaluation.py, if its --output-dir was the checkpoint's folder."""
    if not path.is_file():
        return []
    lines = ["", "## Scores", "", "| task | metric | questions | score |", "|---|---|---|---|"]
    try:
        tasks = read_record(path).record("results")
        for task in tasks.fields:
            metrics = tasks.record(task).record("metrics")
            for name in metrics.fields:
                total = metrics.record(name).record("total")
                lines.append(f"| {task} | {name} | {total.integer('count')} | {100 * total.number('mean'):.2f} % |")
    except UsageError as error:
        log.warning(f"the model card has no scores: {error}")
        return []
    return lines
