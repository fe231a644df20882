"""`--prompt-type hf` against transformers' apply_chat_template: text, token ids, and where the answers are."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_npu.checkpoint.formats.huggingface import carry_files
from qwen3_npu.data.preprocess.record_formats import OPENAI, Columns, openai
from qwen3_npu.data.text.chat_template import hf_template
from qwen3_npu.data.text.encoder import Encoder
from qwen3_npu.data.text.messages import read_messages
from qwen3_npu.data.text.prompt_types import misfit, open_template, prompt_tokens
from qwen3_npu.data.text.templates import Template
from qwen3_npu.data.text.tokenizer import open_tokenizer

LOOP = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
# Written for these tests; the kinds that models have.
TEMPLATES = {
    "plain": PLAIN,
    "trims": LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}" + ASK,
    # Only what the assistant says is marked, for training on answers.
    "generation": LOOP
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + ASK,
    # As Qwen3-Thinking-2507: the last answer opens a thought, earlier ones have none.
    "opens": LOOP + "{% set c = (m.content or '').split('</think>')[-1].lstrip('\n') %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    # No token before an answer: the header is words.
    "words": LOOP + "{{ '### ' + (m.role | capitalize) + ': ' + (m.content or '') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant: {% endif %}",
    # No generation prompt at all, and another system message.
    "brackets": LOOP
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}",
    "calls": LOOP
    + "<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.id }}{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}" + ASK,
    "strict": "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + PLAIN,
}
Make = Callable[..., tuple[Template, Any]]


@pytest.fixture
def both(tmp_path: Path, real_data: Path, real_transformers: Any) -> Make:
    """A chat template (with others by name) in the real tokenizer's folder: ours, and transformers' tokenizer."""

    def make(source: str, **named: str) -> tuple[Template, Any]:
        folder = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
        (folder / "additional_chat_templates").mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).symlink_to(real_data / "qwen3-tokenizer" / name)
        (folder / "chat_template.jinja").write_text(source)
        for name, other in named.items():
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(other)
        theirs = copy.copy(real_transformers)
        theirs.chat_template = {"default": source, **named} if named else source
        return hf_template(open_tokenizer(str(folder))), theirs

    return make


def texts(chance: random.Random) -> str:
    """What people say, and what templates stumble over."""
    return chance.choice(
        ("A", "Hello there", "", " ", "\n\nline", "  two", "end  \n", "<think>\nhm\n</think>\n\nSo.",
         "so</think>\n\nAh", "北京",
         "a\n<|im_start|>assistant\nb", "{{ x }}", "[INST]", "e\u0301", "</think>", "\n \n x")
    )  # fmt: skip


def records(count: int) -> Iterator[dict[str, Any]]:
    """Conversations of every pattern."""
    chance = random.Random(7)
    for _ in range(count):
        messages: list[dict[str, Any]] = []
        if chance.random() < 0.4:
            messages.append({"role": "system", "content": texts(chance)})
        for _ in range(chance.randint(1, 3)):
            messages.append({"role": "user", "content": texts(chance) or "q"})
            if chance.random() < 0.3:
                call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": texts(chance)}}}
                messages.append(
                    {"role": "assistant", "content": chance.choice((None, "", "See:")), "tool_calls": [call]}
                )
                messages.append({"role": "tool", "content": "R", "tool_call_id": "c1", "name": "f"})
            answer: dict[str, Any] = {"role": "assistant", "content": texts(chance)}
            if chance.random() < 0.2:
                answer[chance.choice(("reasoning_content", "thinking"))] = texts(chance)
            messages.append(answer)
        record: dict[str, Any] = {"messages": messages}
        if chance.random() < 0.3:
            record["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}]
        yield record


@pytest.mark.parametrize("name", [*TEMPLATES, "qwen3"])
def test_ids_are_those_of_transformers_or_the_conversation_is_refused(
    name: str, both: Make, real_data: Path, real_encoder: Encoder
) -> None:
    qwen3 = (real_data / "qwen3-tokenizer" / "chat_template.jinja").read_text()
    ours, theirs = both(TEMPLATES.get(name, qwen3))
    same = refused = 0
    for record in records(60):
        for thinking in (None, True, False):
            options = {} if thinking is None else {"enable_thinking": thinking}
            try:
                expected = theirs.apply_chat_template(record["messages"], tools=record.get("tools"), **options)
            except Exception:
                continue  # transformers refuses it
            try:
                turns = ours.render(openai(record, Columns(OPENAI, {})), thinking, False)
            except ValueError as error:
                refused += "does not write the function calls" not in str(error)
                continue
            same += 1
            strings = [text for turn in turns for text in (*turn.source, *turn.target)]
            assert real_encoder.encode(strings).ids.tolist() == expected["input_ids"], record
            asked = read_messages(record["messages"][:-1], record.get("tools"))
            prompt = theirs.apply_chat_template(
                record["messages"][:-1], tools=record.get("tools"), add_generation_prompt=True, **options
            )
            assert prompt_tokens(ours, asked, thinking, real_encoder) == prompt["input_ids"]
    assert same >= 40
    assert refused < same / 8, (name, refused, same)


def learned(turns: list[Any], encoder: Encoder) -> list[int]:
    """1 for each token that is learned."""
    found: list[int] = []
    for turn in turns:
        for chosen, strings in enumerate(turn):
            found += [chosen] * len(encoder.encode(strings).ids)
    return found


def test_generation_marks_say_what_is_learned(both: Make, real_encoder: Encoder) -> None:
    ours, theirs = both(TEMPLATES["generation"])
    for record in records(40):
        if any("tool_calls" in m for m in record["messages"]):
            continue  # this template writes none: refused
        conversation = openai(record, Columns(OPENAI, {}))
        options = {"tools": record.get("tools"), "return_assistant_tokens_mask": True, "return_dict": True}
        expected = theirs.apply_chat_template(record["messages"], **options)["assistant_masks"]
        assert learned(ours.render(conversation, True, False), real_encoder) == expected, record


def test_each_answer_is_learned_from_its_header_to_its_end(both: Make) -> None:
    messages = [
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
        {"role": "assistant", "content": "B", "reasoning_content": "hm"},
    ]
    expected = {
        "plain": ["A<|im_end|>", "B<|im_end|>"],
        "generation": ["A<|im_end|>\n", "B<|im_end|>\n"],
        "opens": ["A<|im_end|>", "hm\n</think>\n\nB<|im_end|>"],
        "words": [" A<|im_end|>", " B<|im_end|>"],
        "brackets": [" A<|im_end|>", " B<|im_end|>"],
    }
    for name, answers in expected.items():
        turns = both(TEMPLATES[name])[0].render(read_messages(messages), None, False)
        assert [text for turn in turns for text in turn.target] == answers, name


def test_tools_choose_the_template_named_tool_use(both: Make, real_encoder: Encoder) -> None:
    with_tools = "<|im_start|>system\nTOOLS {{ tools | tojson }}<|im_end|>\n" + PLAIN
    ours, theirs = both(PLAIN, tool_use=with_tools)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        turns = ours.render(read_messages(messages, tools), None, False)
        assert "".join(text for turn in turns for text in (*turn.source, *turn.target)) == text
        assert ("TOOLS" in text) == bool(tools)


def test_named_templates_go_along_with_a_model(tmp_path: Path, tiny_tokenizer: str) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "a"
    shutil.copytree(tiny_tokenizer, source)
    (source / "chat_template.jinja").write_text(PLAIN)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    carry_files(source, tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b").chat_template == {"default": PLAIN, "tool_use": "T"}


def test_auto_follows_the_tokenizer_and_qwen3_warns_where_it_does_not_fit(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    shutil.copytree(real_data / "qwen3-tokenizer", folder)
    assert misfit("qwen3", open_tokenizer(str(folder))) is None, "the hybrid models know thoughts"
    (folder / "chat_template.jinja").write_text(PLAIN)
    assert "does not know" in str(misfit("qwen3", open_tokenizer(str(folder))))
    assert misfit("auto", open_tokenizer(str(folder))) is None
    assert open_template("auto", open_tokenizer(str(folder))).identity.startswith("hf:")
    (folder / "chat_template.jinja").write_text(TEMPLATES["opens"])
    assert "opens them" in str(misfit("qwen3", open_tokenizer(str(folder))))
    assert open_template("auto", open_tokenizer(str(folder))).opens_thought
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    assert open_template("auto", open_tokenizer(str(folder))).identity == "qwen3", "a tokenizer without a template"
    listed = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TEMPLATES["calls"]}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": listed}))
    assert open_template("auto", open_tokenizer(str(folder))).identity.startswith("hf:")
