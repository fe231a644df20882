"""All files of `--input` as one stream of blocks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwen3_npu import schema
from qwen3_npu.data.read import find
from qwen3_npu.data.read.blocks import RecordBlock
from qwen3_npu.data.read.find import InputFile
from qwen3_npu.data.read.json_array import read_json_records
from qwen3_npu.data.read.lines import read_csv, read_json_lines, read_text_lines, read_wikitext
from qwen3_npu.data.read.tables import read_arrow, read_dataset, read_parquet
from qwen3_npu.errors import UsageError

_READERS: dict[str, Callable[[InputFile, Sequence[str]], Iterator[RecordBlock]]] = {
    find.LINES: read_json_lines,
    find.JSON: read_json_records,
    find.PARQUET: read_parquet,
    find.ARROW: read_arrow,
    find.CSV: read_csv,
    find.TEXT: read_text_lines,
    find.WIKITEXT: read_wikitext,
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What will be read.

    Attributes:
        files: on disk.
        dataset: name of a Hugging Face dataset, where there are no files.
        dataset_arguments: for loading it.
    """

    files: tuple[InputFile, ...]
    dataset: str = ""
    dataset_arguments: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes on disk; 0 if unknown."""
        return sum(file.size for file in self.files)

    def identity(self) -> list[object]:
        """Path, size and time of each file; changes when a file does."""
        stats = [(str(f.path), f.size, f.path.stat().st_mtime_ns) for f in self.files]
        return [*stats, self.dataset, sorted(self.dataset_arguments.items())]

    def blocks(self, columns: Sequence[str]) -> Iterator[RecordBlock]:
        """All records, in order.

        Args:
            columns: the columns that the handler needs; of tables only these are read.

        Raises:
            UsageError: a file is damaged or not what its name says.
        """
        if self.dataset:
            yield from read_dataset(self.dataset, self.dataset_arguments)
        for file in self.files:
            try:
                yield from _READERS[file.format](file, columns)
            except (OSError, ValueError) as error:
                # pyarrow's errors are OSErrors or ValueErrors, too; any other ValueError is a fault of this program.
                if not isinstance(error, OSError) and not type(error).__module__.startswith("pyarrow"):
                    raise
                text = (str(error).splitlines() or [type(error).__name__])[0]
                raise UsageError(f"{file.path}: cannot be read as {file.format}: {text}") from None


def open_inputs(names: Sequence[str], parameters: str | None = None) -> Inputs:
    """Find the files (or the dataset) of `--input`.

    Args:
        parameters: a JSON file with arguments of datasets.load_dataset.

    Raises:
        UsageError: see `find_files`.
    """
    if parameters is not None:
        arguments = _parameters(parameters)
        path = schema.text(arguments.pop("path", names[0]), f"--hf-datasets-params {parameters}: path")
        return Inputs((), path, arguments)
    if len(names) == 1 and not find.exists(names[0]) and not Path(names[0]).suffix and "*" not in names[0]:
        return Inputs((), names[0])
    return Inputs(tuple(find.find_files(names)))


def _parameters(path: str) -> dict[str, object]:
    try:
        arguments = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--hf-datasets-params {path}: {error}") from None
    if not isinstance(arguments, dict):
        raise UsageError(f"--hf-datasets-params {path}: a JSON object of arguments is expected")
    return arguments
