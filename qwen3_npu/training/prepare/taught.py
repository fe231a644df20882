"""What an instruction training teaches about prompts; its checkpoints carry it, so that they are asked the same way."""

from __future__ import annotations

from typing import Any

from qwen3_npu import log
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.data.text.prompt_types import resolved
from qwen3_npu.data.text.tokenizer import TokenizerFolder, open_tokenizer
from qwen3_npu.data.train.data_path import blend
from qwen3_npu.data.train.token_record import find_record


def taught(args: PretrainArgs) -> dict[str, Any]:
    """Entries of the saved args: prompt_type, enable_thinking (true, false, none) and tokenizer_digest.

    The records beside the data say them (`token_record.made`); where data have none, the training's --prompt-type does,
    as MindSpeed-LLM's scripts give it. Empty for text, and for data that differ.
    """
    if not args.data.is_instruction:
        return {}
    prefixes = blend(args.data.data_path)[0]
    records = [find_record(f"{prefix}_packed_input_ids_document") for prefix in prefixes]
    made = [dict(record.made) if record else {} for record in records]
    folder = args.data.tokenizer_name_or_path
    tokenizer = open_tokenizer(folder) if folder else None
    given, thinking = args.instruction.prompt_type, args.instruction.enable_thinking.lower()
    if given is not None and tokenizer is not None:
        given = resolved(given, tokenizer)
    if any(one.get("prompt_type") != made[0].get("prompt_type") for one in made):
        log.warning_once("--data-path: the data sets were written with different --prompt-type; none is recorded")
        return {}
    found = made[0].get("prompt_type")
    if found is None:
        if given in (None, "auto"):
            return {}
        return {"prompt_type": given, "enable_thinking": thinking, **_digest(made[0], tokenizer)}
    if given not in (None, "auto", found):
        log.warning_once(f"--prompt-type {given}: the data were written with {found}, which is what is learned")
    thinking = made[0].get("enable_thinking", "none")
    return {"prompt_type": found, "enable_thinking": thinking, **_digest(made[0], tokenizer)}


def _digest(made: dict[str, Any], tokenizer: TokenizerFolder | None) -> dict[str, Any]:
    digest = made.get("tokenizer") or (tokenizer.identity if tokenizer else None)
    return {"tokenizer_digest": digest} if digest else {}
