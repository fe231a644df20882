"""The fields of requests of OpenAI's API: names, types and ranges. Unknown fields are refused by name.

Fields and their ranges: https://platform.openai.com/docs/api-reference/chat/create and .../completions/create; beyond
them `top_k`, `repetition_penalty` and `chat_template_kwargs` as vLLM's server has them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, cast

from qwen3_npu import schema
from qwen3_npu.errors import UsageError, did_you_mean

CHAT, COMPLETION = "chat", "completion"
MOST_ANSWERS = 128  # of one request
# Most texts, and most characters of a text, since each new token is compared with them.
_MOST_STOPS, _LONGEST_STOP = 16, 1000
_LEAST_TEMPERATURE = 0.01
_MOST_BIASES = 1024
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
Read = Callable[[object, str], object]
Json = dict[str, object]


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        param: the wrong field.
        code: OpenAI's error code.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code


def _number(least: float, most: float) -> Read:
    return functools.partial(schema.number, least=least, most=most)


def _integer(least: int, most: int | None = None) -> Read:
    return functools.partial(schema.integer, least=least, most=most)


def _stops(value: object, where: str) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else schema.sequence(value, where)
    if len(listed) > _MOST_STOPS:
        raise UsageError(f"{where} has {len(listed)} texts; at most {_MOST_STOPS} are expected")
    texts = tuple(schema.text(item, where) for item in listed)
    for text in texts:
        if not 0 < len(text) <= _LONGEST_STOP:
            raise UsageError(f"{where} has a text of {len(text)} characters; 1 to {_LONGEST_STOP} are expected")
    return texts


def _temperature(value: object, where: str) -> float:
    found = schema.number(value, where, least=0, most=2)
    if 0 < found < _LEAST_TEMPERATURE:
        raise UsageError(f"{where} is {found}; 0 (the likeliest token) or at least {_LEAST_TEMPERATURE} is expected")
    return found


def _only(*names: str) -> Read:
    """An object whose fields are these names with true or false."""

    def read(value: object, where: str) -> dict[str, bool]:
        found = schema.record(value, where)
        found.only(names)
        return {name: found.boolean(name, False) for name in found.fields}

    return read


def _bias(value: object, where: str) -> tuple[tuple[int, float], ...]:
    """Tokens and the numbers that are added to their logits."""
    found = schema.record(value, where).fields
    if len(found) > _MOST_BIASES:
        raise UsageError(f"{where} has {len(found)} tokens; at most {_MOST_BIASES} are expected")
    if strange := next((name for name in found if not (name.isascii() and name.isdecimal() and len(name) < 10)), None):
        raise UsageError(f"{where} has {schema.shown(strange)}; the number of a token is expected")
    biases = {int(name): schema.number(bias, f"{where}[{name}]", least=-100, most=100) for name, bias in found.items()}
    if len(biases) < len(found):
        raise UsageError(f"{where} has a token twice")
    return tuple(sorted(biases.items()))


def _tools(value: object, where: str) -> Sequence[Json]:
    """Functions that the model may call."""
    tools = [schema.record(tool, f"{where}[{i}]") for i, tool in enumerate(schema.sequence(value, where))]
    for found in tools:
        found.only(("type", "function"))
        if found.text("type") != "function":
            raise UsageError(f"{found.where}.type is {schema.shown(found.text('type'))}; function is expected")
        function = schema.record(found.record("function").fields, f"{found.where}.function")
        function.only(("name", "description", "parameters", "strict"))
        if not _NAME.fullmatch(function.text("name")):
            raise UsageError(f"{function.where}.name is no name: 1 to 64 letters, digits, _ and - are expected")
        if function.boolean("strict", False):
            raise UsageError(f"{function.where}.strict is not offered here, leave it out")
        function.text("description", "")
        function.record("parameters", None)
    return [tool.fields for tool in tools]


def _tool_choice(value: object, where: str) -> str:
    if value not in ("auto", "none"):
        raise UsageError(f"{where} is {schema.shown(value)}; auto or none is expected, calls are not forced here")
    return str(value)


class RequestFields(TypedDict, total=False):
    """The fields that a request gives, as `_KNOWN` reads them."""

    model: str
    messages: Sequence[object]
    prompt: object
    max_tokens: int
    max_completion_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    n: int
    seed: int
    stop: tuple[str, ...]
    stream: bool
    stream_options: dict[str, bool]
    user: str
    logprobs: bool | int
    top_logprobs: int
    chat_template_kwargs: dict[str, bool]
    tools: Sequence[Json]
    tool_choice: str
    parallel_tool_calls: bool


_SHARED: dict[str, Read] = {
    "model": schema.text,
    "max_tokens": _integer(1),
    "temperature": _temperature,
    "top_p": _number(0, 1),
    "top_k": _integer(-1),
    "repetition_penalty": _number(0.01, 100),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _bias,
    "n": _integer(1, MOST_ANSWERS),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": _stops,
    "stream": schema.boolean,
    "stream_options": _only("include_usage"),
    "user": schema.text,  # changes nothing, as OpenAI has it
}
_KNOWN: dict[str, dict[str, Read]] = {
    CHAT: {
        **_SHARED,
        "messages": schema.sequence,
        "max_completion_tokens": _integer(1),
        "logprobs": schema.boolean,
        "top_logprobs": _integer(0, 20),
        "chat_template_kwargs": _only("enable_thinking"),
        "tools": _tools,
        "tool_choice": _tool_choice,
        "parallel_tool_calls": schema.boolean,
    },
    COMPLETION: {**_SHARED, "prompt": lambda value, where: value, "logprobs": _integer(0, 5)},
}
# Fields of OpenAI's and vLLM's that are not offered, and the values that ask for nothing.
_NOT_OFFERED: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "min_p": (0,),
    "ignore_eos": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ()),
}


def read_fields(body: Mapping[str, object], kind: str) -> RequestFields:
    """The fields of a request that are given, checked. Raises: Refused."""
    known, found = _KNOWN[kind], Json()
    for name, value in body.items():
        if value is None:  # null means the same as no field
            continue
        if name in known:
            try:
                found[name] = known[name](value, name)
            except UsageError as error:
                raise Refused(str(error), param=name) from None
        elif name not in _NOT_OFFERED:
            hint = did_you_mean(name, known) if name.isprintable() else ""
            raise Refused(f"{schema.shown(name)} is not understood{hint}", param=name, code="unknown_parameter")
        elif value not in _NOT_OFFERED[name]:
            raise Refused(
                f"{name} is {schema.shown(value)}; it is not offered here, leave it out",
                param=name,
                code="unsupported_parameter",
            )
    return cast(RequestFields, found)
