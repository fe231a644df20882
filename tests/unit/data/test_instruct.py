"""Records -> files of input_ids, attention_mask and labels; cutting, packing, pairs."""

from __future__ import annotations

import bisect
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lines import write_lines

from qwen3_npu.data.preprocess.packing import knapsacks
from qwen3_npu.data.train.turns import limits
from qwen3_npu.errors import UsageError

ALPACA = [
    {"instruction": "What is the capital", "input": "of France?", "output": "The capital is Paris."},
    {"instruction": "one", "input": "", "output": "two three", "history": [["four", "five"]], "system": "six"},
]
MAP = json.dumps({"history": "history", "system": "system"})


@pytest.fixture
def encode(tiny_tokenizer: str) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tiny_tokenizer + "/tokenizer.json")
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def read(documents: Callable, prefix: Path) -> dict[str, list[list[int]]]:
    """The three files of a fine-tuning set."""
    return {name: documents(f"{prefix}_packed_{name}_document") for name in ("input_ids", "attention_mask", "labels")}


def test_alpaca(tmp_path: Path, run: Callable, documents: Callable, encode: Callable) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"system": None, "history": None, **r} for r in ALPACA])
    arguments = ("--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3")
    run("--input", source, *arguments, "--map-keys", MAP, "--output-prefix", tmp_path / "o")
    data = read(documents, tmp_path / "o")
    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    parts = [
        [(ask.format("What is the capital\nof France?"), False), ("The capital is Paris.<|im_end|>\n", True)],
        [
            ("<|im_start|>system\nsix<|im_end|>\n" + ask.format("four"), False),
            ("five<|im_end|>\n", True),
            (ask.format("one"), False),
            ("two three<|im_end|>\n", True),
        ],
    ]
    for i, expected in enumerate(parts):
        assert data["input_ids"][i] == [token for text, _ in expected for token in encode(text)]
        assert data["labels"][i] == [t if learned else -100 for text, learned in expected for t in encode(text)]
        assert data["attention_mask"][i] == [1] * len(data["input_ids"][i])


def test_append_eod_is_learned(tmp_path: Path, run: Callable, documents: Callable, encode: Callable) -> None:
    source = write_lines(tmp_path / "a.jsonl", ALPACA[:1])
    arguments = ("--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen", "--append-eod")
    run("--input", source, *arguments, "--output-prefix", tmp_path / "o")
    data = read(documents, tmp_path / "o")
    end = encode("<|im_end|>")
    assert data["input_ids"][0][-2:] == data["labels"][0][-2:] == end * 2


def test_limits_are_in_proportion() -> None:
    assert limits(10, 10, 100) == (10, 10)
    assert limits(90, 30, 100) == (70, 30)  # a short answer is kept whole
    assert limits(30, 90, 100) == (30, 70)  # a short question is kept whole
    assert limits(60, 180, 100) == (25, 75)
    assert limits(0, 5, 0) == (0, 0)


@pytest.mark.parametrize("rule", ["cut", "drop"])
def test_long_samples_are_cut_or_left_out(
    rule: str, tmp_path: Path, run: Callable, documents: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"instruction": "one two " * 20, "input": "", "output": "three four " * 20}
    hopeless = {"instruction": "one two " * 100, "input": "", "output": "", "history": [["five " * 200, "six"]]}
    source = write_lines(tmp_path / "a.jsonl", [{"history": None, **r} for r in (ALPACA[0], long, hopeless)])
    arguments = ("--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3", "--append-eod")
    arguments += ("--map-keys", '{"history": "history"}', "--seq-length", 64, "--overlong", rule)
    caplog.set_level("INFO", "qwen3_npu")
    run("--input", source, *arguments, "--output-prefix", tmp_path / "o")
    data = read(documents, tmp_path / "o")
    assert [len(ids) for ids in data["input_ids"]][1:] == ([63, 63] if rule == "cut" else [])
    assert all(any(label != -100 for label in labels) for labels in data["labels"])
    words = "over-long samples truncated" if rule == "cut" else "over-long samples left out"
    assert f"2 {words}" in caplog.text


def test_a_cut_that_leaves_nothing_to_learn_leaves_the_sample_out(
    tmp_path: Path, run: Callable, documents: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    unlearned = {"role": "assistant", "content": "x", "loss_weight": 0}
    silent = {"messages": [{"role": "user", "content": "q"}, unlearned]}
    spoken = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]}
    source = write_lines(tmp_path / "a.jsonl", [silent, spoken])
    caplog.set_level("INFO", "qwen3_npu")
    arguments = ("--handler-name", "OpenAIInstructionHandler", "--prompt-type", "qwen3")
    run("--input", source, *arguments, "--output-prefix", tmp_path / "o")
    assert len(read(documents, tmp_path / "o")["input_ids"]) == 1
    assert "1 samples without anything to learn" in caplog.text


