"""The fields of requests of OpenAI's API: names, types and ranges. What is not understood is refused by name.

Fields and their ranges: https://platform.openai.com/docs/api-reference/chat/create and .../completions/create; beyond
them `top_k`, `repetition_penalty` and `chat_template_kwargs` as vLLM's server has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from qwen3_npu import schema
from qwen3_npu.errors import UsageError, did_you_mean

CHAT, COMPLETION = "chat", "completion"
MOST_ANSWERS = 128  # of one request
_MOST_STOPS, _LONGEST_STOP = 16, 1000  # texts, and characters of one: every new token is compared with them
_LEAST_TEMPERATURE = 0.01
Read = Callable[[object, str], Any]


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: HTTP's.
        param: the field that is at fault.
        code: OpenAI's name of the fault.
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
    for text in listed:
        if not 0 < len(schema.text(text, where)) <= _LONGEST_STOP:
            raise UsageError(f"{where} has a text of {len(text)} characters; 1 to {_LONGEST_STOP} are expected")
    return tuple(listed)


def _temperature(value: object, where: str) -> float:
    found = schema.number(value, where, least=0, most=2)
    if 0 < found < _LEAST_TEMPERATURE:
        raise UsageError(f"{where} is {found}; 0 (the likeliest token) or at least {_LEAST_TEMPERATURE} is expected")
    return found


def _only(*names: str) -> Read:
    """An object with true or false under these names."""

    def read(value: object, where: str) -> dict[str, bool]:
        found = schema.record(value, where)
        found.only(names)
        return {name: found.boolean(name, False) for name in found.fields}

    return read


_SHARED: dict[str, Read] = {
    "model": schema.text,
    "max_tokens": _integer(1),
    "temperature": _temperature,
    "top_p": _number(0, 1),
    "top_k": _integer(-1),
    "repetition_penalty": _number(0.01, 100),
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
    },
    COMPLETION: {**_SHARED, "prompt": lambda value, where: value, "logprobs": _integer(0, 5)},
}
# Fields of OpenAI's and vLLM's that are not offered, and the values that ask for nothing.
_NOT_OFFERED: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
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


def read_fields(body: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The fields of a request that are given, checked. Raises: Refused."""
    known, found = _KNOWN[kind], {}
    for name, value in body.items():
        if value is None:  # the same as leaving it out
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
    return found
