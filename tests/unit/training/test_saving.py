"""Which checkpoints a training resumes from, and what it says of folders at the start; no process group is needed."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

import tiny
from qwen3_npu import log
from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint import folders
from qwen3_npu.checkpoint.folders import candidates, iterations
from qwen3_npu.checkpoint.training import retention
from qwen3_npu.distributed import environment
from qwen3_npu.distributed.layout import single_layout
from qwen3_npu.errors import Stopped, UsageError
from qwen3_npu.files import Seal

TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint(root: Path, iteration: int, *, sealed: bool = True) -> Path:
    """A folder that looks like a training's checkpoint."""
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(os.urandom(1000))
    if sealed:
        weights = (folder / "weights").read_bytes()
        seal = Seal(len(weights), xxhash.xxh3_128(weights).hexdigest())
        folders.write_part(folder, 0, {"weights": seal})
        folders.write_integrity(folder, folders.TRAINING, folders.read_parts(folder, [0])[0])
        folders.drop_parts(folder, [0])
    return folder


def track(root: Path, text: str) -> None:
    (root / TRACKER).write_text(text)


def prepared(
    args: CheckpointArgs,
    monkeypatch: pytest.MonkeyPatch,
    restarts: int = 0,
    lora: LoraArgs | None = None,
    job: str = "this job",
) -> tuple[CheckpointArgs, LoraArgs, str]:
    """What the so-many-th start of a job loads by, and what it says."""
    from qwen3_npu.training.checkpoints.saving import check_folders, continued

    lora = lora or LoraArgs()

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    monkeypatch.setattr(environment, "job_names", lambda: [job])
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.setup()
    log.LOGGER.addHandler(handler)
    try:
        check_folders(args, lora)
        return *continued(args, lora), "\n".join(said)
    finally:
        log.LOGGER.removeHandler(handler)


def test_a_manifest_tells_damage(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    assert folders.damage(folder) == []
    assert not list(folder.glob("integrity.0*")), "parts are put together"
    data = bytearray((folder / "weights").read_bytes())
    data[500] ^= 1
    (folder / "weights").write_bytes(data)
    assert folders.damage(folder) == [f"{folder / 'weights'} is damaged: its xxh3_128 digest is another"]
    (folder / "weights").write_bytes(data[:-1])
    assert folders.damage(folder) == [f"{folder / 'weights'} has 999 bytes, not 1000"]
    (folder / "weights").unlink()
    assert folders.damage(folder) == [f"{folder / 'weights'} is missing"]
    assert folders.damage(folder, rank=1, ranks=2) == [], "another rank looks at it"
    (folder / "integrity.json").write_text('{"files": ')
    (line,) = folders.damage(folder)
    assert line.startswith(f"{folder / 'integrity.json'} cannot be read")


def test_candidates(tmp_path: Path) -> None:
    def those() -> list[str]:
        return [found.folder.name for found in candidates(tmp_path)]

    assert those() == []
    for iteration in (10, 20, 30):
        checkpoint(tmp_path, iteration)
    checkpoint(tmp_path, 5, sealed=False)
    (tmp_path / "iter_0000040.partial").mkdir()
    newest_first = ["iter_0000030", "iter_0000020", "iter_0000010"]
    assert those() == newest_first, "killed before the first tracker"
    track(tmp_path, "20")
    assert those() == ["iter_0000020", "iter_0000010"], "nobody can say whether 5 is whole"
    for gone in ("25", "release"):
        track(tmp_path, gone)
        named = gone if gone == "release" else "iter_0000025"
        assert those() == [named, *newest_first], "it names what is not there"
    (tmp_path / "release").mkdir()
    assert those() == ["release"]
    for damaged in ("", "-1", "iter_0000020", "\0\0\0"):
        track(tmp_path, damaged)
        assert those() == newest_first, "a damaged tracker beside sealed checkpoints"


def test_only_what_a_training_saved_is_deleted(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 50):
        checkpoint(tmp_path, iteration)
    checkpoint(tmp_path, 1, sealed=False)
    assert retention.keep_newest(tmp_path, 30, 2) == [10]
    assert iterations(tmp_path) == [50, 30, 20, 1]
    assert retention.keep_newest(tmp_path, 30, 1) == [20]
    assert iterations(tmp_path) == [50, 30, 1]


def test_other_checkpoints_in_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: object) -> None:
    save = tmp_path / "save"
    args = CheckpointArgs(load=str(tmp_path / "model"), save=str(save))
    assert prepared(args, monkeypatch) == (args, LoraArgs(), ""), "an empty folder needs no word"
    checkpoint(save, 7)
    same, _, said = prepared(args, monkeypatch)
    assert same == args
    assert f"--save {save} already holds checkpoints up to iter_0000007, and --load is {tmp_path / 'model'}" in said
    monkeypatch.chdir(tmp_path)
    for load in (str(save), "save/"):
        resumes = CheckpointArgs(load=load, save=str(save))
        assert prepared(resumes, monkeypatch) == (resumes, LoraArgs(), "")


