"""Carry the prompt settings of an instruction training from checkpoint to checkpoint.

A Megatron checkpoint stores them in its args, a Hugging Face model or adapter in a file beside the weights:

    qwen3_npu_prompts.json    {"prompt_type": "qwen3", "enable_thinking": "true", "tokenizer_digest": "..."}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qwen3_npu.args.convert import MEGATRON
from qwen3_npu.checkpoint.formats.folders import StoredModel
from qwen3_npu.checkpoint.formats.torch_read import checkpoint_args
from qwen3_npu.files import write_text
from qwen3_npu.schema import read_record

PROMPTS = "qwen3_npu_prompts.json"
PROMPT_TYPE, THINKING, TOKENIZER = _FIELDS = ("prompt_type", "enable_thinking", "tokenizer_digest")


def read_prompt_settings(found: StoredModel) -> dict[str, str]:
    """The prompt settings in a checkpoint; empty if it has none.

    Raises:
        UsageError: its file holds a value that is not understood.
    """
    if found.kind == MEGATRON:
        said = vars(checkpoint_args(found)[0])
        if not isinstance(said.get(PROMPT_TYPE), str):
            return {}
        # MindSpeed-LLM saves --enable-thinking as "true", "false" or "none" too; a bool is taken as its word.
        values = {name: said[name] for name in _FIELDS if isinstance(said.get(name), (str, bool))}
        return {name: str(value).lower() if name == THINKING else str(value) for name, value in values.items()}
    path = found.folder / PROMPTS
    if not path.exists():
        return {}
    record = read_record(path, strict=True)
    record.only(_FIELDS)
    given = {name: record.text(name) for name in record.fields if name != PROMPT_TYPE}
    return {PROMPT_TYPE: record.text(PROMPT_TYPE), **given}


def write_prompt_settings(folder: Path, prompts: Mapping[str, str]) -> None:
    """Write the file beside the weights of a Hugging Face model or adapter. It replaces an older one."""
    if prompts:
        write_text(folder / PROMPTS, json.dumps(dict(prompts), indent=1) + "\n")
    else:
        (folder / PROMPTS).unlink(missing_ok=True)
