"""Which checkpoints a training takes up, and what it says of folders before it begins; no process group is needed."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from qwen3_npu import log
from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint import integrity, keep
from qwen3_npu.errors import UsageError

TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint(root: Path, iteration: int, *, sealed: bool = True) -> Path:
    """A folder that looks like a training's checkpoint."""
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(os.urandom(1000))
    if sealed:
        integrity.write_part(folder, 0, ["weights"], None)
        integrity.write_manifest(folder, integrity.read_parts(folder, [0]), [], [0])
    return folder


def track(root: Path, text: str) -> None:
    (root / TRACKER).write_text(text)


def prepared(args: CheckpointArgs, monkeypatch: pytest.MonkeyPatch, restarts: int = 0) -> tuple[CheckpointArgs, str]:
    """What `prepare` gives and says, as in the so-many-th start of a job."""
    from qwen3_npu.training.saving import prepare

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.setup()
    log.LOGGER.addHandler(handler)
    try:
        return prepare(args, LoraArgs())[0], "\n".join(said)
    finally:
        log.LOGGER.removeHandler(handler)


def test_a_manifest_tells_damage(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    assert integrity.damage(folder) == []
    assert not list(folder.glob("integrity.0*")), "parts are put together"
    data = bytearray((folder / "weights").read_bytes())
    data[500] ^= 1
    (folder / "weights").write_bytes(data)
    assert integrity.damage(folder) == [f"{folder / 'weights'} is damaged: its SHA-256 is another"]
    (folder / "weights").write_bytes(data[:-1])
    assert integrity.damage(folder) == [f"{folder / 'weights'} has 999 bytes, not 1000"]
    (folder / "weights").unlink()
    assert integrity.damage(folder) == [f"{folder / 'weights'} is missing"]
    assert integrity.damage(folder, rank=1, ranks=2) == [], "another rank looks at it"
    (folder / "integrity.json").write_text('{"files": ')
    assert integrity.damage(folder) == [f"{folder / 'integrity.json'} cannot be read"]


def test_candidates(tmp_path: Path) -> None:
    assert keep.candidates(tmp_path) == []
    for iteration in (10, 20, 30):
        checkpoint(tmp_path, iteration)
    checkpoint(tmp_path, 5, sealed=False)
    (tmp_path / "iter_0000040.partial").mkdir()
    assert keep.candidates(tmp_path) == [30, 20, 10], "killed before the first tracker"
    track(tmp_path, "20")
    assert keep.candidates(tmp_path) == [20, 10, 5]
    track(tmp_path, "release")
    assert keep.candidates(tmp_path) == []


def test_only_what_a_training_saved_is_deleted(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 50):
        checkpoint(tmp_path, iteration)
    checkpoint(tmp_path, 1, sealed=False)
    assert keep.keep_newest(tmp_path, 30, 2) == [10]
    assert keep.iterations(tmp_path) == [50, 30, 20, 1]
    assert keep.keep_newest(tmp_path, 30, 1) == [20]
    assert keep.iterations(tmp_path) == [50, 30, 1]


def test_other_checkpoints_in_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tmp_path / "save"
    args = CheckpointArgs(load=str(tmp_path / "model"), save=str(save))
    assert prepared(args, monkeypatch) == (args, ""), "an empty folder needs no word"
    checkpoint(save, 7)
    same, said = prepared(args, monkeypatch)
    assert same == args
    assert f"--save {save} already holds checkpoints up to iter_0000007, and --load is {tmp_path / 'model'}" in said
    resumes = CheckpointArgs(load=str(save), save=str(save))
    assert prepared(resumes, monkeypatch) == (resumes, "")


def test_a_restart_goes_on_from_what_this_job_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tmp_path / "save"
    checkpoint(save, 7)
    track(save, "7")
    args = CheckpointArgs(load=str(tmp_path / "model"), save=str(save), finetune=True, ckpt_step=3, save_rng=False)
    prepared(args, monkeypatch)
    again, said = prepared(args, monkeypatch, restarts=1)
    assert again == args, "what another job saved is not taken for this one's"
    assert said == ""
    track(save, "7")  # saved by this job: the same step, another time
    os.utime(save / TRACKER, ns=(1, 1))
    again, said = prepared(args, monkeypatch, restarts=2)
    assert (again.load, again.finetune, again.ckpt_step) == (str(save), False, None)
    assert (again.load_optim, again.load_rng) == (True, False), "what is saved is what can be loaded"
    assert f"going on from {save} instead of --load {tmp_path / 'model'}" in said


def test_a_restart_of_a_training_that_saves_updates_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_npu.training.saving import prepare

    args = CheckpointArgs(load=str(tmp_path / "model"), save=str(tmp_path / "save"))
    lora = LoraArgs(lora_r=4, lora_load=str(tmp_path / "first"), lora_ckpt_filter=True)
    assert prepare(args, lora) == (args, lora)
    track(tmp_path / "save", "7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again, updates = prepare(args, lora)
    assert (again.load, updates.lora_load) == (args.load, args.save), "the base is still where it was"


def test_a_restart_before_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = CheckpointArgs(load=str(tmp_path / "model"), save=str(tmp_path / "save"))
    prepared(args, monkeypatch)
    assert prepared(args, monkeypatch, restarts=1) == (args, "")


def test_flags_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, said = prepared(CheckpointArgs(async_save=True), monkeypatch)
    assert "there is no --save" in said
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--save .*file/save cannot be written: Not a directory"):
        prepared(CheckpointArgs(save=str(tmp_path / "file" / "save")), monkeypatch)


def test_rank_0_waits_for_all_parts_in_the_background(tmp_path: Path) -> None:
    from qwen3_npu.checkpoint.writing import Writing

    published = threading.Event()
    mine = lambda: integrity.write_part(tmp_path, 0, [], None)  # noqa: E731
    writing = Writing("a checkpoint", mine, published.set, tmp_path, [0, 1], background=True)
    writing.written.wait(10)
    assert not published.wait(0.2), "rank 1 has not written yet"
    integrity.write_part(tmp_path, 1, [], None)
    assert published.wait(10)
    assert writing.thread is not None
    writing.thread.join(10)
    assert writing.error is None
