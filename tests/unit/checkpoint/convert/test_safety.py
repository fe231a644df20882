"""Nothing is lost and nothing looks finished that is not: kills, full disks, damaged sources, hostile files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import samples

from qwen3_npu.checkpoint.convert import jobs
from qwen3_npu.lease import folder_lease

ROOT = Path(__file__).resolve().parents[4]
LAYOUT = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)


# --- hostile files ---------------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.proof}",)


class EvilBuiltin(Evil):
    def __reduce__(self) -> tuple:
        return eval, (f"open({str(self.proof)!r}, 'w')",)


class EvilThroughTorch(Evil):
    """A name inside a module that is known, which pickle's own getattr would walk to os.system."""

    def __reduce__(self) -> tuple:
        import torch

        return torch.serialization.os.system, (f"touch {self.proof}",)


def put_pickle(path: Path, content: object) -> None:
    """Replace the pickle in a torch checkpoint."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, pickle.dumps(content, protocol=2) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("kind", [Evil, EvilBuiltin, EvilThroughTorch])
@pytest.mark.parametrize("file", ["iter_0000001/mp_rank_00/model_optim_rng.pt", "iter_0000001/common.pt"])
def test_a_hostile_checkpoint_is_refused(kind: type, file: str, models: dict[str, Path], tmp_path: Path) -> None:
    form = "torch" if "mp_rank" in file else "torch_dist"
    samples.to_mg(models["tied"], tmp_path / "mg", "--ckpt-format", form)
    proof = tmp_path / "proof"
    samples.unsealed(tmp_path / "mg")
    put_pickle(tmp_path / "mg" / file, {"model": kind(proof), "args": None})
    assert pickle.loads(pickle.dumps(Evil(proof))) == 0, "the payload works"
    proof.unlink()
    mg = ("--load-model-type", "mg", "--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "out")
    line = samples.refused(*mg, "--save-model-type", "hf")
    assert "the file is refused" in line
    assert not proof.exists()


def test_hostile_metadata_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["tied"], tmp_path / "mg", "--ckpt-format", "torch_dist")
    samples.unsealed(tmp_path / "mg")
    (tmp_path / "mg" / "iter_0000001" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "proof")))
    mg = ("--load-model-type", "mg", "--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "out")
    assert "the file is refused" in samples.refused(*mg, "--save-model-type", "hf")
    assert not (tmp_path / "proof").exists()


def test_metadata_cannot_name_files_elsewhere(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["tied"], tmp_path / "mg", "--ckpt-format", "torch_dist")
    path = samples.unsealed(tmp_path / "mg") / "iter_0000001" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../secret.pt"))
    mg = ("--load-model-type", "mg", "--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "out")
    assert "../secret.pt" in samples.refused(*mg, "--save-model-type", "hf")


# --- killed runs -----------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.argv = ["convert_ckpt.py", *{argv!r}]
sys.path.insert(0, {root!r})
from qwen3_npu import cli
from qwen3_npu.checkpoint.convert import jobs
from qwen3_npu.lease import folder_lease
import convert_ckpt
whole, written = jobs._Write.__call__, []
def write(self, job, source, count):
    if len(written) == {after}:
        (self.stage / job.name).parent.mkdir(parents=True, exist_ok=True)
        (self.stage / (job.name + ".tmp")).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(job)
    return whole(self, job, source, count)
jobs._Write.__call__ = write
cli.run("convert_ckpt.py", convert_ckpt.main)
"""


def killed(after: int, *argv: object) -> None:
    """Run the converter and kill it in the middle of writing a file."""
    words = [str(word) for word in (*argv, "--jobs", 1)]
    code = KILLED.format(argv=words, root=str(ROOT), after=after)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -9, process.stderr


def test_a_killed_run_leaves_nothing_and_resumes(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["untied"], tmp_path / "whole", *LAYOUT)
    out = tmp_path / "out"
    command = ("--load-dir", models["untied"], "--save-dir", out, *LAYOUT)
    killed(2, *command)
    assert not list(out.glob("iter_*[0-9]"))
    assert not (out / "latest_checkpointed_iteration.txt").exists()
    assert "not a Megatron checkpoint" in samples.refused(
        "--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", out, "--save-dir", tmp_path / "hf"
    )
    assert "--resume" in samples.refused(*command)
    stage = out / "iter_0000001.partial"
    finished = {path: path.stat().st_mtime_ns for path in stage.rglob("model_optim_rng.pt")}
    assert len(finished) == 2
    assert "begun with another source or other settings" in samples.refused(
        *command, "--resume", "--params-dtype", "fp32"
    )
    # A finished file that lost its end is made again; the other is kept as it is.
    damaged, kept = sorted(finished)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    samples.ok(*command, "--resume", "--verify")
    assert samples.digests(out) == samples.digests(tmp_path / "whole")
    now = out / "iter_0000001" / kept.relative_to(stage)
    assert now.stat().st_mtime_ns == finished[kept]


def test_a_killed_export_is_no_model(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["untied"], tmp_path / "mg", *LAYOUT)
    mg = (
        "--load-model-type",
        "mg",
        "--save-model-type",
        "hf",
        "--load-dir",
        tmp_path / "mg",
        "--max-shard-size",
        0.0001,
    )
    samples.ok(*mg, "--save-dir", tmp_path / "whole")
    killed(2, *mg, "--save-dir", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".conversion.partial", ".lease"}
    samples.ok(*mg, "--save-dir", tmp_path / "out", "--resume")
    assert samples.digests(tmp_path / "out") == samples.digests(tmp_path / "whole")


# --- disks -----------------------------------------------------------------------------------------------------------


