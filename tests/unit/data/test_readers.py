"""Awkward files: marks at the start, numbers of any size, nulls of structs, JSON of another shape."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lines import write_lines

from qwen3_npu.data.read.blocks import parse_block
from qwen3_npu.data.read.open import open_inputs
from qwen3_npu.errors import UsageError

BOM = b"\xef\xbb\xbf"
PRETRAIN = ("--handler-name", "GeneralPretrainHandler")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none may be broken."""
    found = []
    for block in open_inputs([str(path)]).blocks(()):
        records, bad = parse_block(block)
        assert not bad, bad
        found += [record for _, record in records]
    return found


@pytest.mark.parametrize(
    ("name", "content", "records"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"}\n', [{"text": "x"}, {"text": "y"}]),
        ("a.json", b'{"text": "x"}\n{"text": "y"}\n', [{"text": "x"}, {"text": "y"}]),
        ("a.json", b'[{"text": "x"}, {"text": "y"}]', [{"text": "x"}, {"text": "y"}]),
        ("a.txt", b"x\ny\n", [{"text": "x"}, {"text": "y"}]),
        ("a.csv", b"text\nx\ny\n", [{"text": "x"}, {"text": "y"}]),
        ("a.tokens", b" \n = T = \n \n x \n", [{"text": " = T = \n \n x \n"}]),
    ],
)
def test_a_byte_order_mark_is_no_text(name: str, content: bytes, records: list, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BOM + content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(BOM + content))
    assert read(tmp_path / name) == records
    assert read(tmp_path / f"{name}.gz") == records


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\u0085d", "e\u2029f\u000bg\u000ch\u001ci"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts), "utf-8")
    (tmp_path / "a.txt").write_text("\n".join(texts), "utf-8")
    assert [r["text"] for r in read(tmp_path / "a.jsonl")] == texts
    assert [r["text"] for r in read(tmp_path / "a.txt")] == texts


NUMBERS = {"wei": 123456789012345678901234567890, "neg": -(2**63) - 1, "u64": 2**64 - 1, "f": 1.5, "s": "1" * 30}


def test_integers_of_any_size_are_exact_in_every_reader(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "x", "n": NUMBERS}], "top": 10**25}
    for name, text in (
        ("a.jsonl", json.dumps(record)),
        ("b.json", json.dumps(record)),
        ("c.json", json.dumps([record])),
        ("d.json", json.dumps([record], indent=1)),
    ):
        (tmp_path / name).write_text(text)
        (found,) = read(tmp_path / name)
        assert found == record
        assert json.dumps(found) == json.dumps(record), "an equal float is no integer"


def test_nulls_that_structs_add_are_dropped(tmp_path: Path) -> None:
    """Arrow merges the keys of all rows; each row must come back as it was written."""
    rows = [
        {"tools": [{"f": {"properties": {"city": {"type": "string"}}, "required": ["city"]}}], "args": {"city": "P"}},
        {"tools": [{"f": {"properties": {"n": {"type": "int", "enum": [1, None]}}}}], "args": {"n": 3}},
        {"tools": [], "args": {}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "a.arrow") == rows


def test_json_columns_are_read_as_json(tmp_path: Path) -> None:
    values = [{"city": "P", "big": 10**30, "none": None}, [1, {"a": None}]]
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(v) for v in values]))
    nested = pa.StructArray.from_arrays([pa.array(["f", "g"]), column], ["name", "arguments"])
    pq.write_table(
        pa.table({"call": nested, "plain": column, "s": pa.array(['{"a": 1}', "x"])}), tmp_path / "a.parquet"
    )
    found = read(tmp_path / "a.parquet")
    assert [r["call"] for r in found] == [{"name": n, "arguments": v} for n, v in zip("fg", values, strict=True)]
    assert [r["plain"] for r in found] == values
    assert [r["s"] for r in found] == ['{"a": 1}', "x"], "text stays text"


def test_struct_and_json_columns_render_as_their_lines(run: Callable, documents: Callable, tmp_path: Path) -> None:
    """datasets' own Parquet of tool conversations against the same records in .jsonl."""
    datasets = pytest.importorskip("datasets")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    records = []
    for key in ("city", "n"):
        tool["function"]["parameters"]["properties"] = {key: {"type": "string"}}  # type: ignore[index]
        call = {"type": "function", "function": {"name": "f", "arguments": {key: "x"}}}
        messages = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "R"},
            {"role": "assistant", "content": "a"},
        ]
        records.append(json.loads(json.dumps({"messages": messages, "tools": [tool]})))
    write_lines(tmp_path / "a.jsonl", records)
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "b.parquet"))
    outputs = []
    for name in ("a.jsonl", "b.parquet"):
        flags = (
            "--handler-name",
            "OpenAIInstructionHandler",
            "--prompt-type",
            "qwen3",
            "--output-prefix",
            tmp_path / name,
        )
        run("--input", tmp_path / name, *flags)
        outputs.append(documents(f"{tmp_path / name}_packed_input_ids_document"))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.json",
            '[{"text": "x"}]\n[{"text": "lost"}]\n',
            r"a\.json:2: the array ends before this line's '\[', after 1",
        ),
        ("a.json", '[{"text": "x"}]\n\n{"text": "lost"}', r"a\.json:3: the array ends"),
        ("a.json", '[{"text": "x"}] x', r"a\.json:1: the array ends"),
        ("a.jsonl", '[{"text": "x"},\n{"text": "y"}]', r"rename it to \.json"),
        ("a.jsonl", '{\n "text": "x"\n}\n', r"jq -c '\.' a\.jsonl > a\.lines\.jsonl"),
        ("a.jsonl", '{"text": "x",\n "messages": [{"role": "user"}]}\n', r"jq -c '\.' "),
        (
            "a b.json",
            '{\n "version": 1,\n "data": [\n  {"text": "x"}\n ]\n}',
            r"""jq -c '\.\["data"\]\[\]' 'a b\.json'""",
        ),
        ("a.json", '{"version": 1, "data": [{"text": "x"}]}', r"""no column 'text'.*records are inside 'data': jq"""),
    ],
)
def test_json_of_another_shape_is_told_with_the_remedy(
    name: str, content: str, words: str, tmp_path: Path, run: Callable
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=words) as error:
        run("--input", tmp_path / name, *PRETRAIN, "--output-prefix", tmp_path / "o")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("o*"))


def test_hidden_files_of_a_folder_are_not_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "part.jsonl", [{"text": "x"}])
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "._part.jsonl").write_bytes(b"\0\5\26\7")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert read(tmp_path) == [{"text": "x"}]
