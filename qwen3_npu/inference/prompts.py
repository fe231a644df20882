"""Prompts from --prompt and --predict-data, and records of other files that hold conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen3_npu.args.inference import DEFAULT_PROMPT, GenerateArgs
from qwen3_npu.data.preprocess.record_formats import ALPACA, OPENAI, SHAREGPT, Columns, alpaca_turns, sharegpt_turns
from qwen3_npu.data.read.find import TEXT, InputFile, find_files
from qwen3_npu.data.read.open import Inputs
from qwen3_npu.data.text.conversation import ASSISTANT, SYSTEM, USER, Conversation, Message
from qwen3_npu.data.text.messages import read_messages
from qwen3_npu.errors import UsageError

_PROMPTS = ("prompt", "instruction", "question")
# All columns that are used; of a table only these are read.
COLUMNS = (*_PROMPTS, "messages", "conversations", "system", "tools", "history", "input", "output", "answer", "text")


def read_prompts(args: GenerateArgs) -> list[Conversation]:
    """All prompts, those of --prompt first.

    Raises:
        UsageError: a file has no prompts, or a line is no prompt.
    """
    prompts = [_given("--prompt", text) for text in args.prompt or ()]
    if args.predict_data is None:
        return prompts or ([single_prompt(DEFAULT_PROMPT)] if args.task != ["chat"] else [])
    path = Path(args.predict_data)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a text too long for a name, or with a zero byte
        is_file = False
    if not is_file:
        if path.suffix in (".jsonl", ".json", ".txt"):
            raise UsageError(f"--predict-data {path}: no such file")
        return [*prompts, _given("--predict-data", args.predict_data)]
    for where, record in read_records(args.predict_data, "--predict-data"):
        try:
            prompts.append(_prompt(record))
        except ValueError as error:
            raise UsageError(f"--predict-data {where}: {error}") from None
    if not prompts:
        raise UsageError(f"--predict-data {path} holds no prompts")
    return prompts


def _given(flag: str, text: str) -> Conversation:
    """A prompt of the command line. Bytes that are not UTF-8, which arrive as lone surrogates, are refused."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag}: the text is not UTF-8 (character {error.start + 1})") from None
    return single_prompt(text)


def single_prompt(text: str) -> Conversation:
    """A question and nothing else."""
    return Conversation((Message(USER, text),))


def read_records(
    path: str, flag: str, columns: tuple[str, ...] = COLUMNS
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """The records of a data file in any format of preprocess_data.py, and the place of each.

    A line of JSON that is a text, and a line of a text file, is a record with the column `text`.

    Args:
        flag: the flag that names the file, for messages.

    Raises:
        UsageError: the file cannot be read, or a record of it.
    """
    try:
        try:
            files = find_files([path])
        except UsageError:
            if not Path(path).is_file() or Path(path).stat().st_size == 0:
                raise
            files = [
                InputFile(Path(path), TEXT, None, Path(path).stat().st_size)
            ]  # the ending of the name says no format
        for block in Inputs(tuple(files)).blocks(columns):
            for number, item in zip(block.numbers, block.items, strict=True):
                where = f"{block.file}, line {number}"
                try:
                    text = json.loads(item) if isinstance(item, bytes) and item.lstrip()[:1] == b'"' else None
                    yield where, {"text": text} if isinstance(text, str) else block.decode(item)
                except ValueError as error:
                    raise UsageError(f"--input {where}: {error}") from None
    except UsageError as error:
        raise UsageError(str(error).replace("--input", flag, 1)) from None


def _prompt(record: Mapping[str, object]) -> Conversation:
    """The prompt in a record. Raises: ValueError: there is none."""
    if any(isinstance(record.get(name), list) for name in ("messages", "conversations")):
        return waiting(conversation_of(record, {}))
    for name in ("text", *_PROMPTS):
        if isinstance(text := record.get(name), str):
            extra, system = record.get("input"), record.get("system") or None
            if system is not None and not isinstance(system, str):
                raise ValueError(f"column 'system' is not text but {type(system).__name__}")
            return single_prompt(f"{text}\n{extra}" if isinstance(extra, str) and extra else text)._replace(
                system=system
            )
    if "messages" in record:
        raise ValueError("messages are not a list")
    raise ValueError(f"no prompt, instruction, question or messages (there are {', '.join(map(str, record))})")


def waiting(conversation: Conversation) -> Conversation:
    """The conversation itself. Raises: ValueError: it does not end with a question."""
    if not conversation.messages:
        raise ValueError("no message to answer")
    if conversation.messages[-1].role in (ASSISTANT, SYSTEM):
        raise ValueError(f"the last message is the {conversation.messages[-1].role}'s; there is nothing to answer")
    return conversation


def conversation_of(record: Mapping[str, object], keys: Mapping[str, object]) -> Conversation:
    """The conversation in a record in OpenAI's, ShareGPT's or Alpaca's form, which its columns tell.

    Args:
        keys: --map-keys, of the form that the record has.

    Returns:
        An Alpaca record without the answer, the others with all messages.

    Raises:
        ValueError: it is none of them.
        UsageError: --map-keys names something that such records do not have.
    """
    names = [str(keys["messages"])] if keys.get("messages") else ["messages", "conversations"]
    column = next((name for name in names if record.get(name) is not None), None)
    if column is not None:
        listed = record[column]
        first = listed[0] if isinstance(listed, list) and listed else None
        if "tags" in keys or (isinstance(first, dict) and "from" in first and "role" not in first):
            columns = Columns(SHAREGPT, {**keys, "messages": column}, has_tags=True)
            return sharegpt_turns(record, columns)
        columns = Columns(OPENAI, {**keys, "messages": column})
        return read_messages(listed, columns.get(record, "tools"), columns.optional_text(record, "system"))
    columns = Columns({**ALPACA, "history": "history", "system": "system"}, keys)
    return alpaca_turns(record, columns)
