"""Records in a file: numpy's .npz with one array a case and the names as JSON. Read strictly, without pickles."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from qwen3_npu import __version__, schema
from qwen3_npu.errors import UsageError
from qwen3_npu.files import replacing
from qwen3_npu.training.fingerprints.recorder import Noted
from qwen3_npu.training.fingerprints.sketch import NUMBERS

FORMAT = 1
_LARGEST = 64 << 20  # bytes, unpacked
_FACTS = ("format", "version", "torch", "device", "kernels", "layout", "cases")


@dataclasses.dataclass(frozen=True)
class Recording:
    """The content of a file.

    Attributes:
        device, kernels, layout, torch, version: of the run, as text.
        cases: name -> records.
    """

    torch: str
    device: str
    kernels: str
    layout: str
    cases: dict[str, Noted]
    version: str = __version__

    def __str__(self) -> str:
        return f"{self.device}, torch {self.torch}, qwen3_npu {self.version}, {self.layout}"


def write(path: Path, recording: Recording) -> None:
    """Raises: OSError: it cannot be written."""
    cases = {name: noted.names for name, noted in recording.cases.items()}
    facts = {"format": FORMAT, **vars(recording), "cases": cases}
    arrays = {f"case {i}": noted.rows for i, noted in enumerate(recording.cases.values())}
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, binary=True) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read(path: Path) -> Recording:
    """Raises: UsageError: it is no such file."""
    data = schema.read_small(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(item.file_size for item in archive.infolist()) > _LARGEST:
                raise UsageError(f"{path} has more than {_LARGEST} bytes when unpacked; it is no recording")
            arrays = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UsageError(f"{path} is no recording of --record or --fingerprint-interval: {error}") from None
    facts = schema.record(schema.parse_json(_array(path, arrays, "facts", np.uint8).tobytes(), str(path)), str(path))
    facts.only(_FACTS)
    if facts.integer("format") != FORMAT:
        raise UsageError(f"{path} has format {facts.integer('format')}, not {FORMAT}; record it anew")
    cases = {}
    for number, (name, names) in enumerate(facts.record("cases").fields.items()):
        known = [schema.text(item, f"{path}: a name in {name}") for item in schema.sequence(names, f"{path}: {name}")]
        rows = _array(path, arrays, f"case {number}", np.float32)
        if rows.shape != (len(known), NUMBERS + 2) or len(set(known)) != len(known):
            raise UsageError(f"{path}: {name} has {len(known)} names and numbers of shape {rows.shape}")
        cases[name] = Noted(known, rows)
    if arrays.keys() - {"facts", *(f"case {i}" for i in range(len(cases)))}:
        raise UsageError(f"{path} has arrays beside its cases; it is no recording")
    return Recording(
        cases=cases,
        version=facts.text("version"),
        torch=facts.text("torch"),
        device=facts.text("device"),
        kernels=facts.text("kernels"),
        layout=facts.text("layout"),
    )


def _array(path: Path, arrays: dict[str, bytes], name: str, dtype: type) -> np.ndarray:
    """Of numpy's format 1.0, in C order, as it was written."""
    wrong = UsageError(f"{path}: {name} is no array of {np.dtype(dtype)}; it is no recording")
    file = io.BytesIO(arrays.get(name, b""))
    try:
        version = np.lib.format.read_magic(file)
        shape, in_fortran, found = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else ((), True, None)
    except ValueError:
        raise wrong from None
    rest = file.read()
    if found != np.dtype(dtype) or in_fortran or len(rest) != int(np.prod(shape)) * np.dtype(dtype).itemsize:
        raise wrong
    return np.frombuffer(rest, dtype).reshape(shape)
