"""--check, --show, --merge-group-keys, --max-samples, folders and datasets."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lines import write_lines
from tokenizers import Tokenizer

from qwen3_npu.data.preprocess import run as preprocess
from qwen3_npu.data.text.encoder import Encoder
from qwen3_npu.errors import UsageError

PRETRAIN = ("--handler-name", "GeneralPretrainHandler")
OPENAI = ("--handler-name", "OpenAIInstructionHandler", "--prompt-type", "qwen3")


def talk(answer: str, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer, **more}]}


@pytest.mark.parametrize(
    ("records", "flags", "words"),
    [
        ([talk("<think>\n\n</think>\n\na")], (), "empty thoughts, which are learned"),
        ([talk("<think>\nx\n</think>\n\na", reasoning_content="x")], (), "thoughts twice"),
        ([talk("<think>\nx a")], (), "<think> without </think>"),
        ([talk("a", thoughts="hm")], (), "'thoughts' (thoughts are read from 'reasoning_content') that is not used"),
        ([talk("a")], ("--enable-thinking", "true"), "learns empty ones"),
        ([talk("<think>\nx\n</think>\n\na")], ("--enable-thinking", "false"), "thoughts are removed"),
        ([talk("word " * 70 + "and the")], (), "seems to be cut off"),
        ([talk(" ")], (), "an answer is empty"),
        ([talk("a<|im_end|>b")], (), "control tokens"),
        ([talk("a", loss_weight=0), talk("b")], (), "samples without anything to learn"),
        ([talk("a"), talk("a")], (), "documents that are there already"),
        ([talk("one two three " * 9)], ("--seq-length", "32"), "over-long samples truncated"),
        (
            [talk("one two three " * 9), talk("a")],
            ("--seq-length", "32", "--overlong", "drop"),
            "over-long samples left out",
        ),
    ],
)
def test_warnings(
    records: list, flags: tuple, words: str, tmp_path: Path, run: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_lines(tmp_path / "a.jsonl", records)
    caplog.set_level("INFO", "qwen3_npu")
    assert run("--input", source, *OPENAI, *flags, "--check") == 0
    assert words in caplog.text
    assert run("--input", source, *OPENAI, *flags, "--check", "--strict") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"], "nothing is written"


def test_clean_data_passes(tmp_path: Path, run: Callable, caplog: pytest.LogCaptureFixture) -> None:
    source = write_lines(tmp_path / "a.jsonl", [talk(f"answer {i}") for i in range(20)])
    caplog.set_level("INFO", "qwen3_npu")
    assert run("--input", source, *OPENAI, "--check", "--strict") == 0
    for words in ("no warnings", "20 documents", "median", "learned: ", "up to "):
        assert words in caplog.text


def test_show_draws_what_is_learned(tmp_path: Path, run: Callable, caplog: pytest.LogCaptureFixture) -> None:
    source = write_lines(tmp_path / "a.jsonl", [talk("first"), talk("second"), talk("third")])
    caplog.set_level("INFO", "qwen3_npu")
    assert run("--input", source, *OPENAI, "--show", 2) == 0
    assert (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[[first<|im_end|>\n]]"
        in caplog.text
    )
    assert "[[second<|im_end|>\n]]" in caplog.text
    assert "third" not in caplog.text


def test_check_of_text_and_pairs(tmp_path: Path, run: Callable, caplog: pytest.LogCaptureFixture) -> None:
    text = write_lines(tmp_path / "t.jsonl", [{"text": "one"}, {"text": "one"}])
    pair = write_lines(tmp_path / "p.jsonl", [{"instruction": "q", "chosen": "a", "rejected": "a"}])
    caplog.set_level("INFO", "qwen3_npu")
    assert run("--input", text, *PRETRAIN, "--check", "--show", 1, "--strict") == 1
    flags = ("--handler-name", "AlpacaStylePairwiseHandler", "--prompt-type", "qwen3")
    assert run("--input", pair, *flags, "--check", "--show", 1, "--strict") == 1
    assert "chosen and rejected are the same" in caplog.text
    assert "sample 1, rejected_input_ids" in caplog.text


def test_check_tells_how_long_preferred_answers_are(
    tmp_path: Path, run: Callable, tiny_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    long, short = "one two three four five six seven eight nine ten", "one"
    records = [{"instruction": f"q{i}", "chosen": long if i else short, "rejected": short} for i in range(4)]
    pairs = write_lines(tmp_path / "p.jsonl", records)
    caplog.set_level("INFO", "qwen3_npu")
    flags = ("--prompt-type", "qwen3", "--check", "--show", 1)
    run("--input", pairs, "--handler-name", "AlpacaStylePairwiseHandler", *flags)
    tokenizer = Tokenizer.from_file(f"{tiny_tokenizer}/tokenizer.json")
    sizes = [len(tokenizer.encode(f"{text}<|im_end|>\n").ids) for text in (long, short)]
    mean = (3 * sizes[0] + sizes[1]) / 4
    told = f"chosen {mean:.1f} tokens, rejected {sizes[1]:.1f} on average: {mean / sizes[1]:.2f} times as long"
    assert told in caplog.text
    assert "chosen over twice as long          3 ####" in caplog.text
    assert "chosen about as long               1 ####" in caplog.text
    labelled = [{"instruction": f"q{i}", "output": long if i else short, "label": i > 0} for i in range(2)]
    source = write_lines(tmp_path / "k.jsonl", labelled)
    run("--input", source, "--handler-name", "AlpacaStyleKtoHandler", *flags)
    assert f"desirable {sizes[0]:.1f} tokens, undesirable {sizes[1]:.1f} on average" in caplog.text
    assert "sample 1, answer_input_ids, undesirable: " in caplog.text
    assert "1 desirable answers" in caplog.text


def test_strict_needs_check(tmp_path: Path, run: Callable) -> None:
    with pytest.raises(UsageError, match="--strict"):
        run("--input", "x", *PRETRAIN, "--strict")


# ------------------------------------------------------------------------------------------ merge


def test_merge(tmp_path: Path, run: Callable, documents: Callable) -> None:
    for name, texts in (("b", ["one", "two three"]), ("a", ["four"])):
        source = write_lines(tmp_path / f"{name}.jsonl", [{"text": t} for t in texts])
        run("--input", source, *PRETRAIN, "--output-prefix", tmp_path / "parts" / name)
    run("--input", tmp_path / "parts", "--merge-group-keys", "text_document", "--output-prefix", tmp_path / "all" / "m")
    parts = [documents(tmp_path / "parts" / f"{name}_text_document") for name in "ab"]
    assert documents(tmp_path / "all" / "m_text_document") == parts[0] + parts[1]


def test_merge_keeps_megatron_files_as_they_are(tmp_path: Path, run: Callable) -> None:
    """uint16 tokens and documents of several sequences, as Megatron-LM's own tool may write."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    for name, rows in (("a", [[[1, 2], [3]], [[4]]]), ("b", [[[5], [6, 7]]])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}_x.bin"), dtype=np.uint16)
        for row in rows:
            for sequence in row:
                builder.add_item(torch.tensor(sequence))
            builder.end_document()
        builder.finalize(str(tmp_path / f"{name}_x.idx"))
    run("--input", tmp_path, "--merge-group-keys", "_x", "--output-prefix", tmp_path / "m")
    merged = IndexedDataset(str(tmp_path / "m__x"))
    assert [merged[i].tolist() for i in range(len(merged))] == [[1, 2], [3], [4], [5], [6, 7]]
    assert merged.document_indices.tolist() == [0, 2, 3, 5]
    assert merged[0].dtype == np.uint16


