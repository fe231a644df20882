"""Text files -> token files: every input format, the same bytes for any number of workers, read by megatron."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_npu.data.read import blocks
from qwen3_npu.errors import UsageError

TEXTS = ["The capital of France is Paris.", "北京是中国的首都。", "one two\n\nthree", "  four ", "cafe\u0301"]


def write(path: Path, texts: list[str]) -> Path:
    """The texts in the format that the name asks for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = path.name
    rows = [{"text": text, "n": i} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".jsonl"):
        path.write_text(lines)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".jsonl.zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines.encode())
    elif name.endswith("array.json"):
        path.write_text(json.dumps(rows, indent=2))
    elif name.endswith(".json"):
        path.write_text(lines)
    elif name.endswith(".csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "n"])
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(rows)
        opener = pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, opener(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.fixture
def expected(tiny_tokenizer: str) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tiny_tokenizer + "/tokenizer.json")
    eod = tokenizer.token_to_id("<|im_end|>")
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, eod] for text in TEXTS]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "array.json", "lines.json", "a.csv", "a.parquet", "a.arrow", "file.arrow"],
)
def test_every_format_gives_the_same_documents(
    name: str, tmp_path: Path, run: Callable, documents: Callable, expected: list
) -> None:
    source = write(tmp_path / name, TEXTS)
    run(
        "--input", source, "--handler-name", "GeneralPretrainHandler", "--append-eod", "--output-prefix", tmp_path / "o"
    )
    assert documents(tmp_path / "o_text_document") == expected


def test_text_lines(tmp_path: Path, run: Callable, documents: Callable, expected: list) -> None:
    (tmp_path / "a.txt").write_bytes("\r\n".join([TEXTS[0], "", TEXTS[1], "   "]).encode())
    run("--input", tmp_path / "a.txt", "--handler-name", "GeneralPretrainHandler", "--output-prefix", tmp_path / "o")
    assert documents(tmp_path / "o_text_document") == [document[:-1] for document in expected[:2]]


def test_wikitext_articles_are_documents(
    tmp_path: Path, run: Callable, documents: Callable, tiny_tokenizer: str
) -> None:
    from tokenizers import Tokenizer

    articles = [" \n = One = \n \n one two \n = = Part = = \n \n three \n", " \n = Two = \n \n four \n x = y \n"]
    (tmp_path / "wiki.train.tokens").write_text("".join(articles) + " \n")
    run("--input", tmp_path, "--handler-name", "GeneralPretrainHandler", "--output-prefix", tmp_path / "o")
    tokenizer = Tokenizer.from_file(tiny_tokenizer + "/tokenizer.json")
    texts = [tokenizer.decode(ids) for ids in documents(tmp_path / "o_text_document")]
    assert [text.strip() for text in texts] == [article.strip() for article in articles]


def test_workers_do_not_change_a_byte(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)
    monkeypatch.setattr("qwen3_npu.data.read.lines.BLOCK_BYTES", 256)
    source = write(tmp_path / "a.jsonl", [f"{text} {i}" for i in range(60) for text in TEXTS])
    made = []
    for workers in (1, 2, 4):
        prefix = tmp_path / f"w{workers}"
        arguments = ("--input", source, "--handler-name", "GeneralPretrainHandler", "--json-keys", "text")
        run(*arguments, "--workers", workers, "--output-prefix", prefix)
        made.append([(tmp_path / f"w{workers}_text_document{end}").read_bytes() for end in (".bin", ".idx")])
    assert made[0] == made[1] == made[2]
    assert len(made[0][0]) > 1000


def test_several_keys_give_several_files(tmp_path: Path, run: Callable, documents: Callable) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "one", "body": "two three"}\n{"title": "", "body": "four"}\n')
    arguments = ("--handler-name", "GeneralPretrainHandler", "--json-keys", "title", "body")
    run("--input", tmp_path / "a.jsonl", *arguments, "--output-prefix", tmp_path / "o")
    assert len(documents(tmp_path / "o_title_document")) == 1  # an empty text is no document
    assert len(documents(tmp_path / "o_body_document")) == 2
    assert not list(tmp_path.glob("*tmp*"))


def test_broken_records_stop_or_are_counted(
    tmp_path: Path, run: Callable, documents: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "one"}\n\n{"text": \n{"text": "tw\xffo"}\n{"txt": "x"}\n{"text": "three"}'
    )
    arguments = ("--input", tmp_path / "a.jsonl", "--handler-name", "GeneralPretrainHandler")
    with pytest.raises(UsageError, match=r"a.jsonl:3: not JSON.*--max-bad-records"):
        run(*arguments, "--output-prefix", tmp_path / "o")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"], "nothing half-written"
    caplog.set_level("INFO", "qwen3_npu")
    run(*arguments, "--max-bad-records", 3, "--output-prefix", tmp_path / "o")
    assert len(documents(tmp_path / "o_text_document")) == 2
    for words in ("a.jsonl:3: not JSON", "a.jsonl:4: not UTF-8", "a.jsonl:5: no column 'text'", "3 broken records"):
        assert words in caplog.text