def test_a_restart_goes_on_from_what_this_job_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: object
) -> None:
    save = tmp_path / "save"
    checkpoint(save, 7)
    track(save, "7")
    args = CheckpointArgs(load=str(tmp_path / "model"), save=str(save), finetune=True, ckpt_step=3, save_rng=False)
    prepared(args, monkeypatch)
    again, _, said = prepared(args, monkeypatch, restarts=1)
    assert again == args, "what another job saved is not taken for this one's"
    assert said == ""
    track(save, "7")  # saved by this job: the same step, another time
    os.utime(save / TRACKER, ns=(1, 1))
    again, _, said = prepared(args, monkeypatch, restarts=2)
    assert (again.load, again.finetune, again.ckpt_step) == (str(save), False, None)
    assert (again.load_optim, again.load_rng) == (True, False), "what is saved is what can be loaded"
    assert f"resuming from {save} instead of --load {tmp_path / 'model'}" in said


def test_killed_before_it_was_noted_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: object
) -> None:
    """Only in its second start does the job get so far; what lies there is another's all the same."""
    save = tmp_path / "save"
    args = CheckpointArgs(load=str(tmp_path / "model"), save=str(save))
    for noted in ("by nobody", "by the job before"):
        if noted == "by the job before":
            prepared(args, monkeypatch, job="the job before")
        checkpoint(save, 7 if noted == "by nobody" else 8)
        track(save, "7")
        os.utime(save / TRACKER, ns=(1, 1))
        for restarts in (1, 2):
            assert prepared(args, monkeypatch, restarts, job=noted) == (args, LoraArgs(), ""), noted
        track(save, "9")
        assert prepared(args, monkeypatch, 3, job=noted)[0].load == str(save)


def test_a_restart_of_a_training_that_saves_updates_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: object
) -> None:
    args = CheckpointArgs(load=str(tmp_path / "model"), save=str(tmp_path / "save"))
    lora = LoraArgs(lora_r=4, lora_load=str(tmp_path / "first"), lora_ckpt_filter=True)
    assert prepared(args, monkeypatch, lora=lora)[:2] == (args, lora)
    track(tmp_path / "save", "7")
    again, updates, _ = prepared(args, monkeypatch, 1, lora)
    assert (again.load, updates.lora_load) == (args.load, args.save), "the base is still where it was"


def test_a_restart_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: object
) -> None:
    args = CheckpointArgs(load=str(tmp_path / "model"), save=str(tmp_path / "save"))
    prepared(args, monkeypatch)
    assert prepared(args, monkeypatch, restarts=1) == (args, LoraArgs(), "")


def test_a_job_has_names_of_its_own() -> None:
    """Those of this process's parent; another process has others."""
    names = environment.job_names()
    assert names == environment.job_names()
    code = "from qwen3_npu.distributed import environment; print(*environment.job_names(), sep=chr(10))"
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "evening"}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert child.stdout.splitlines()[1:] == ["evening"]
    assert not set(child.stdout.splitlines()) & set(names)