def test_merge_refuses_half_a_pair(tmp_path: Path, run: Callable) -> None:
    (tmp_path / "a_text_document.bin").write_bytes(b"x")
    arguments = ("--merge-group-keys", "text_document", "--output-prefix", tmp_path / "m")
    with pytest.raises(UsageError, match=r"a_text_document.idx not found"):
        run("--input", tmp_path, *arguments)
    with pytest.raises(UsageError, match=r"no \.bin/\.idx pair"):
        run("--input", tmp_path, "--merge-group-keys", "labels", "--output-prefix", tmp_path / "m")
    with pytest.raises(UsageError, match="takes one folder"):
        run("--input", tmp_path / "no", *arguments)


# ----------------------------------------------------------------------------------------- inputs


def test_folders_patterns_and_max_samples(tmp_path: Path, run: Callable, documents: Callable) -> None:
    (tmp_path / "d").mkdir()
    for name in ("b", "a", "c"):
        write_lines(tmp_path / "d" / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)])
    (tmp_path / "d" / "dataset_info.json").write_text("{}")
    (tmp_path / "d" / "README.md").write_text("x")
    run("--input", tmp_path / "d", *PRETRAIN, "--output-prefix", tmp_path / "all")
    run("--input", tmp_path / "d" / "[bc].jsonl", *PRETRAIN, "--output-prefix", tmp_path / "some")
    run("--input", tmp_path / "d", *PRETRAIN, "--max-samples", 4, "--output-prefix", tmp_path / "four")
    everything = documents(tmp_path / "all_text_document")
    assert len(everything) == 9
    assert documents(tmp_path / "some_text_document") == everything[3:]
    assert documents(tmp_path / "four_text_document") == everything[:4]


