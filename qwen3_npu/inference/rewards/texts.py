"""Read answers to be scored from a file: single answers, or a chosen and a rejected one to the same prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from qwen3_npu.data.preprocess.record_formats import (
    ALPACA,
    ALPACA_PAIRS,
    SHAREGPT_PAIRS,
    Columns,
    alpaca,
    alpaca_pair,
    sharegpt_pair,
)
from qwen3_npu.data.text.conversation import Conversation, Message, PreferencePair, checked_conversation
from qwen3_npu.data.text.messages import read_messages
from qwen3_npu.data.text.templates import render_answer, render_pair
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.prompts import COLUMNS, conversation_of, read_records
from qwen3_npu.inference.text import Writer

PAIR = ("chosen", "rejected")
_PROMPTS, _ANSWERS = ("instruction", "prompt", "question"), ("output", "response", "completion", "answer")
_COLUMNS = tuple(dict.fromkeys((*COLUMNS, *PAIR, *_ANSWERS)))


@dataclasses.dataclass(frozen=True)
class Scored:
    """One text to be scored.

    Attributes:
        record: index of its record in the file.
        name: its role there: answer, chosen, rejected or text.
        tokens: as in training.
    """

    record: int
    name: str
    prompt: str
    answer: str
    tokens: tuple[int, ...]


def read_texts(path: str, writer: Writer, positions: int) -> list[Scored]:
    """Every answer of a file.

    Raises:
        UsageError: the file cannot be read, or a record holds nothing to score or more tokens than the model can see.
    """
    found: list[Scored] = []
    for number, (where, record) in enumerate(read_records(path, "--predict-data", _COLUMNS)):
        try:
            texts = _texts(record, writer)
        except ValueError as error:
            raise UsageError(f"--predict-data {where}: {error}") from None
        for name, (prompt, answer) in texts.items():
            tokens = tuple(writer.encoder.encode([*prompt, *answer]).ids.tolist())
            if not 0 < len(tokens) <= positions:
                raise UsageError(
                    f"--predict-data {where}: {name} has {len(tokens)} tokens; from 1 to the model's {positions} "
                    f"positions are expected"
                )
            found.append(Scored(number, name, "".join(prompt), answer="".join(answer), tokens=tokens))
    if not found:
        raise UsageError(f"--predict-data {path} holds nothing to score")
    return found


def _texts(record: Mapping[str, object], writer: Writer) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """Name -> strings of prompt and answer, which are encoded separately. Raises: ValueError: there are none."""
    if writer.args.template is None:
        if not isinstance(text := record.get("text"), str):
            raise ValueError("without a template (--prompt-type none) a record has a column text")
        return {"text": ([], [text])}
    if all(record.get(name) is not None for name in PAIR):
        return _pair_texts(record, writer)
    conversation = _with_system(_answered(record), writer)
    *before, answer = conversation.messages
    return {"answer": _rendered(conversation._replace(messages=tuple(before)), answer, writer)}


def _pair_texts(record: Mapping[str, object], writer: Writer) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    given = [record[name] for name in PAIR if record[name]]
    if all(isinstance(answer, list) and isinstance(answer[0], dict) for answer in given):
        conversations = [_with_system(checked_conversation(read_messages(record[name])), writer) for name in PAIR]
        return {
            name: _rendered(one._replace(messages=one.messages[:-1]), one.messages[-1], writer)
            for name, one in zip(PAIR, conversations, strict=True)
        }
    if isinstance(record["chosen"], dict):
        pair = sharegpt_pair(record, Columns(SHAREGPT_PAIRS, {"system": "system"} if "system" in record else None))
    else:
        pair = alpaca_pair(record, Columns(_named(record, ALPACA_PAIRS), None))
    pair = PreferencePair(_with_system(pair.prompt, writer), pair.chosen, pair.rejected)
    prompt, answers = render_pair(pair, writer.template, writer.args.thinking)
    return {name: (prompt, answer) for name, answer in zip(PAIR, answers, strict=True)}


def _answered(record: Mapping[str, object]) -> Conversation:
    """A conversation that ends with an answer. Raises: ValueError: it does not."""
    if any(isinstance(record.get(name), list) for name in ("messages", "conversations")):
        return checked_conversation(conversation_of(record, {}))
    return alpaca(record, Columns(_named(record, ALPACA), None))


def _named(record: Mapping[str, object], names: Mapping[str, str | None]) -> dict[str, str | None]:
    """The column names of this record."""
    prompt = next((name for name in _PROMPTS if name in record), "instruction")
    answer = next((name for name in _ANSWERS if record.get(name) is not None), "output")
    optional = {name: name for name in ("history", "system") if name in record}
    return {**names, **optional, "prompt": prompt, "response": answer}


def _with_system(conversation: Conversation, writer: Writer) -> Conversation:
    if conversation.system is None and writer.args.system:
        return conversation._replace(system=writer.args.system)
    return conversation


def _rendered(prompt: Conversation, answer: Message, writer: Writer) -> tuple[Sequence[str], Sequence[str]]:
    return render_answer(prompt, answer, writer.template, writer.args.thinking)
