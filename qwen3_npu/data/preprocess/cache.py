"""Raw files in `--data-path`: preprocessed once, into a folder named by their content, and reused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from qwen3_npu import log, schema
from qwen3_npu.args.preprocess import PreprocessArgs
from qwen3_npu.data.preprocess.run import identifying_flags, preprocess
from qwen3_npu.data.read.find import InputFile, exists, find_files
from qwen3_npu.data.read.open import open_inputs
from qwen3_npu.data.text.tokenizer import open_tokenizer
from qwen3_npu.data.train.data_path import DATA_SUFFIXES
from qwen3_npu.errors import UsageError
from qwen3_npu.files import rename, write_text

_DIGESTS = "digests.json"
_PIECE = 16 << 20


def prepare_data_path(data_path: Sequence[str], recipe: PreprocessArgs, cache: str | Path) -> list[str]:
    """`--data-path` with every raw file, folder or pattern replaced by the prefix of its token files.

    Weights and prefixes of .bin/.idx pairs stay as they are. Several processes may call this at once: a result becomes
    visible only when it is complete. To do the work once, let one process call it, then a barrier, then the others.

    Args:
        recipe: flags of preprocessing; its input and output_prefix are replaced.
        cache: folder of prepared data, made if needed.

    Returns:
        The same number of words. Text gets the full prefix (`.._text_document`), conversations and pairs the bare one.

    Raises:
        UsageError: as preprocess_data.py.
    """
    takes_names = recipe.records.handler_name is not None
    return [
        _prepared(word, recipe, Path(cache)) if is_raw(word, takes_names=takes_names) else word for word in data_path
    ]


def is_raw(word: str, *, takes_names: bool = False) -> bool:
    """Whether a word of --data-path is raw data; else it is a weight or a prefix.

    Args:
        takes_names: accept OWNER/NAME, a data set of the Hugging Face Hub, too (--handler-name must be given).
    """
    is_prefix = any(Path(f"{word}{end}.idx").exists() for end in DATA_SUFFIXES.values())
    return not is_prefix and (exists(word) or (takes_names and is_hub_name(word)))


def is_hub_name(word: str) -> bool:
    """Whether a word can be OWNER/NAME of a data set on the Hub. If the folder OWNER exists, it is a missing file."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", word) is not None and not Path(word).parent.exists()


def _prepared(word: str, recipe: PreprocessArgs, cache: Path) -> str:
    records, output = recipe.records, recipe.output
    tokenizer = open_tokenizer(recipe.tokenizer.tokenizer_name_or_path or "")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        content = _content(word, recipe, _Digests(cache))
        key = hashlib.sha256(json.dumps([content, tokenizer.identity, identifying_flags(recipe)]).encode()).hexdigest()
        folder = cache / key[:24]
        if folder.is_dir():
            log.info(f"{word}: prepared before, in {folder}")
        else:
            log.info(f"{word}: raw data, preprocessed into {folder}")
            building = cache / f"{folder.name}.{os.uname().nodename}.{os.getpid()}.tmp"
            arguments = recipe._replace(
                input=dataclasses.replace(recipe.input, input=[word]),
                output=dataclasses.replace(output, output_prefix=str(building / "data")),
            )
            _build(arguments, building, folder)
    except OSError as error:
        raise UsageError(f"--data-cache-path {cache}: {word} cannot be prepared there: {error}") from None
    is_text = not any((folder / f"data{end}.idx").exists() for end in DATA_SUFFIXES.values() if end)
    return str(folder / (f"data_{records.json_keys[0]}_document" if is_text else "data"))


def _content(word: str, recipe: PreprocessArgs, digests: _Digests) -> list[object]:
    """The identity of the raw data: digests of files, or name and arguments of a data set on the Hub."""
    if is_hub_name(word):
        return [open_inputs([word], recipe.records.hf_datasets_params).identity()]
    return [(file.format, file.compression, digests.of(file)) for file in find_files([word])]


def _build(arguments: PreprocessArgs, building: Path, folder: Path) -> None:
    try:
        preprocess(arguments)
        try:
            rename(building, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


class _Digests:
    """SHA-256 of files, cached as long as size and time of a file stay the same."""

    def __init__(self, cache: Path) -> None:
        self.file = cache / _DIGESTS
        self.known: dict[str, tuple[list[int], str]] = {}
        if self.file.is_file():
            for path, entry in schema.read_record(self.file).fields.items():
                where = f"{self.file}: {path}"
                seen, known = schema.pair(entry, where)
                self.known[path] = list(schema.counts(seen, where)), schema.text(known, where)

    def of(self, file: InputFile) -> str:
        """The digest of a file's content."""
        path, stat = str(file.path.resolve()), file.path.stat()
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if path not in self.known or self.known[path][0] != seen:
            digest = hashlib.sha256()
            with file.path.open("rb") as stream:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
            self.known[path] = seen, digest.hexdigest()
            write_text(self.file, json.dumps(self.known), concurrent=True)
        return self.known[path][1]
