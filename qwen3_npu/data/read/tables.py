"""Tables of columns: Parquet and Arrow files, and datasets of the Hugging Face library."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen3_npu.data.read.blocks import BLOCK_BYTES, RecordBlock
from qwen3_npu.data.read.find import InputFile
from qwen3_npu.errors import UsageError

_MOST_ROWS = 1024
# Turns what Arrow makes of a value into what was written; None where both are the same.
RowDecoder = Callable[[Any], object] | None


def read_parquet(file: InputFile, columns: Sequence[str]) -> Iterator[RecordBlock]:
    """Rows of a Parquet file; only `columns` are read from disk."""
    import pyarrow.parquet as pq

    with file.path.open("rb") as raw:
        # A buffer makes it read pages as they are needed, not a column's whole row group.
        table = pq.ParquetFile(raw, buffer_size=BLOCK_BYTES, pre_buffer=False)
        wanted = _wanted(table.schema_arrow.names, columns)
        meta = table.metadata
        size = sum(meta.row_group(g).total_byte_size for g in range(meta.num_row_groups))
        rows = _rows_per_block(size, meta.num_rows)
        number, decode = 1, _row_decoder(table.schema_arrow)
        for batch in table.iter_batches(rows, columns=wanted):
            size_of_row = file.size / max(meta.num_rows, 1)
            yield from _batch_blocks(str(file.path), batch, number, size_of_row, rows=rows, decode=decode)
            number += batch.num_rows


def read_arrow(file: InputFile, columns: Sequence[str]) -> Iterator[RecordBlock]:
    """Rows of an Arrow IPC file, in the stream format (as `datasets` writes) or the file format."""
    import pyarrow as pa

    with pa.OSFile(str(file.path)) as raw:
        if raw.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(raw)
            batches: Any = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            raw.seek(0)
            batches = reader = pa.ipc.open_stream(raw)
        wanted = _wanted(reader.schema.names, columns)
        number, before, decode = 1, 0, _row_decoder(reader.schema)
        for batch in batches:
            now = min(raw.tell(), file.size)
            chosen = batch.select(wanted)
            rows = _rows_per_block(chosen.nbytes, batch.num_rows)
            size_of_row = (now - before) / max(batch.num_rows, 1)
            yield from _batch_blocks(str(file.path), chosen, number, size_of_row, rows=rows, decode=decode)
            number, before = number + batch.num_rows, now


def _wanted(present: Sequence[str], columns: Sequence[str]) -> list[str]:
    # A missing column is no error here: the handler names it and says what it is for.
    return [name for name in present if name in columns] or list(present)


def _rows_per_block(size: int, rows: int) -> int:
    return max(1, min(_MOST_ROWS, BLOCK_BYTES * rows // max(size, 1)))


def _batch_blocks(
    file: str,
    batch: Any,
    number: int,
    bytes_per_row: float,
    *,
    rows: int,
    decode: Callable[[object], dict[str, object]],
) -> Iterator[RecordBlock]:
    for start in range(0, batch.num_rows, rows):
        part = batch.slice(start, rows)
        numbers = range(number + start, number + start + part.num_rows)
        yield RecordBlock(file, numbers, _rows(part), decode, size=round(part.num_rows * bytes_per_row))


def _rows(batch: Any) -> Sequence[object]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        # Some value is not UTF-8: go row by row to find which.
        return [_row(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _row(batch: Any) -> dict[str, object] | str:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return "not UTF-8"


def _row_decoder(schema: Any) -> Callable[[object], dict[str, object]]:
    """From a row of a table with this schema to a record."""
    found = {field.name: decode for field in schema if (decode := _decoder(field))}
    return functools.partial(_record, found)


def _record(decoders: Mapping[str, Callable[[object], object]], row: Any) -> dict[str, object]:
    if isinstance(row, str):
        raise ValueError(row)
    for name, decode in decoders.items():
        if row.get(name) is not None:
            row[name] = decode(row[name])
    return row


def _decoder(field: Any) -> RowDecoder:
    """JSON columns (`arrow.json`, which `datasets` 5 writes) hold text. Structs hold the keys of all rows, or null.

    These nulls are dropped. Nulls that the author wrote are dropped with them: a struct cannot tell them apart.
    """
    import pyarrow as pa

    kind = field.type
    name = getattr(kind, "extension_name", None) or (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    if name == "arrow.json":
        return _json
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        return functools.partial(_struct, {inner.name: _decoder(inner) for inner in kind})
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _decoder(kind.value_field)
        return functools.partial(_list, inner) if inner else None
    return None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a JSON column holds no JSON: {error}") from None


def _struct(decoders: Mapping[str, RowDecoder], value: Mapping[str, object]) -> dict[str, object]:
    kept = {name: inner for name, inner in value.items() if inner is not None}
    return {name: decode(inner) if (decode := decoders[name]) else inner for name, inner in kept.items()}


def _list(decode: Callable[[object], object], value: Sequence[object]) -> list[object]:
    return [inner if inner is None else decode(inner) for inner in value]


def _dataset_record(row: Mapping[str, object]) -> dict[str, object]:
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: object) -> object:
    """A value without the nulls of structs (see `_decoder`)."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read_dataset(name: str, arguments: dict[str, object]) -> Iterator[RecordBlock]:
    """Rows of a Hugging Face dataset, streamed.

    Args:
        arguments: of datasets.load_dataset, beside the name.

    Raises:
        UsageError: the library is missing, or it cannot open the dataset.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"--input {name}: no such file or folder; to load it as a Hugging Face dataset, pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(name, **{"split": "train", "streaming": True, **arguments})
        for start, batch in enumerate(rows.iter(_MOST_ROWS)):
            names = list(batch)
            items = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            number = start * _MOST_ROWS + 1
            yield RecordBlock(name, range(number, number + len(items)), items, _dataset_record, size=0)
    except UsageError:
        raise
    except Exception as error:
        # The library raises many kinds for names that do not exist and machines without network.
        raise UsageError(
            f"--input {name}: no such file or folder, and `datasets` cannot load it: {str(error).splitlines()[0]}"
        ) from None
