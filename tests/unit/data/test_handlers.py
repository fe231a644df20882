"""Which handler, which end of a sample, which record of how data were made; two runs on one output."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lines import write_lines

from qwen3_npu.args.preprocess import HANDLER_NAMES, RecordArgs
from qwen3_npu.data.preprocess.handlers import HANDLERS
from qwen3_npu.data.train.token_record import find_record
from qwen3_npu.errors import UsageError
from qwen3_npu.lease import Lease

CHAT = ("--handler-name", "OpenAIInstructionHandler", "--prompt-type")
RECORD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
OWN = """
from qwen3_npu.data.preprocess.handlers import InstructionHandler, conversations
from qwen3_npu.data.text.messages import read_messages

def read(record, columns):
    posts = columns.get(record, "posts")
    return read_messages([{"role": p["by"], "content": p["text"]} for p in posts])

forum = conversations(InstructionHandler, read, {"posts": "posts"})
number = 3

def wrong(args, tokenizer):
    return []

def lost(record, columns):
    return record["nothing"]

def absent(record, columns):
    pass

loses = conversations(InstructionHandler, lost, {"posts": "posts"})
nothing = conversations(InstructionHandler, absent, {"posts": "posts"})
"""


def test_the_help_lists_the_handlers() -> None:
    assert tuple(HANDLERS) == HANDLER_NAMES
    help_text = RecordArgs.__dataclass_fields__["handler_name"].metadata["help"]
    assert all(name in help_text for name in HANDLERS)


def test_records_are_text_by_default(tmp_path: Path, run: Callable, documents: Callable) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one two"}])
    run("--input", source, "--output-prefix", tmp_path / "o")
    run("--input", source, "--handler-name", "GeneralPretrainHandler", "--output-prefix", tmp_path / "p")
    assert documents(tmp_path / "o_text_document") == documents(tmp_path / "p_text_document")


def test_a_handler_of_ones_own(
    tmp_path: Path, run: Callable, documents: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_forum_handler.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    posts = {"posts": [{"by": m["role"], "text": m["content"]} for m in RECORD["messages"]]}
    flags = ("--input", write_lines(tmp_path / "a.jsonl", [posts]), "--prompt-type", "qwen3")
    run(*flags, "--handler-name", "own_forum_handler:forum", "--output-prefix", tmp_path / "o")
    run("--input", write_lines(tmp_path / "b.jsonl", [RECORD]), *CHAT, "qwen3", "--output-prefix", tmp_path / "p")
    for what in ("input_ids", "labels"):
        assert documents(tmp_path / f"o_packed_{what}_document") == documents(tmp_path / f"p_packed_{what}_document")
    for name, words in (
        ("own_forum_handler:number", "has no function number"),
        ("own_forum_handler:wrong", "returns a list without 'outputs'"),
        ("own_forum_handler:loses", r"loses: KeyError: 'nothing' \(.*own_forum_handler.py:16\)"),
        ("own_forum_handler:nothing", r"a.jsonl:1: absent\(\) of the handler returned a NoneType, not a Conv"),
        ("own_forum_handler:", "give module:function"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
        ("AlpacaHandler", "did you mean"),
    ):
        with pytest.raises(UsageError, match=words):
            run(*flags, "--handler-name", name, "--output-prefix", tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize(("flags", "eod"), [(("--prompt-type", "qwen3"), "<|im_end|>"), ((), "<|endoftext|>")])
def test_the_end_of_a_sample_with_a_base_tokenizer(
    flags: tuple, eod: str, tmp_path: Path, tiny_tokenizer: str, run: Callable, documents: Callable
) -> None:
    """MindSpeed-LLM's templates replace eos_token by the token that ends an answer."""
    shutil.copytree(tiny_tokenizer, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    source = write_lines(tmp_path / "a.jsonl", [{**RECORD, "text": "x"}])
    more = ("--handler-name", "OpenAIInstructionHandler", *flags) if flags else ()
    base = ("--tokenizer-name-or-path", tmp_path / "base")
    run("--input", source, *more, *base, "--append-eod", "--output-prefix", tmp_path / "o")
    name = "packed_input_ids" if flags else "text"
    vocabulary = json.loads((tmp_path / "base" / "tokenizer.json").read_text())["added_tokens"]
    number = next(token["id"] for token in vocabulary if token["content"] == eod)
    assert documents(tmp_path / f"o_{name}_document")[0][-1] == number


def test_merging_what_was_made_differently_is_refused(tmp_path: Path, run: Callable) -> None:
    source = write_lines(tmp_path / "a.jsonl", [RECORD])
    for name in ("qwen", "qwen3"):
        run("--input", source, *CHAT, name, "--output-prefix", tmp_path / "d" / name)
    merge = ("--input", tmp_path / "d", "--merge-group-keys", "packed_labels", "--output-prefix", tmp_path / "m")
    with pytest.raises(UsageError, match=r"made differently \(prompt_type qwen3 and qwen\)"):
        run(*merge)
    assert not list(tmp_path.glob("m*"))
    run("--input", source, *CHAT, "qwen3", "--output-prefix", tmp_path / "d" / "qwen")
    run(*merge)
    record = find_record(str(tmp_path / "m_packed_labels"))
    assert record is not None
    assert record.made["prompt_type"] == "qwen3"


def test_the_record_says_how_to_prompt_what_was_learned(tmp_path: Path, run: Callable, tiny_tokenizer: str) -> None:
    """Answers without thoughts were learned behind the empty thoughts of enable_thinking=False."""
    shutil.copytree(tiny_tokenizer, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    flags = (*CHAT, "auto", "--tokenizer-name-or-path", tmp_path / "t")
    thought = [RECORD["messages"][0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}]
    for name, record, thinking in (("plain", RECORD, "false"), ("thought", {"messages": thought}, "none")):
        run("--input", write_lines(tmp_path / f"{name}.jsonl", [record]), *flags, "--output-prefix", tmp_path / name)
        made = find_record(str(tmp_path / f"{name}_packed_input_ids_document"))
        assert made is not None
        assert (made.made["prompt_type"], made.made["enable_thinking"]) == ("hf", thinking)


def test_a_second_run_on_one_output_is_refused(tmp_path: Path, run: Callable) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    with Lease(tmp_path / "o.lease", "x", "y"), pytest.raises(UsageError, match="give another --output-prefix"):
        run("--input", source, "--output-prefix", tmp_path / "o")
    run("--input", source, "--output-prefix", tmp_path / "o")
    assert not list(tmp_path.glob("*.lease"))
