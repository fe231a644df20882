"""Conversations as Qwen's text, turn by turn: the source, which the model is given, and the target, which it learns.

`qwen` and `qwen3` write the same strings as MindSpeed-LLM's prompt types (LLaMA-Factory's 0.8.2 and 0.9.4); each string
is encoded separately. Tools, which crash there with qwen3, are written as by the model's own chat template.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qwen3_npu.data.text.conversation import (
    ASSISTANT,
    NO_THOUGHT,
    TOOL,
    Conversation,
    Message,
    PreferencePair,
    as_object,
    to_json,
    without_thought,
)

END, ANSWER = "<|im_end|>", "<|im_start|>assistant\n"
_QWEN_SYSTEM = "You are a helpful assistant."


class Turn(NamedTuple):
    """Strings that the model is given, then strings that it learns; either may be empty."""

    source: list[str]
    target: list[str]


class Template(NamedTuple):
    """A way to write conversations.

    Attributes:
        render: (conversation, --enable-thinking, whether only the last answer matters) -> turns; raises ValueError.
        prompt: (conversation, --enable-thinking) -> the strings up to the start of the next answer; raises ValueError.
        tokens: special tokens that it writes.
        end: the token that ends an answer.
        identity: changes when the written text changes.
        opens_thought: whether it opens <think> before an answer, so that the answer holds </think> only.
    """

    render: Callable[[Conversation, bool | None, bool], list[Turn]]
    prompt: Callable[[Conversation, bool | None], list[str]]
    tokens: tuple[str, ...]
    end: str
    identity: str
    opens_thought: bool = False


def render_qwen(conversation: Conversation, thinking: bool | None, last_only: bool) -> list[Turn]:
    """A default system message; the line end after an answer belongs to the next question; thoughts are plain text."""
    system = (conversation.system or _QWEN_SYSTEM) + _qwen_tools(conversation.tools)
    asked = f"<|im_start|>system\n{system}{END}\n"
    turns = _Turns()
    for message in conversation.messages:
        if message.role == ASSISTANT:
            turns.answer(message, [asked + ANSWER], [_thought(message) + _qwen_answer(message) + END])
            asked = "\n"
        else:
            asked += f"<|im_start|>{message.role}\n{message.content}{END}\n"
    return turns.done


def render_qwen3(conversation: Conversation, thinking: bool | None, last_only: bool) -> list[Turn]:
    """No default system message; the line end after an answer is learned.

    Without thoughts an answer gets empty ones, learned if `thinking` is true. With `thinking` false, thoughts
    are removed. Where only the last answer matters, earlier answers have no thoughts at all.
    """
    asked = _qwen3_system(conversation)
    turns = _Turns()
    messages = conversation.messages
    for i, message in enumerate(messages):
        if message.role != ASSISTANT:
            asked += _qwen3_question(messages, i)
            continue
        past = last_only and message is not messages[-1]
        if thinking is False or past:
            message = without_thought(message)
        asked, target = asked + ANSWER, [_qwen3_answer(message)]
        if not past and not message.has_thought():
            if thinking:
                target.insert(0, NO_THOUGHT)
            else:
                # One string less to encode, and the same tokens: <think> starts anew whatever stands before it.
                asked += NO_THOUGHT
        turns.answer(message, [asked], target)
        asked = ""
    return turns.done


def render_answer(
    prompt: Conversation, answer: Message, template: Template, thinking: bool | None
) -> tuple[list[str], list[str]]:
    """An answer to a prompt -> strings of the prompt, earlier answers included, and of the answer."""
    conversation = prompt._replace(messages=(*prompt.messages, answer))
    turns = [turn for turn in template.render(conversation, thinking, True) if turn.target]
    return [text for turn in turns[:-1] for text in (*turn.source, *turn.target)] + turns[-1].source, turns[-1].target


def render_pair(
    pair: PreferencePair, template: Template, thinking: bool | None
) -> tuple[list[str], tuple[list[str], list[str]]]:
    """Two answers to one prompt -> strings of the prompt, and of both answers."""
    prompts, answers = [], []
    for answer in (pair.chosen, pair.rejected):
        prompt, target = render_answer(pair.prompt, answer, template, thinking)
        prompts.append(prompt)
        answers.append(target)
    if prompts[0] != prompts[1]:
        # One answer has thoughts: the empty thoughts of the other are then a part of what it says.
        for prompt, target in zip(prompts, answers, strict=True):
            if prompt[-1].endswith(NO_THOUGHT):
                target.insert(0, NO_THOUGHT)
                prompt[-1] = prompt[-1].removesuffix(NO_THOUGHT)
    return prompts[0], (answers[0], answers[1])


class _Turns:
    """Collects turns; an answer that is not learned becomes part of the next turn's source."""

    def __init__(self) -> None:
        self.done: list[Turn] = []
        self.given: list[str] = []

    def answer(self, message: Message, source: list[str], target: list[str]) -> None:
        if message.learned:
            self.done.append(Turn(self.given + source, target))
            self.given = []
        else:
            self.given += source + target


