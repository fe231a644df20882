"""Prompts and cases of files: every form that the training data have, written as transformers writes them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_npu import cli
from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs, PromptArgs
from qwen3_npu.data.text.tokenizer import open_tokenizer
from qwen3_npu.errors import UsageError
from qwen3_npu.evaluation.custom import is_right, load_cases
from qwen3_npu.inference.prompts import read_prompts
from qwen3_npu.inference.text import Writer

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Says it.", "parameters": {"type": "object"}},
}
ASKED: list[dict[str, Any]] = [
    {"role": "system", "content": ""},
    {"role": "user", "content": [{"type": "text", "text": "Rain in "}, {"type": "text", "text": "Rome?"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I should look.",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    },
    {"role": "tool", "content": "dry", "name": "weather"},
]
ANSWER = {"role": "assistant", "content": "No."}


def predicted(path: Path | str, *prompts: str) -> list[Any]:
    words = ["--load", "x", "--predict-data", str(path), *(("--prompt", *prompts) if prompts else ())]
    return read_prompts(InferenceArgs(*cli.parse("test", "", GROUPS, FOREIGN, argv=words).groups).generate)


def test_tools_calls_and_thoughts_reach_the_model_as_transformers_writes_them(real_data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = real_data / "qwen3-tokenizer"
    theirs = AutoTokenizer.from_pretrained(folder)
    flat = [
        dict(m, content="Rain in Rome?") if m["role"] == "user" else dict(m, content=m["content"] or "") for m in ASKED
    ]
    expected = theirs.apply_chat_template(flat, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    writer = Writer(open_tokenizer(str(folder)), PromptArgs(prompt_type="hf"))
    file = tmp_path / "tools.jsonl"
    file.write_text(json.dumps({"messages": ASKED, "tools": json.dumps([TOOL])}) + "\n")
    (prompt,) = predicted(file)
    assert writer.prompt(prompt) == expected
    assert writer.tokens(expected) == theirs(expected)["input_ids"]
    file.write_text(json.dumps({"messages": [*ASKED, ANSWER], "tools": [TOOL]}) + "\n")
    (case,) = load_cases(str(file), "exact", None, {})
    assert (writer.prompt(case.prompt), case.answer) == (expected, "No.")


def test_prompts_of_every_form_that_training_reads(tmp_path: Path) -> None:
    def prompts(name: str, text: str | bytes) -> list[list[str]]:
        file = tmp_path / name
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return [[message.content for message in prompt.messages] for prompt in predicted(file)]

    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    records = [{"prompt": "p"}, {"conversations": turns}, {"instruction": "do", "input": "it"}]
    assert prompts("array.json", json.dumps(records, indent=1)) == [["p"], ["a", "b", "c"], ["do\nit"]]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    assert prompts("lines.jsonl.gz", gzip.compress(lines.encode())) == [["p"], ["a", "b", "c"], ["do\nit"]]
    assert prompts("odd.jsonl", '"one\\ntwo"\n{"prompt": "a\u2028b"}\n') == [["one\ntwo"], ["a\u2028b"]]
    assert prompts("no_suffix", "x\u2028y\n\nz") == [["x\u2028y"], ["z"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"good\nbad \xff\n", "--predict-data {file}, line 2: not UTF-8 (byte 5)"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text\n', "line 2: not JSON"),
        ("p.jsonl", b'{"said": "a"}\n', "line 1: no prompt, instruction, question or messages (there are said)"),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}\n', "line 1: message 1 has no text as content"),
        ("p.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "there is nothing to answer"),
        ("p.jsonl", b'{"prompt": "a", "system": 5}\n', "line 1: column 'system' is not text but int"),
        ("p.jsonl", b"", "the file is empty"),
    ],
)
def test_a_prompt_that_is_none_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        predicted(file)
    assert message.format(file=file) in str(refused.value)
    assert "--input" not in str(refused.value)
    with pytest.raises(UsageError, match="--prompt: the text is not UTF-8"):
        predicted("x", b"\xff".decode("utf-8", "surrogateescape"))


def test_cases_of_every_form_that_training_reads(tmp_path: Path) -> None:
    def cases(records: list[dict[str, Any]], keys: dict[str, Any] | None = None) -> list[tuple[list[str], str]]:
        file = tmp_path / "cases.json"
        file.write_text(json.dumps(records))
        found = load_cases(str(file), "exact", None, keys or {})
        return [([message.content for message in case.prompt.messages], case.answer) for case in found]

    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert cases([{"conversations": turns}, {"instruction": "q", "input": "x", "output": "a"}]) == [
        (["q"], "a"),
        (["q\nx"], "a"),
    ]
    assert cases([{"ask": "q", "reply": "a"}], {"prompt": "ask", "response": "reply"}) == [(["q"], "a")]
    renamed = [{"who": "h", "says": "q"}, {"who": "b", "says": "a"}]
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "h", "assistant_tag": "b"}
    assert cases([{"talk": renamed}], {"messages": "talk", "tags": tags}) == [(["q"], "a")]
    assert cases([{"messages": [{"role": "user", "content": "q"}], "answer": 5}]) == [(["q"], "5")]
    with pytest.raises(UsageError, match=r"--map-keys: these records have no 'promt'; .*did you mean prompt"):
        cases([{"ask": "q", "reply": "a"}], {"promt": "ask"})
    with pytest.raises(UsageError, match=r"cases.json, line 1: no column .*--map-keys"):
        cases([{"question": "q", "response": "a"}])


def test_thoughts_do_not_count_in_answers(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps({"instruction": "q", "output": "yes"}) + "\n")
    (case,) = load_cases(str(file), "exact", None, {})
    assert is_right(case, "<think>\n\n</think>\n\nyes ")
    assert is_right(case, "hm, no\n</think>\n\nyes")
    assert not is_right(case, "<think>\nyes\n</think>\n\nno")
