"""Function calls in answers, and what a request may ask of the next token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qwen3_npu.data.text.conversation import ToolCall
from qwen3_npu.inference.serve.calls import CallReader, CallRules

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
WEATHER = ToolCall("weather", {"city": "Köln"})
ANSWERS: dict[str, tuple[str, list[Any]]] = {
    "text alone": ("It rains.\n", ["It rains.\n"]),
    "a call alone": (CALL, [WEATHER]),
    "a thought, text and two calls": (
        f"<think>\nI may <tool_call>.\n</think>\n\nLet me see.\n{CALL}\n{CALL}",
        ["<think>\nI may <tool_call>.\n</think>\n\nLet me see.", WEATHER, WEATHER],
    ),
    "text behind a call": (f"{CALL}\n\nDone.", [WEATHER, "Done."]),
    "arguments as text": ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', [ToolCall("f", "{}")]),
    "the end is missing": (CALL.removesuffix("</tool_call>"), [WEATHER]),
    "no JSON": ("<tool_call>weather(Köln)</tool_call> ok", ["<tool_call>weather(Köln)</tool_call> ok"]),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', ['<tool_call>{"arguments": {}}</tool_call>']),
    "a mark that does not end": ("a < b <tool_", ["a < b <tool_"]),
    "nested too deeply": ("<tool_call>" + "[" * 100_000, ["<tool_call>" + "[" * 100_000]),
    "empty": ("", []),
}


def joined(parts: Sequence[str | ToolCall]) -> list[str | ToolCall]:
    found: list[Any] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("size", [1, 3, 1_000_000])
def test_calls_are_told_from_text_however_an_answer_grows(name: str, size: int) -> None:
    answer, expected = ANSWERS[name]
    size = max(size, len(answer) // 1000)
    reader = CallReader(CallRules())
    parts = [part for i in range(0, len(answer), size) for part in reader.read(answer[i : i + size], end=False)]
    assert joined([*parts, *reader.read("", end=True)]) == expected


def test_a_thought_that_the_prompt_began_holds_no_calls() -> None:
    reader = CallReader(CallRules(in_thought=True))
    text = f"Should I {CALL}?</think>{CALL}"
    assert joined([p for c in text for p in reader.read(c, end=False)]) == [f"Should I {CALL}?</think>", WEATHER]


def test_without_parallel_calls_there_is_one() -> None:
    assert CallReader(CallRules(only_one=True)).read(CALL + CALL, end=True) == [WEATHER]


def test_penalties_and_biases_change_logits_as_openai_says() -> None:
    """logit - count * frequency_penalty - (count > 0) * presence_penalty, plus the bias."""
    from qwen3_npu.inference.sampling import Sampling, biased, choose_tokens, less_often

    logits = torch.arange(12.0).view(2, 6)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((0, 100.0), (4, -3.0)))
    seen = [[5, 5, 1, 2, 2], [0, 3]]
    found = less_often(biased(logits, sampling), seen, [2, 1], sampling)
    expected = logits.clone()
    expected[:, 0] += 100
    expected[:, 4] -= 3
    expected[0, 1] -= 0.5 + 0.25
    expected[0, 2] -= 0.5 + 2 * 0.25
    expected[1, 3] -= 0.5 + 0.25
    assert torch.equal(found, expected)
    assert torch.equal(logits, torch.arange(12.0).view(2, 6)), "they are not written to"
    assert choose_tokens(logits, sampling, seen, [0, 1], prompts=[2, 1]).tolist() == [0, 0]


def test_calls_are_written_as_json() -> None:
    from qwen3_npu.inference.serve.calls import tool_call

    told = json.loads(json.dumps(tool_call(WEATHER)))
    assert json.loads(told["function"].pop("arguments")) == {"city": "Köln"}
    assert told.pop("id").startswith("call_")
    assert told == {"type": "function", "function": {"name": "weather"}}
