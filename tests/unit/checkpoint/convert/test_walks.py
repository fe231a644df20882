"""How many files of the package a conversion passes through: who follows it in the code opens each of them."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

import samples

from qwen3_npu import checkpoint

ROOT = str(Path(checkpoint.__file__).parent) + "/"


def test_a_conversion_passes_through_few_files(models: dict[str, Path], tmp_path: Path) -> None:
    """Counted are files of `checkpoint` with a function that runs, also in the thread that reads ahead."""
    passed = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(ROOT) and frame.f_code.co_name != "<module>":
            passed.add(name.removeprefix(ROOT))

    samples.to_mg(models["untied"], tmp_path / "first")  # what happens once, at import
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        samples.to_mg(models["untied"], tmp_path / "mg", "--target-tensor-parallel-size", 2)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert "formats/torch_write.py" in passed
    assert len(passed) <= 13, sorted(passed)
