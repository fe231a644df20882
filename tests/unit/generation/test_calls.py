"""Function calls in answers, and what a request may ask of the next token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import quiz
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


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def test_calls_reach_openais_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer in pieces of 5 characters; a second question with its call."""
    openai = pytest.importorskip("openai", reason="the client of the server (pip install openai)")
    from qwen3_npu.args.inference import PromptArgs
    from qwen3_npu.data.text.tokenizer import open_tokenizer
    from qwen3_npu.inference.sampling import Sampling
    from qwen3_npu.inference.serve.asked import Reader, ServerLimits
    from qwen3_npu.inference.serve.desk import Desk, Piece
    from qwen3_npu.inference.serve.metrics import Metrics
    from qwen3_npu.inference.serve.offered import Connection
    from qwen3_npu.inference.serve.web import WebServer
    from qwen3_npu.inference.text import Writer

    said = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    writer = Writer(open_tokenizer(str(quiz.write_tokenizer(tmp_path))), PromptArgs(prompt_type="qwen3"))
    limits = ServerLimits("tiny", 4000, 800, sampling=Sampling(), chats=True)
    desk, prompts = Desk(), []

    def hand_in(order: Any, inbox: Any) -> None:
        prompts.append(writer.encoder.decode(order.tokens))
        for start in range(0, len(said), 5):
            inbox.put((order.key, Piece(said[start : start + 5], [0], [-1.0])))
        inbox.put((order.key, Piece(finish="eos")))

    monkeypatch.setattr(desk, "hand_in", hand_in)
    server = WebServer("127.0.0.1", 0, None, connection=Connection)
    server.ready(desk, Reader(writer, limits, desk.new_key), Metrics(1, 4000))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"model": "tiny", "tools": TOOLS}
    messages: list[Any] = [{"role": "user", "content": "Rain?"}]
    (choice,) = client.chat.completions.create(messages=messages, logprobs=True, **options).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
    assert json.dumps(TOOLS[0]) in prompts[-1]
    assert len(choice.logprobs.content) == len(said) // 5 + 1
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "no"},
    ]
    with client.chat.completions.stream(messages=messages, **options) as stream:
        last = stream.get_final_completion().choices[0]
    assert (last.finish_reason, last.message.content) == ("tool_calls", "Let me see.")
    assert [one.function.arguments for one in last.message.tool_calls] == [call.function.arguments]
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>' in prompts[-1]
    plain = client.chat.completions.create(messages=messages[:1], tool_choice="none", **options).choices[0]
    assert (plain.finish_reason, plain.message.content, plain.message.tool_calls) == ("stop", said, None)
    assert "weather" not in prompts[-1]
    client.close()
    server.close()
