"""What messages say about learning, and calls in their older form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lines import write_lines

from qwen3_npu.data.text.conversation import ToolCall
from qwen3_npu.data.text.messages import read_messages
from qwen3_npu.errors import UsageError

OPENAI = ("--handler-name", "OpenAIInstructionHandler", "--prompt-type", "qwen3")
CASES = Path(__file__).resolve().parents[3].parent / "shared" / "cases" / "data"


def two(**more: object) -> list[dict[str, Any]]:
    """Two answers; the first with more keys."""
    first: dict[str, Any] = {"role": "assistant", "content": "bad", **more}
    return [
        {"role": "user", "content": "a"},
        first,
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "good"},
    ]


@pytest.mark.parametrize(
    ("key", "value", "is_learned"),
    [
        ("weight", 0, False),  # OpenAI, TRL
        ("weight", 1, True),
        ("weight", 0.0, False),
        ("loss_weight", 0, False),  # MindSpeed-LLM
        ("loss", False, False),  # ms-swift
        ("loss", True, True),
        ("loss", None, True),
        ("loss_scale", 0.0, False),
        ("train", False, False),  # axolotl
        ("training", False, False),
        ("mask", True, False),
        ("mask", False, True),
        ("loss_mask", 0, False),
    ],
)
def test_a_message_says_whether_it_is_learned(key: str, value: object, is_learned: bool) -> None:
    assert [m.learned for m in read_messages(two(**{key: value})).messages] == [True, is_learned, True, True]


@pytest.mark.parametrize(
    "more",
    [
        {"weight": 0.5},
        {"loss": "no"},
        {"mask": 1},
        {"weight": 0, "train": True},
        {"train_detail": [{"begin_offset": 0}]},
    ],
)
def test_what_cannot_be_written_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"message 2 .*{next(iter(more))}"):
        read_messages(two(**more))


@pytest.mark.parametrize(
    ("handler", "role", "text", "me"),
    [("OpenAI", "role", "content", "assistant"), ("SharegptStyle", "from", "value", "gpt")],
)
def test_masked_answers_are_given_and_counted(
    handler: str,
    role: str,
    text: str,
    me: str,
    tmp_path: Path,
    run: Callable,
    documents: Callable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    you = "user" if me == "assistant" else "human"
    turns = [
        {role: you, text: "a"},
        {role: me, text: "bad", "weight": 0},
        {role: you, text: "c"},
        {role: me, text: "good"},
    ]
    key = "messages" if handler == "OpenAI" else "conversations"
    caplog.set_level("INFO", "qwen3_npu")
    outputs = []
    for number, answers in enumerate((turns, [{**turn, "weight": 1} for turn in turns])):
        source = write_lines(tmp_path / f"{number}.jsonl", [{key: answers}])
        run(
            "--input",
            source,
            "--handler-name",
            f"{handler}InstructionHandler",
            "--prompt-type",
            "qwen3",
            "--output-prefix",
            tmp_path / str(number),
        )
        outputs.append(
            [documents(tmp_path / f"{number}_packed_{what}_document")[0] for what in ("input_ids", "labels")]
        )
    (ids, labels), (same_ids, all_labels) = outputs
    assert ids == same_ids
    learned, all_learned = ([token for token in row if token != -100] for row in (labels, all_labels))
    assert learned == all_learned[-len(learned) :]
    assert labels != all_labels
    assert "1 answers that are not learned, as the data say" in caplog.text


ALPACA = {"instruction": "a", "output": "good"}


@pytest.mark.parametrize(
    ("handler", "more", "is_left_out"),
    [
        ("alpaca", {"weight": 0}, True),
        ("alpaca", {"train": False}, True),
        ("alpaca", {"weight": 0.7}, False),
        ("openai", {"loss": False}, True),
        ("openai", {"loss": 0.0}, False),  # a score
        ("openai", {"ignore": True}, True),
        ("openai", {"mask": [1, 0]}, False),
    ],
)
def test_a_record_that_says_so_is_left_out_and_counted(
    handler: str, more: dict[str, Any], is_left_out: bool, run: Callable, tmp_path: Path, caplog: Any
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    record = ALPACA if handler == "alpaca" else {"messages": two()}
    lines = write_lines(tmp_path / "data.jsonl", [{**record, **more}, record])
    flags = OPENAI if handler == "openai" else ("--handler-name", "AlpacaStyleInstructionHandler", *OPENAI[2:])
    caplog.set_level("INFO", "qwen3_npu")
    run("--input", lines, "--output-prefix", tmp_path / "out", *flags)
    assert len(IndexedDataset(str(tmp_path / "out_packed_labels_document"))) == (1 if is_left_out else 2)
    assert ("1 records left out, as they say" in caplog.text) == is_left_out


def test_older_function_calls_are_tool_calls() -> None:
    """OpenAI's deprecated function_call and role function, as in its API reference of 2023."""
    old = read_messages(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "R"},
            {"role": "assistant", "content": "a"},
        ]
    )
    assert old.messages[1].calls == (ToolCall("f", "{}"),)
    assert [m.role for m in old.messages] == ["user", "assistant", "tool", "assistant"]
    assert old.messages[1].given["tool_calls"][0]["function"]["name"] == "f"
    assert "function_call" not in old.messages[1].given
    with pytest.raises(ValueError, match="a function call is"):
        read_messages([{"role": "user", "content": "q"}, {"role": "assistant", "function_call": {"name": "f"}}])


def test_keys_that_nobody_reads_are_listed_once(
    tmp_path: Path, run: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    record = {"messages": [{**m, "emphasis": "high", "id": 3} for m in two()], "persona": "a pirate", "source": "x"}
    record |= {"keep": False, "temperature": 0, "note": "", "remark": None, "extras": [], "more": {}}
    source = write_lines(tmp_path / "a.jsonl", [record, {**record, "messages": two(emphasis="low")}])
    caplog.set_level("INFO", "qwen3_npu")
    assert run("--input", source, *OPENAI, "--check") == 0
    # False and 0 say something; what is empty does not.
    for what in ("persona' of a record", "keep' of a record", "temperature' of a record", "emphasis' of a message"):
        assert caplog.text.count(f"2 x key '{what} is not used") == 1
    for metadata in ("'id'", "'source'", "'note'", "'remark'", "'extras'", "'more'"):
        assert metadata not in caplog.text


def test_empty_parts_are_text() -> None:
    content = [{"type": "text", "text": ""}, {"type": "text", "text": "x"}]
    read = read_messages([{"role": "user", "content": content}, {"role": "assistant", "content": []}])
    assert [m.content for m in read.messages] == ["x", ""]
    with pytest.raises(ValueError, match="no text"):
        read_messages([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_a_missing_column_names_the_remedy(tmp_path: Path, run: Callable) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"instruction": "q", "response": "a"}])
    flags = (
        "--handler-name",
        "AlpacaStyleInstructionHandler",
        "--prompt-type",
        "qwen3",
        "--output-prefix",
        tmp_path / "o",
    )
    with pytest.raises(UsageError, match="no column 'output'") as error:
        run("--input", source, *flags)
    remedy = json.dumps({"response": "response"})
    assert f"--map-keys '{remedy}'" in str(error.value)
    assert run("--input", source, *flags, "--map-keys", remedy) == 0