def greedy(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition: the longest that fits, from a sorted list; of equally long ones the last."""
    by_length = defaultdict(list)
    for i, length in enumerate(lengths):
        by_length[length].append(i)
    numbers, packs = sorted(lengths), []
    while numbers:
        chosen, room = [], capacity
        while place := bisect.bisect(numbers, room):
            length = numbers.pop(place - 1)
            room -= length
            chosen.append(by_length[length].pop())
        packs.append(chosen)
    return packs


def test_knapsacks_are_the_greedy_ones() -> None:
    lengths = np.random.default_rng(1).integers(1, 40, 300)
    assert list(knapsacks(lengths, 50)) == greedy(lengths.tolist(), 50)


@pytest.mark.parametrize("neat", [True, False])
@pytest.mark.parametrize("subsets", [1, 3])
def test_packs(
    neat: bool, subsets: int, tmp_path: Path, run: Callable, documents: Callable, tiny_tokenizer: str, encode: Callable
) -> None:
    records = [{"instruction": "one " * n, "input": "", "output": "two " * (1 + n % 5)} for n in range(1, 40)]
    source = write_lines(tmp_path / "a.jsonl", records)
    arguments = ("--input", source, "--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3")
    run(*arguments, "--seq-length", 96, "--output-prefix", tmp_path / "single")
    flags = ["--neat-pack"] if neat else []
    run(*arguments, "--seq-length", 96, "--pack", *flags, "--n-subs", subsets, "--output-prefix", tmp_path / "o")
    single, packed = read(documents, tmp_path / "single"), read(documents, tmp_path / "o")
    lengths = [len(ids) for ids in single["input_ids"]]
    step = len(lengths) // subsets
    expected = [[s + i for i in p] for s in range(0, len(lengths), step) for p in greedy(lengths[s : s + step], 95)]
    assert len(packed["input_ids"]) == len(expected) < len(records)
    (pad,) = encode("<|endoftext|>")
    for row, members in enumerate(expected):
        ids = [token for i in members for token in single["input_ids"][i]]
        labels = [label for i in members for label in single["labels"][i]]
        numbers = [n for n, i in enumerate(members, start=1) for _ in single["input_ids"][i]]
        rest = 96 - len(ids)
        assert rest >= 1
        assert packed["input_ids"][row] == ids + [pad] * rest
        assert packed["labels"][row] == labels + [-100] * rest
        assert packed["attention_mask"][row] == (numbers + [0] * rest if neat else [1] * 96)
    assert not list(tmp_path.glob("*unpacked*"))


def test_sharegpt_with_tags_and_tools(tmp_path: Path, run: Callable, documents: Callable, encode: Callable) -> None:
    turns = [
        ("human", "q"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "r"),
        ("gpt", "a"),
    ]
    record = {"talk": [{"who": w, "what": t} for w, t in turns], "can": '[{"name": "f", "parameters": {}}]'}
    tags = dict(zip(("role_tag", "content_tag"), ("who", "what"), strict=True))
    tags |= {
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
    }
    keys = json.dumps({"messages": "talk", "tools": "can", "tags": tags})
    source = write_lines(tmp_path / "a.jsonl", [record])
    arguments = ("--handler-name", "SharegptStyleInstructionHandler", "--prompt-type", "qwen3", "--map-keys", keys)
    run("--input", source, *arguments, "--output-prefix", tmp_path / "o")
    learned = [label for label in read(documents, tmp_path / "o")["labels"][0] if label != -100]
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n'
    assert learned == encode(call) + encode("a<|im_end|>\n")


@pytest.mark.parametrize("style", ["Alpaca", "Sharegpt"])
def test_pairs(style: str, tmp_path: Path, run: Callable, documents: Callable, encode: Callable) -> None:
    if style == "Alpaca":
        record: dict = {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}
    else:
        answers = {k: {"from": "gpt", "value": v} for k, v in (("chosen", "good"), ("rejected", "bad"))}
        record = {"conversations": [{"from": "human", "value": "q"}], **answers}
    source = write_lines(tmp_path / "a.jsonl", [record])
    arguments = ("--handler-name", f"{style}StylePairwiseHandler", "--prompt-type", "qwen3")
    run("--input", source, *arguments, "--output-prefix", tmp_path / "o")
    prompt = encode("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    for name, text in (("chosen", "good"), ("rejected", "bad")):
        answer = encode(f"{text}<|im_end|>\n")
        assert documents(tmp_path / f"o_packed_{name}_input_ids_document") == [prompt + answer]
        assert documents(tmp_path / f"o_packed_{name}_labels_document") == [[-100] * len(prompt) + answer]


@pytest.mark.parametrize("style", ["AlpacaStyle", "SharegptStyle", "OpenAI"])
def test_labelled_answers(style: str, tmp_path: Path, run: Callable, documents: Callable, encode: Callable) -> None:
    """Labels of every spelling, as true where true is meant; earlier answers are a part of the prompt."""
    given = [True, 1, 1.0, "true", "Desirable", "1", False, 0, "0", "FALSE", "undesirable"]
    records = []
    for label in given:
        turns = [("human", "q"), ("gpt", "e"), ("human", "r"), ("gpt", "good")]
        roles = {"human": "user", "gpt": "assistant"}
        record: dict = {"messages": [{"role": roles[who], "content": text} for who, text in turns]}
        if style == "SharegptStyle":
            record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
        elif style == "AlpacaStyle":
            record = {"instruction": "r", "input": "", "output": "good", "history": [["q", "e"]]}
        records.append({**record, "kto_tag": label})
    keys = {"label": "kto_tag"} | ({"history": "history"} if style == "AlpacaStyle" else {})
    source = write_lines(tmp_path / "a.jsonl", records)
    arguments = ("--handler-name", f"{style}KtoHandler", "--prompt-type", "qwen3", "--map-keys", json.dumps(keys))
    run("--input", source, *arguments, "--output-prefix", tmp_path / "o")
    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    prompt = encode(f"{ask.format('q')}e<|im_end|>\n{ask.format('r')}<think>\n\n</think>\n\n")
    answer = encode("good<|im_end|>\n")
    assert documents(tmp_path / "o_packed_answer_input_ids_document") == [prompt + answer] * 11
    assert documents(tmp_path / "o_packed_answer_labels_document") == [[-100] * len(prompt) + answer] * 11
    assert documents(tmp_path / "o_packed_answer_desirable_document") == [[1]] * 6 + [[0]] * 5


BROKEN = {
    "AlpacaStyleInstructionHandler": [
        ({"instruction": "q", "input": ""}, "no column 'output'"),
        ({"instruction": "q", "input": "", "output": None}, "column 'output'"),
        ({"instruction": 3, "input": "", "output": "a"}, "column 'instruction' is not text"),
    ],
    "SharegptStyleInstructionHandler": [
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 1 is from 'gpt', where 'human' or 'observation'"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "1 messages"),
        ({"conversations": "x"}, "not a list of messages"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}]},
            "function call is not JSON",
        ),
    ],
    "OpenAIInstructionHandler": [
        ({"messages": [{"role": "user", "content": "q"}]}, "no answer to learn"),
        ({"messages": [{"role": "robot", "content": "q"}]}, "role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no text"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": ["f"]}]},
            "function call is",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": "["},
            "tools",
        ),
    ],
    "AlpacaStylePairwiseHandler": [
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": None}, "two answers"),
    ],
    "AlpacaStyleKtoHandler": [
        ({"instruction": "q", "input": "", "output": "a"}, "no column 'label'"),
        ({"instruction": "q", "output": "a", "kto_tag": True}, """--map-keys '{"label": "kto_tag"}'"""),
        ({"instruction": "q", "input": "", "output": "a", "label": None}, "column 'label' is None"),
        ({"instruction": "q", "input": "", "output": "a", "label": "maybe"}, "column 'label' is 'maybe'"),
        ({"instruction": "q", "input": "", "output": "a", "label": 2}, "column 'label' is 2"),
    ],
    "OpenAIKtoHandler": [
        (
            {
                "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}],
                "label": 1,
            },
            "the data say not to learn it",
        ),
    ],
}


@pytest.mark.parametrize(("handler", "record", "words"), [(h, r, w) for h, rows in BROKEN.items() for r, w in rows])
def test_broken_conversations_name_the_line(
    handler: str, record: dict, words: str, tmp_path: Path, run: Callable
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [record])
    with pytest.raises(UsageError, match=rf"a\.jsonl:1: .*{words}"):
        run("--input", source, "--handler-name", handler, "--prompt-type", "qwen3", "--output-prefix", tmp_path / "o")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_columns_that_are_not_used_are_said_aloud(
    tmp_path: Path, run: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    thinking = {"role": "assistant", "content": "a", "thoughts": "hm"}
    record = {"messages": [{"role": "user", "content": "q"}, thinking], "system": "S"}
    source = write_lines(tmp_path / "a.jsonl", [record])
    caplog.set_level("INFO", "qwen3_npu")
    arguments = ("--handler-name", "OpenAIInstructionHandler", "--prompt-type", "qwen3")
    run("--input", source, *arguments, "--output-prefix", tmp_path / "o")
    assert "1 records with a column 'system' that is not used" in caplog.text
    assert "message key 'thoughts' (thoughts are read from 'reasoning_content') that is not used" in caplog.text
