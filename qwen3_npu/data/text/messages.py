"""OpenAI's messages (and what other trainers add to them) -> a conversation. The one reader of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from qwen3_npu.data.text.conversation import ASSISTANT, SYSTEM, TOOL, USER, Conversation, Message, calls_of, tools_of

_ROLES = {SYSTEM: SYSTEM, USER: USER, ASSISTANT: ASSISTANT, TOOL: TOOL, "function": TOOL}
# Keys that hold the thoughts of an answer, in transformers' order (utils/chat_template_utils.py).
REASONING = ("reasoning_content", "thinking", "reasoning")
# Keys that say whether an answer is learned; the value that says so, otherwise it is not.
# OpenAI's fine-tuning and TRL: weight; ms-swift: loss, loss_scale; axolotl: train, training, weight;
# MindSpeed-LLM: loss_weight.
LEARN_KEYS = ("weight", "loss_weight", "loss", "loss_scale", "loss_mask", "train", "training", "trainable", "learn")
MASK_KEYS = ("mask", "masked", "ignore", "ignore_loss")


def read_messages(messages: object, tools: object = None, system: str | None = None) -> Conversation:
    """Messages with role, content (text or typed parts), reasoning_content, tool_calls -> a conversation.

    It may end with a question (a prompt) or an answer; `conversation.checked` demands an answer.

    Args:
        messages: as OpenAI's chat API takes them; also `function_call` and role `function`, its older form.
        tools: a list, an object or their JSON.
        system: system message, if the messages have none.

    Raises:
        ValueError: they are no messages; says which and why.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"messages are no list of objects but {kind(messages)}")
    read = [_message(message, i) for i, message in enumerate(messages, start=1)]
    if read[0].role == SYSTEM:
        system, read = read[0].content, read[1:]
    return Conversation(tuple(read), system, tools_of(tools))


def _message(message: Mapping[str, object], place: int) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"message {place} has role {role!r}; known: {', '.join(_ROLES)}")
    role, content, calls = _ROLES[role], message.get("content"), message.get("tool_calls")
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if isinstance(content, list):
        content, thoughts, written = _parts(content, place)
        reasoning, calls = thoughts if reasoning is None else reasoning, calls or written
    if message.get("train_detail"):
        raise ValueError(f"message {place} has train_detail; an answer is learned completely or not at all (train)")
    if legacy := message.get("function_call"):
        if calls:
            raise ValueError(f"message {place} has tool_calls and function_call; they say the same, keep one")
        calls = [{"type": "function", "function": legacy}]
    if not isinstance(content, str) and not (content is None and role == ASSISTANT):
        raise ValueError(f"message {place} has no text as content but {kind(content)}")
    if not isinstance(reasoning, str | None):
        raise ValueError(f"message {place} has thoughts that are no text but {kind(reasoning)}")
    given = _for_templates(message, role, content, reasoning, calls=calls)
    if role != ASSISTANT:
        return Message(role, content or "", given=given)
    read = calls_of(calls) if calls else ()
    return Message(role, content or "", reasoning or None, read, learned=learned(message, place), given=given)


def _for_templates(
    message: Mapping[str, object], role: str, content: str | None, reasoning: str | None, *, calls: object
) -> dict[str, object]:
    """The message as transformers passes it to a chat template: without null keys, thoughts under all their names."""
    known = {"role", "content", "function_call", *LEARN_KEYS, *MASK_KEYS}
    found: dict[str, object] = {"role": role}
    if content is not None:
        found["content"] = content
    if reasoning is not None:
        found["thinking"] = reasoning
    found |= {key: value for key, value in message.items() if value is not None and key not in known}
    if reasoning is not None:
        found["reasoning_content"] = reasoning
    if calls:
        found["tool_calls"] = calls
    return found


def _parts(parts: Sequence[object], place: int) -> tuple[str, str | None, list[object]]:
    """Content in typed parts -> (text, thoughts, calls)."""
    texts: dict[str, list[str]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in parts:
        sort = part.get("type") if isinstance(part, Mapping) else None
        text = None
        if isinstance(part, Mapping) and sort in texts:
            text = next((part[key] for key in (str(sort), "value") if part.get(key) is not None), None)
        if not isinstance(text, str):
            raise ValueError(f"message {place} has content that is no text: {repr(part)[:80]}")
        texts[str(sort)].append(text)
    try:
        calls = [json.loads(text) for text in texts["tool_call"]]
    except ValueError as error:
        raise ValueError(f"message {place}: a function call is not JSON: {error}") from None
    return "".join(texts["text"]), "".join(texts["reasoning"]) or None, calls


def learned(message: Mapping[str, object], place: int) -> bool:
    """Whether an answer is learned, by the keys of known trainers. Raises: ValueError: a value is no yes or no."""
    said: dict[str, bool] = {}
    for keys, positive in ((LEARN_KEYS, True), (MASK_KEYS, False)):
        for key in keys:
            value = message.get(key)
            if value is None:
                continue
            # true and false are equal to 1 and 0; what a mask of 1 means is not agreed upon
            if not isinstance(value, bool if not positive else bool | int | float) or value not in (0, 1):
                expected = "0 and 1, true and false" if positive else "true and false"
                raise ValueError(f"message {place} has {key} {value!r}; only {expected} can be written")
            said[key] = bool(value) == positive
    if len(set(said.values())) > 1:
        raise ValueError(f"message {place} is to be learned and not: {', '.join(said)} disagree")
    return all(said.values())


def is_left_out(record: Mapping[str, object]) -> bool:
    """Whether a record as a whole must not be learned: false, a weight of 0, or a mask that is true.

    Other values beside the messages, such as a loss of 2.3 or a weight of 0.7, are taken as notes and ignored.
    """
    return any(
        value is False or (key != "loss" and type(value) in (int, float) and value == 0)
        for key in LEARN_KEYS
        if (value := record.get(key)) is not None
    ) or any(record.get(key) is True for key in MASK_KEYS)


def kind(found: object) -> str:
    """A value for an error message: its type and its beginning."""
    return "nothing" if found is None else f"{type(found).__name__} {repr(found)[:40]}"