def test_a_line_that_was_cut_is_dropped(tmp_path: Path) -> None:
    from qwen3_npu.training.reports.records import _open_lines

    path = tmp_path / "metrics.jsonl"
    for before, after in ((None, ""), ("", ""), ("one\n", "one\n"), ("one\ntw", "one\n"), ("on", "")):
        if before is not None:
            path.write_text(before)
        file = _open_lines(path)
        os.write(file, b"new\n")
        os.close(file)
        assert path.read_text() == after + "new\n"


def test_flags_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: object) -> None:
    *_, said = prepared(CheckpointArgs(async_save=True), monkeypatch)
    assert "there is no --save" in said
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--save .*file/save cannot be written: Not a directory"):
        prepared(CheckpointArgs(save=str(tmp_path / "file" / "save")), monkeypatch)


def test_rank_0_waits_for_all_parts_in_the_background(tmp_path: Path) -> None:
    from qwen3_npu.checkpoint.training.writing import Writing

    published = threading.Event()
    mine = lambda writing: folders.write_part(tmp_path, 0, {})  # noqa: E731
    writing = Writing("a checkpoint", [mine], published.set, tmp_path, writers=[0, 1], background=True)
    writing.done[0].wait(10)
    assert not published.wait(0.2), "rank 1 has not written yet"
    folders.write_part(tmp_path, 1, {})
    assert published.wait(10)
    assert writing.thread is not None
    writing.thread.join(10)
    assert writing.error is None


def test_nan_weights_are_not_saved(process: object) -> None:
    import torch

    from qwen3_npu.checkpoint.training.live import check_finite

    model = torch.nn.Linear(3, 3).bfloat16()
    model.register_parameter("nothing", torch.nn.Parameter(torch.empty(0)))
    check_finite(model.named_parameters(), "iteration 7 is not saved")
    for value in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            model.bias[1] = value
        with pytest.raises(Stopped, match="iteration 7 is not saved: bias holds NaN or infinite values"):
            check_finite(model.named_parameters(), "iteration 7 is not saved")


def test_a_poisoned_moment_is_not_saved(tmp_path: Path, process: object) -> None:
    """The weights are still finite; the next step's are not."""
    import torch

    from qwen3_npu.checkpoint.training.save import Position, begin_save

    model = torch.nn.Linear(3, 3)
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    adam.step()
    adam.state[model.bias]["exp_avg_sq"][0] = float("inf")
    trained: Any = SimpleNamespace(chunks=[model], optimizer=SimpleNamespace(optimizer=adam))
    with pytest.raises(
        Stopped, match="iteration 3 is not saved: a tensor exp_avg_sq of the optimizer holds NaN or inf"
    ):
        begin_save(trained, Position(3, 3), CheckpointArgs(save=str(tmp_path)), {}, config=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("key", "words"), [("param", "float32 weight"), ("exp_avg_sq", "second moment")])
