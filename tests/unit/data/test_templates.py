"""Conversations as text, token by token, against MindSpeed-LLM's (executed) and the chat template's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_npu.data.preprocess.record_formats import OPENAI, SHAREGPT, Columns, alpaca_turns, openai, sharegpt
from qwen3_npu.data.text.chat_template import hf_template
from qwen3_npu.data.text.conversation import NO_THOUGHT, Conversation, Message, PreferencePair, ToolCall
from qwen3_npu.data.text.encoder import Encoder
from qwen3_npu.data.text.templates import QWEN, QWEN3_TEMPLATE, Turn, render_pair
from qwen3_npu.data.text.tokenizer import open_tokenizer

U1, A1, U2, A2 = (
    Message("user", "U1"),
    Message("assistant", "A1"),
    Message("user", "U2"),
    Message("assistant", "<think>\nhm\n</think>\n\nA2"),
)
TOKENIZER = "qwen3-tokenizer"
TWO = Conversation((U1, A1, U2, A2))
ASK1, ASK2 = (f"<|im_start|>user\n{u}<|im_end|>\n<|im_start|>assistant\n" for u in ("U1", "U2"))


def drawn(turns: list[Turn]) -> str:
    """The text of turns; what is learned stands in brackets."""
    return "".join("".join(turn.source) + (f"[{''.join(turn.target)}]" if turn.target else "") for turn in turns)


def test_qwen_has_a_system_message_and_ends_without_a_line_end() -> None:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    thought = "<think>\nhm\n</think>\n\nA2"
    assert drawn(QWEN.render(TWO, None, False)) == f"{system}{ASK1}[A1<|im_end|>]\n{ASK2}[{thought}<|im_end|>]"
    mine = drawn(QWEN.render(TWO._replace(system="S"), None, False))
    assert mine.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1")


@pytest.mark.parametrize(
    ("thinking", "first", "second"),
    [
        (None, f"{NO_THOUGHT}[A1<|im_end|>\n]", "[<think>\nhm\n</think>\n\nA2<|im_end|>\n]"),
        (True, f"[{NO_THOUGHT}A1<|im_end|>\n]", "[<think>\nhm\n</think>\n\nA2<|im_end|>\n]"),
        (False, f"{NO_THOUGHT}[A1<|im_end|>\n]", f"{NO_THOUGHT}[A2<|im_end|>\n]"),
    ],
)
def test_qwen3_thoughts(thinking: bool | None, first: str, second: str) -> None:
    assert drawn(QWEN3_TEMPLATE.render(TWO, thinking, False)) == f"{ASK1}{first}{ASK2}{second}"


def test_qwen_tools_are_described_in_its_old_way() -> None:
    tool = {
        "name": "f",
        "description": "does",
        "parameters": {"properties": {"x": {"type": "string", "description": "an x", "enum": ["a", "b"]}}},
    }
    call = Message("assistant", "", calls=(ToolCall("f", {"x": "é"}),))
    conversation = Conversation((U1, call, Message("tool", "R"), A1), "", ({"type": "function", "function": tool},))
    text = drawn(QWEN.render(conversation, None, False))
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.You have access to the following tools:\n> Tool Name: f\n"
        "Tool Description: does\nTool Args:\n  - x (string): an x, should be one of [a, b]\n\n"
        "Use the following format if using a tool:\n```\nAction: tool name (one of [f]).\n"
    )
    assert '[Action: f\nAction Input: {"x": "é"}<|im_end|>]\n<|im_start|>tool\nR<|im_end|>' in text


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ({"name": "f", "parameters": ["x"]}, "a tool's parameters: an object is expected, not ['x']"),
        ({"name": "f", "parameters": {"required": True}}, "a list of required parameters"),
        ({"parameters": {}}, "a tool has a name"),
        ({"name": "f", "parameters": {"properties": {"x": {"items": "text"}}}}, "items of a tool's argument 'x'"),
    ],
)
def test_a_tool_of_another_form_is_named(function: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QWEN.render(Conversation((U1, A1), "", ({"type": "function", "function": function},)), None, False)


@pytest.mark.parametrize("history", [5, "ab", {"q": "a"}, [["q"]], [["q", 3]]])
def test_a_history_of_another_form_is_named(history: object) -> None:
    columns = Columns({"prompt": "instruction", "query": "input", "history": "history"}, None)
    with pytest.raises(ValueError, match="history is not a list of"):
        alpaca_turns({"instruction": "q", "input": "", "history": history}, columns)


def test_an_answer_that_is_not_learned_is_given() -> None:
    conversation = Conversation((U1, A1._replace(learned=False), U2, A2))
    assert drawn(QWEN3_TEMPLATE.render(conversation, None, False)) == (
        f"{ASK1}{NO_THOUGHT}A1<|im_end|>\n{ASK2}[<think>\nhm\n</think>\n\nA2<|im_end|>\n]"
    )


def test_pairs_share_their_prompt() -> None:
    pair = PreferencePair(Conversation((U1, A2, U2)), A1, Message("assistant", "B"))
    prompt, (chosen, rejected) = render_pair(pair, QWEN3_TEMPLATE, None)
    assert "".join(prompt) == f"{ASK1}A2<|im_end|>\n{ASK2}{NO_THOUGHT}", "earlier thoughts are gone"
    assert ("".join(chosen), "".join(rejected)) == ("A1<|im_end|>\n", "B<|im_end|>\n")
    prompt, (chosen, rejected) = render_pair(pair._replace(chosen=A2), QWEN3_TEMPLATE, None)
    assert "".join(prompt).endswith(ASK2)
    assert "".join(rejected) == f"{NO_THOUGHT}B<|im_end|>\n"


# ------------------------------------------------------------------------- the chat template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_answers_are_found_in_any_template(tiny_tokenizer: str, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(tiny_tokenizer) / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    template = hf_template(open_tokenizer(str(tmp_path)))
    call = Message("assistant", "", calls=(ToolCall("f", {}),))
    conversation = Conversation((U1, A1, U2, call, Message("tool", "R"), A1), "S")
    assert drawn(template.render(conversation, None, False)) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n[A1<|im_end|>]\n"
        '<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n[<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        "<|im_end|>]\n<|im_start|>tool\nR<|im_end|>\n<|im_start|>assistant\n[A1<|im_end|>]\n"
    )
    told = template.render(Conversation((U1, Message("assistant", "x <|im_start|>assistant\n y"))), None, False)
    assert drawn(told).endswith("<|im_start|>assistant\n[x <|im_start|>assistant\n y<|im_end|>]\n")


def real_conversations(folder: Path) -> list[Conversation]:
    """Real conversations of every pattern: multi-turn, system, tools, parallel calls, thoughts."""
    columns = Columns(SHAREGPT, {"tools": "tools"}, has_tags=True)
    found = []
    for name in ("glaive_toolcall_en_demo.json", "glaive_toolcall_zh_demo.json"):
        found += [sharegpt(record, columns) for record in json.loads((folder / "sft" / name).read_text())[:40]]
    for name in ("reason_tool_use_demo_50.jsonl", "v1_sft_demo.jsonl"):
        lines = (folder / "sft" / name).read_text().splitlines()[:30]
        found += [openai(json.loads(line), Columns(OPENAI, {})) for line in lines]
    return found


def as_messages(conversation: Conversation) -> list[dict]:
    """For apply_chat_template."""
    found = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for m in conversation.messages:
        entry: dict = {"role": m.role, "content": m.content}
        if m.reasoning is not None:
            entry["reasoning_content"] = m.reasoning
        if m.calls:
            entry["tool_calls"] = [{"function": {"name": c.name, "arguments": c.arguments}} for c in m.calls]
        found.append(entry)
    return found


def strings(turns: list[Turn]) -> list[str]:
    return [text for turn in turns for text in (*turn.source, *turn.target)]


def same_ids(pieces: list[list[str]], wholes: list[str], encoder: Encoder) -> None:
    """Strings that are encoded one by one have the tokens of the whole text."""
    mine = encoder.encode([text for strings in pieces for text in strings])
    expected = encoder.encode(wholes)
    ends = np.cumsum(expected.lengths)
    ours = np.cumsum(mine.lengths)[np.cumsum([len(strings) for strings in pieces]) - 1]
    assert np.array_equal(ours, ends)
    assert np.array_equal(mine.ids, expected.ids)


def test_hf_is_apply_chat_template_and_qwen3_its_last_answer(
    real_data: Path, real_transformers: Any, real_encoder: Encoder
) -> None:
    """`hf`: the ids of whole conversations. `qwen3`: each answer, written as if it were the last, has the same ids."""
    apply, template = real_transformers.apply_chat_template, hf_template(open_tokenizer(str(real_data / TOKENIZER)))
    pieces, wholes, compared = [], [], 0
    for number, conversation in enumerate(real_conversations(real_data)):
        tools = list(conversation.tools or ()) or None
        for thinking in (None, True, False):
            turns = template.render(conversation, thinking, False)
            assert [t.target for t in turns if t.target]
            options = {} if thinking is None else {"enable_thinking": thinking}
            messages = as_messages(conversation)
            pieces.append(strings(turns))
            wholes.append(apply(messages, tools=tools, tokenize=False, **options))
            if number % 20 == 0:  # what transformers makes of its text is always the same
                ids = apply(messages, tools=tools, **options)["input_ids"]
                assert ids == real_encoder.encode(wholes[-1:]).ids.tolist()
        for end, message in enumerate(conversation.messages, start=1):
            if message.role != "assistant":
                continue
            upto = conversation._replace(messages=conversation.messages[:end])
            before = as_messages(upto._replace(messages=upto.messages[:-1]))
            asked = apply(before, tools=tools, add_generation_prompt=True, tokenize=False)
            whole = apply(as_messages(upto), tools=tools, tokenize=False)
            last = QWEN3_TEMPLATE.render(upto, None, False)[-1]
            thought = "" if message.has_thought() else NO_THOUGHT
            assert last.source[-1].endswith("<|im_start|>assistant\n" + thought)
            pieces.append([thought, *last.target])
            wholes.append(whole[len(asked) :])
            compared += 1
    same_ids(pieces, wholes, real_encoder)
    assert compared > 200


def test_qwen3_is_apply_chat_template_for_one_answer(real_transformers: Any, real_encoder: Encoder) -> None:
    """One question, one answer: system, tools, thoughts; thinking on and off."""
    tools = ({"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "int"}}}}},)
    call = Message("assistant", "Let me see.", "why", (ToolCall("f", {"x": "ü"}), ToolCall("g", '{"y": 1}')))
    pieces, wholes = [], []
    for system in ("", "Be brief."):
        for listed in ((), tools):
            for answer in (A1, A2, call):
                conversation = Conversation((U1, answer), system, listed)
                messages = as_messages(conversation)
                expected = real_transformers.apply_chat_template(messages, tools=list(listed) or None, tokenize=False)
                for thinking in (None, True):
                    pieces.append(strings(QWEN3_TEMPLATE.render(conversation, thinking, False)))
                    wholes.append(expected)
    same_ids(pieces, wholes, real_encoder)