def test_a_saved_dataset(tmp_path: Path, run: Callable, documents: Callable) -> None:
    import pyarrow as pa

    (tmp_path / "d").mkdir()
    table = pa.Table.from_pylist([{"text": "one"}, {"text": "two"}])
    for i, rows in enumerate((table.slice(0, 1), table.slice(1, 1))):
        with (
            pa.OSFile(str(tmp_path / "d" / f"data-{1 - i}.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, rows.schema) as w,
        ):
            w.write_table(rows)
    state = {"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}], "_indices_data_files": None}
    (tmp_path / "d" / "state.json").write_text(json.dumps(state))
    run("--input", tmp_path / "d", *PRETRAIN, "--output-prefix", tmp_path / "o")
    write_lines(tmp_path / "same.jsonl", [{"text": "one"}, {"text": "two"}])
    run("--input", tmp_path / "same.jsonl", *PRETRAIN, "--output-prefix", tmp_path / "s")
    assert documents(tmp_path / "o_text_document") == documents(tmp_path / "s_text_document")
    (tmp_path / "dict.d").mkdir()
    (tmp_path / "d").rename(tmp_path / "dict.d" / "train")
    (tmp_path / "dict.d" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    run("--input", tmp_path / "dict.d", *PRETRAIN, "--output-prefix", tmp_path / "one")
    assert documents(tmp_path / "one_text_document") == documents(tmp_path / "o_text_document")
    (tmp_path / "dict.d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UsageError, match=r"several splits; name one: .*dict.d/train or .*dict.d/test"):
        run("--input", tmp_path / "dict.d", *PRETRAIN, "--output-prefix", tmp_path / "o")
    (tmp_path / "dict.d" / "train").rename(tmp_path / "d")
    (tmp_path / "d" / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "x"}]}))
    with pytest.raises(UsageError, match="flatten_indices"):
        run("--input", tmp_path / "d", *PRETRAIN, "--output-prefix", tmp_path / "o")


def test_a_hub_dataset(tmp_path: Path, run: Callable, documents: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}

    class Rows:
        def iter(self, size: int) -> list:
            return [{"text": ["one", "two"]}, {"text": ["three"]}]

    def load_dataset(path: str, **arguments: object) -> Rows:
        asked.update(arguments, path=path)
        if path == "someone/nothing":
            raise FileNotFoundError("not there\nmore")
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    run("--input", "someone/something", *PRETRAIN, "--output-prefix", tmp_path / "o")
    assert len(documents(tmp_path / "o_text_document")) == 3
    assert asked == {"path": "someone/something", "split": "train", "streaming": True}
    (tmp_path / "p.json").write_text('{"path": "x", "name": "en", "split": "test"}')
    run("--input", "y", "--hf-datasets-params", tmp_path / "p.json", *PRETRAIN, "--output-prefix", tmp_path / "o")
    assert asked == {"path": "x", "name": "en", "split": "test", "streaming": True}
    with pytest.raises(UsageError, match=r"`datasets` cannot load it: not there$"):
        run("--input", "someone/nothing", *PRETRAIN, "--output-prefix", tmp_path / "o")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        run("--input", "someone/something", *PRETRAIN, "--output-prefix", tmp_path / "o")


def test_real_samples_of_every_handler(
    tmp_path: Path,
    run: Callable,
    documents: Callable,
    real_data: Path,
    real_encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each real file through its handler with the real tokenizer; megatron reads what comes out."""
    monkeypatch.setattr(preprocess, "open_encoder", lambda *_, **__: real_encoder)
    monkeypatch.setattr(preprocess, "start_loading", lambda *_: None)
    tools = ("--map-keys", '{"tools": "tools"}')
    commands = [
        ("c4_demo.jsonl", ("GeneralPretrainHandler",), 300, "text"),
        ("wiki_demo.txt", ("GeneralPretrainHandler",), 30, "text"),
        ("alpaca_en_demo.json", ("AlpacaPretrainHandler",), 999, "text"),
        (
            "glaive_toolcall_zh_demo.json",
            ("SharegptPretrainHandler", "--json-keys", "conversations"),
            300,
            "conversations",
        ),
        ("alpaca_zh_demo.json", ("AlpacaStyleInstructionHandler", "--prompt-type", "qwen3"), 1000, "packed_labels"),
        (
            "glaive_toolcall_en_demo.json",
            ("SharegptStyleInstructionHandler", "--prompt-type", "qwen3", *tools),
            300,
            "packed_labels",
        ),
        ("reason_tool_use_demo_50.jsonl", ("OpenAIInstructionHandler", "--prompt-type", "hf"), 50, "packed_labels"),
        ("v1_sft_demo.jsonl", ("OpenAIInstructionHandler", "--prompt-type", "qwen"), 500, "packed_labels"),
        ("dpo_en_demo.json", ("SharegptStylePairwiseHandler", "--prompt-type", "qwen3"), 300, "packed_rejected_labels"),
    ]
    for name, (handler, *flags), count, output in commands:
        prefix = tmp_path / name
        tokenizer = ("--tokenizer-name-or-path", real_data / "qwen3-tokenizer")
        run(
            "--input",
            real_data / "sft" / name,
            "--handler-name",
            handler,
            *flags,
            *tokenizer,
            "--output-prefix",
            prefix,
        )
        assert len(documents(f"{prefix}_{output}_document")) == count