def test_a_poisoned_moment_is_not_loaded(key: str, words: str, process: object, monkeypatch: Any) -> None:
    """The weights are finite, and the digests are right: another program has written it so."""
    import numpy as np
    import torch
    from megatron.core.optimizer.optimizer import FP32Optimizer
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    from qwen3_npu.checkpoint.mapping.source import Contents
    from qwen3_npu.checkpoint.training import load

    arch = tiny.arch()
    name, contents, layout = "decoder.final_layernorm.weight", Contents(arch), single_layout(arch)
    model = torch.nn.Module()
    model.decoder = torch.nn.Module()
    model.decoder.final_layernorm = torch.nn.RMSNorm(arch.hidden_size)
    adam = torch.optim.AdamW(model.parameters())
    model.decoder.final_layernorm(torch.ones(arch.hidden_size)).sum().backward()
    adam.step()
    optimizer = FP32Optimizer(adam, OptimizerConfig(), lambda: None)

    def values(asked: str) -> np.ndarray:
        found = np.ones(arch.hidden_size, np.float32)
        found[3] = np.nan if asked == key else 1
        return found

    monkeypatch.setattr(load, "model_rank", lambda: next(layout.ranks()))
    monkeypatch.setattr(load, "read_shard", lambda source, shard, dtype: values(source.key))
    trained: Any = SimpleNamespace(chunks=[model], optimizer=optimizer, optimized=contents, layout=layout)
    opened = lambda asked, *_: SimpleNamespace(key=asked, close=lambda: None)  # noqa: E731
    state: Any = SimpleNamespace(folder="/x/iter_7", has_optimizer=True, step=3, optimizer=opened)
    with pytest.raises(UsageError, match=f"/x/iter_7 holds .* not finite .*: the {words} of {name}; .*no-load-optim"):
        load._load_optimizer(trained, state, frozenset(), allow_nonfinite=False)
    load._load_optimizer(trained, state, frozenset(), allow_nonfinite=True)


def test_optimizer_state_of_mindspeed_is_not_taken_over(tmp_path: Path, process: object) -> None:
    """Its distributed optimizer saves distrib_optim.pt beside the weights."""
    from qwen3_npu.checkpoint.formats.torch_read import MegatronReader
    from qwen3_npu.checkpoint.training import load

    source: Any = object.__new__(MegatronReader)
    source.folder, source.layout = tmp_path, single_layout(tiny.arch())
    content = {"opt_param_scheduler": {"num_steps": 8}, "iteration": 1}
    source.opened = {next(source.layout.ranks()): SimpleNamespace(content=content)}
    (tmp_path / "mp_rank_00").mkdir()
    (tmp_path / "mp_rank_00" / "distrib_optim.pt").touch()
    trained: Any = SimpleNamespace()
    with pytest.raises(UsageError, match=r"\(distrib_optim.pt\): only weights can be loaded; give --finetune"):
        load._resume(trained, CheckpointArgs(load=str(tmp_path)), source, {})


def test_an_export_that_fails_is_a_warning_and_counted(
    tmp_path: Path, process: object, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its process ends with an error: there is no checkpoint to convert."""
    from qwen3_npu.training.checkpoints.hf_export import HfExport

    args = CheckpointArgs(save=str(tmp_path), save_hf_interval=1)
    export = HfExport(args, LoraArgs(), rank=0)
    log.setup()
    for failures in (1, 2):
        export.start(failures)
        export.finish()
        assert export.failures == failures
    told, counted = capfd.readouterr()
    assert counted == "", "no traceback"
    assert [line.split(" ")[:5] for line in told.splitlines() if "warning" in line] == [
        ["warning:", str(tmp_path / f"mg2hf_iteration{n}"), "could", "not", "be"] for n in (1, 2)
    ]
    assert f"{tmp_path / 'iter_0000002'} does not exist" in told


def test_what_cannot_be_deleted_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in use on a network disk: the checkpoint that was just saved stands."""
    for iteration in (1, 2, 3):
        checkpoint(tmp_path, iteration)
    log.setup()
    with monkeypatch.context() as patch:

        def busy(folder: Path, **_: object) -> None:
            if folder.exists():
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))

        patch.setattr(shutil, "rmtree", busy)
        retention.tidy(tmp_path, 3, 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot be deleted (Device or resource busy)" in line
    assert iterations(tmp_path)[0] == 3
    retention.tidy(tmp_path, 3, 1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["iter_0000003"]


def test_a_model_folder_that_is_gone_does_not_cost_a_checkpoint(
    tmp_path: Path, process: object, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen3_npu.checkpoint.training.save import _carried

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    log.setup()
    assert _carried(tmp_path / "model", tmp_path / "save") is None
    assert "its tokenizer files do not go with the checkpoint" in capsys.readouterr().out
    assert _carried(tmp_path / "gone", tmp_path / "save") is None
