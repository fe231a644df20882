"""Prompts from --prompt and --predict-data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3_npu.args.inference import GenerateArgs
from qwen3_npu.data.text.conversation import ASSISTANT, USER, Message
from qwen3_npu.errors import UsageError

Prompt = tuple[Message, ...]


def read_prompts(args: GenerateArgs) -> list[Prompt]:
    """All prompts, those of --prompt first.

    Raises:
        UsageError: a file has no prompts, or a line that is none.
    """
    prompts = [_single(text) for text in args.prompt or ()]
    if args.predict_data is None:
        return prompts
    path = Path(args.predict_data)
    try:
        is_file = path.is_file()
    except OSError:  # a text too long for a name
        is_file = False
    if not is_file:
        if path.suffix in (".jsonl", ".json", ".txt"):
            raise UsageError(f"--predict-data {path}: no such file")
        return [*prompts, _single(args.predict_data)]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--predict-data {path} cannot be read: {error}") from None
    read = _record if path.suffix == ".jsonl" else _single
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(read(line))
            except ValueError as error:
                raise UsageError(f"--predict-data {path}, line {number}: {error}") from None
    if not prompts:
        raise UsageError(f"--predict-data {path} holds no prompts")
    return prompts


def _single(text: str) -> Prompt:
    return (Message(USER, text),)


def _record(line: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if isinstance(record, str):
        return _single(record)
    if not isinstance(record, dict):
        raise ValueError("an object or a text is expected")
    if "messages" in record:
        return messages_of(record["messages"])
    for name in ("prompt", "instruction", "question"):
        if isinstance(record.get(name), str):
            extra = record.get("input")
            return _single(f"{record[name]}\n{extra}" if isinstance(extra, str) and extra else record[name])
    raise ValueError("no prompt, instruction, question or messages")


def messages_of(value: Any) -> Prompt:
    """OpenAI's messages, without an answer to the last one.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("messages are not a list")
    found = []
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError('a message is {"role": .., "content": ..}, not ' + repr(message)[:80])
        found.append(Message(message["role"], message["content"]))
    if found[-1].role == ASSISTANT:
        raise ValueError("the last message is the assistant's; there is nothing to answer")
    return tuple(found)
