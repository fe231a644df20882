"""Files are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3_npu import files

PACKAGE = Path(files.__file__).parent


def test_a_file_that_could_not_be_written_leaves_the_old_one_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with files.replacing(path) as file:
            file.write("half of the new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_only_one_file_of_the_package_renames_and_syncs() -> None:
    calls = ("os.replace(", "os.rename(", "os.fsync(")
    others = [p for p in PACKAGE.rglob("*.py") if p.name != "files.py" and any(c in p.read_text() for c in calls)]
    assert not others