def test_no_space_is_found_out_first(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(jobs.shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    line = samples.refused("--load-dir", models["untied"], "--save-dir", tmp_path / "out")
    assert "free some or choose another --save-dir" in line
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_disk_that_fills_up(models: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from qwen3_npu import cli\nimport convert_ckpt\n"
        "cli.run('convert_ckpt.py', convert_ckpt.main)"
    )
    command = ["--load-dir", str(models["untied"]), "--save-dir", str(tmp_path / "out"), "--jobs", "1"]
    process = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    assert "cannot be written: File too large; --resume continues from here" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out" / "iter_0000001").exists()
    samples.ok(*command, "--resume", "--verify")


def test_a_worker_that_dies(models: dict[str, Path], tmp_path: Path) -> None:
    code = (
        f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from qwen3_npu import cli\nfrom qwen3_npu.checkpoint.convert import jobs\nimport convert_ckpt\n"
        "def die(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "whole = jobs._Write.__reduce__\n"
        "jobs._Write.__reduce__ = lambda self: (exec, ('import os; os.kill(os.getpid(), 9)',))\n"
        "cli.run('convert_ckpt.py', convert_ckpt.main)"
    )
    command = ["--load-dir", str(models["untied"]), "--save-dir", str(tmp_path / "out"), "--jobs", "2"]
    command += [str(word) for word in LAYOUT]
    process = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    assert "a worker process was killed" in process.stderr
    assert "Traceback" not in process.stderr


# --- what is there already -------------------------------------------------------------------------------------------


def test_an_existing_output_is_replaced_only_if_asked(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "mg"
    samples.to_mg(models["untied"], out, *LAYOUT)
    before = samples.digests(out)
    command = ("--load-dir", models["tied"], "--save-dir", out)
    assert "already holds a checkpoint" in samples.refused(*command)
    assert samples.digests(out) == before
    samples.ok(*command, "--overwrite", "--verify")
    assert len(list((out / "iter_0000001").glob("mp_rank_*"))) == 1


def test_a_training_is_not_hidden_by_a_conversion(models: dict[str, Path], tmp_path: Path) -> None:
    """iter_0000001 beside the iterations of a training would move the tracker back."""
    (tmp_path / "iter_0000500").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("500")
    line = samples.refused("--load-dir", models["untied"], "--save-dir", tmp_path)
    assert "already holds a checkpoint (latest_checkpointed_iteration.txt says 500)" in line
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "500"


def test_a_failed_overwrite_keeps_the_old_output(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["untied"], tmp_path / "mg", *LAYOUT)
    samples.to_hf(tmp_path / "mg", tmp_path / "hf")
    before = samples.digests(tmp_path / "hf")
    path = tmp_path / "mg" / "iter_0000001" / "mp_rank_01_001" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-3000])
    mg = ("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", tmp_path / "mg")
    assert str(path) in samples.refused(*mg, "--save-dir", tmp_path / "hf", "--overwrite")
    assert samples.digests(tmp_path / "hf") == before


def test_a_source_is_never_its_own_output(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["untied"], tmp_path / "hf")
    samples.to_mg(tmp_path / "hf", tmp_path / "mg")
    before = samples.digests(tmp_path)
    mg = ("--load-model-type", "mg", "--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "mg", "--overwrite")
    assert "is also read from" in samples.refused(*mg, *LAYOUT)
    hf = ("--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "hf", "--save-model-type", "hf", "--overwrite")
    assert "is also read from" in samples.refused(*hf)
    assert samples.digests(tmp_path) == before


def test_leftovers_are_not_mistaken(models: dict[str, Path], tmp_path: Path) -> None:
    """--overwrite drops an unfinished conversion of other settings."""
    command = ("--load-dir", models["untied"], "--save-dir", tmp_path / "out")
    killed(1, *command, *LAYOUT)
    samples.ok(*command, "--overwrite", "--verify")
    assert [path.name for path in (tmp_path / "out" / "iter_0000001").glob("mp_rank_*")] == ["mp_rank_00"]
    assert not list((tmp_path / "out").glob("*.partial"))
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["target"]["layout"]["tensor"] == 1


def test_a_folder_that_another_process_writes_is_left_alone(models: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "mg"
    flags = ("--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", models["tied"], "--save-dir", target)
    with folder_lease(target, "--save-dir"):
        assert f"--save-dir {target} is being written by process {os.getpid()} on" in samples.refused(*flags)
        assert [path.name for path in target.iterdir()] == [".lease"]
    samples.ok(*flags)
    assert not (target / ".lease").exists()


def test_resume_makes_a_damaged_file_again(models: dict[str, Path], tmp_path: Path) -> None:
    command = ("--load-dir", models["untied"], "--save-dir", tmp_path / "out", *LAYOUT)
    killed(2, *command)
    done = next(path for path in (tmp_path / "out").rglob("*.pt"))
    data = bytearray(done.read_bytes())
    data[len(data) // 2] ^= 1
    done.write_bytes(data)
    assert "is made again" in samples.ok(*command, "--resume", "--verify")


def test_the_old_output_stays_until_the_new_one_is_whole(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the tokenizer's files are copied, the last thing before publication."""
    from qwen3_npu.checkpoint.convert import output

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for kind in ("mg", "hf"):
        command = ("--load-dir", models["untied"], "--save-dir", tmp_path / kind, "--save-model-type", kind)
        samples.ok(*command)
        before = samples.digests(tmp_path / kind)
        with monkeypatch.context() as patched:
            patched.setattr(output, "carry_files", full)
            assert "No space left on device" in samples.refused(*command, "--overwrite", "--params-dtype", "fp32")
        after = samples.digests(tmp_path / kind)
        assert before.items() <= after.items(), "nothing of the old output is gone or another"
        samples.ok(
            "--load-dir", models["untied"], "--save-dir", tmp_path / kind, "--save-model-type", kind, "--verify-only"
        )