def _thought(message: Message) -> str:
    return "" if message.reasoning is None else f"<think>\n{message.reasoning.strip(chr(10))}\n</think>\n\n"


def _qwen_answer(message: Message) -> str:
    if not message.calls:
        return message.content
    if len(message.calls) > 1:
        raise ValueError(f"{len(message.calls)} function calls in one message, which --prompt-type qwen cannot write")
    (call,) = message.calls
    text = f"Action: {call.name}\nAction Input: {to_json(call.arguments)}"
    return f"{message.content}\n{text}" if message.content else text


def _qwen_tools(tools: tuple[dict[str, object], ...] | None) -> str:
    """The list of tools that prompt type `qwen` adds to the system message."""
    if not tools:
        return ""
    listed, names = "", []
    for tool in (as_object(tool["function"], "a tool") for tool in tools):
        parameters = as_object(tool.get("parameters") or {}, "a tool's parameters")
        properties = as_object(parameters.get("properties", {}), "properties of a tool")
        required = parameters.get("required") or []
        if not isinstance(required, list) or not isinstance(tool.get("name"), str):
            raise ValueError(f"a tool has a name and a list of required parameters, not {repr(tool)[:80]}")
        arguments = "".join(_qwen_argument(name, p, name in required) for name, p in properties.items())
        listed += f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\n"
        listed += f"Tool Args:\n{arguments}\n"
        names.append(tool["name"])
    return (
        f"You have access to the following tools:\n{listed}Use the following format if using a tool:\n```\n"
        f"Action: tool name (one of [{', '.join(map(str, names))}]).\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```).\n```\n'
    )


def _qwen_argument(name: str, said: object, required: bool) -> str:
    parameter = as_object(said, f"a tool's argument {name!r}")
    text = f"  - {name} ({parameter.get('type', '')}{', required' if required else ''}): "
    text += str(parameter.get("description", ""))
    choices = parameter.get("enum") or ()
    items = as_object(parameter.get("items") or {}, f"items of a tool's argument {name!r}")
    if not isinstance(choices, (list, tuple)):
        raise ValueError(f"enum of a tool's argument {name!r} is no list but {repr(choices)[:80]}")
    if choices:
        text += f", should be one of [{', '.join(map(str, choices))}]"
    if items:
        text += f", where each item should be {items.get('type', '')}"
    return text + "\n"


def _qwen3_system(conversation: Conversation) -> str:
    system = conversation.system or ""
    if conversation.tools:
        system += ("\n\n" if system else "") + _qwen3_tools(conversation.tools)
    return f"<|im_start|>system\n{system}{END}\n" if system else ""


def _qwen3_tools(tools: tuple[dict[str, object], ...]) -> str:
    listed = "".join("\n" + to_json(tool) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _qwen3_question(messages: tuple[Message, ...], place: int) -> str:
    """Results of functions that follow each other are one message of the user."""
    message = messages[place]
    if message.role != TOOL:
        return f"<|im_start|>{message.role}\n{message.content}{END}\n"
    text = f"\n<tool_response>\n{message.content}\n</tool_response>"
    if not place or messages[place - 1].role != TOOL:
        text = "<|im_start|>user" + text
    if place + 1 == len(messages) or messages[place + 1].role != TOOL:
        text += END + "\n"
    return text


def _qwen3_answer(message: Message) -> str:
    text = _thought(message) + message.content
    for i, call in enumerate(message.calls):
        text += "\n" if message.content or i else ""
        text += f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments_text()}}}\n</tool_call>'
    return text + END + "\n"


def _prompt(
    render: Callable[[Conversation, bool | None, bool], list[Turn]],
) -> Callable[[Conversation, bool | None], list[str]]:
    """The prompt of a template: the source of an empty answer."""

    def prompt(conversation: Conversation, thinking: bool | None) -> list[str]:
        waiting = conversation._replace(messages=(*conversation.messages, Message(ASSISTANT, "")))
        *before, last = render(waiting, thinking, True)
        return [text for turn in before for text in (*turn.source, *turn.target)] + last.source

    return prompt


QWEN = Template(render_qwen, _prompt(render_qwen), ("<|im_start|>", END), END, identity="qwen")
QWEN3_TEMPLATE = Template(
    render_qwen3, _prompt(render_qwen3), ("<|im_start|>", END, "<think>", "</think>"), END, identity="qwen3"
)
