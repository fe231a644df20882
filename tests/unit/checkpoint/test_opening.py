"""Every program takes every form of a model, and none uses a damaged file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import samples
import xxhash

TRACKER = "latest_checkpointed_iteration.txt"
FORMS = ("hf", "torch", "torch/iter_0000001", "torch_dist", "torch_dist/iter_0000001", "release", "release/release")


@pytest.fixture(scope="module")
def forms(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forms")
    samples.to_mg(models["tied"], root / "torch", "--target-tensor-parallel-size", 2)
    samples.to_mg(models["tied"], root / "torch_dist", "--ckpt-format", "torch_dist")
    samples.to_hf(root / "torch", root / "hf")
    shutil.copytree(root / "torch", root / "release")
    (root / "release" / "iter_0000001").rename(root / "release" / "release")
    (root / "release" / TRACKER).write_text("release")
    return root


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_by_the_converter(form: str, forms: Path, models: dict[str, Path], tmp_path: Path) -> None:
    kind = "hf" if form == "hf" else "mg"
    out = ("--load-model-type", kind, "--load-dir", forms / form, "--save-dir", tmp_path / "out")
    samples.ok(*out, "--save-model-type", "hf")
    samples.assert_same_weights(models["tied"], tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_names_its_architecture(form: str, forms: Path) -> None:
    """What inference.py, evaluation.py and pretrain_gpt.py begin with."""
    from qwen3_npu.args.model import ModelArgs, ShapeArgs
    from qwen3_npu.checkpoint.formats.open import find, find_architecture, reader

    arch, where, _ = find_architecture(ModelArgs(), ShapeArgs(), load=str(forms / form), tokenizer=None, noop_layers=0)
    assert arch.same_weights(samples.ARCHS["tied"])
    assert Path(where).is_relative_to(forms / form.split("/")[0])
    found = find(forms / form)
    assert found is not None
    assert found.iteration == (None if form == "hf" or "release" in form else 1)
    assert found.format == ("hf" if form == "hf" else "torch_dist" if "dist" in form else "torch")
    opened = reader(found)
    opened.check()
    opened.close()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("form", ["hf", "torch", "torch/iter_0000001", "torch_dist", "torch_dist/iter_0000001"])
def test_a_flipped_bit_is_named_by_every_reader(form: str, forms: Path, tmp_path: Path) -> None:
    from qwen3_npu.args.inference import WeightArgs
    from qwen3_npu.errors import UsageError
    from qwen3_npu.inference.runner import open_source

    root = Path(shutil.copytree(forms / form.split("/")[0], tmp_path / "in"))
    load = root.joinpath(*form.split("/")[1:])
    files = [path for path in root.rglob("*") if path.suffix in (".pt", ".distcp", ".safetensors")]
    file = max(files, key=lambda path: path.stat().st_size)
    flip(file)
    kind = "hf" if form == "hf" else "mg"
    line = samples.refused(
        "--load-model-type", kind, "--load-dir", load, "--save-dir", tmp_path / "out", "--save-model-type", "hf"
    )
    assert f"{file} is damaged" in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="is damaged") as caught:
        open_source(WeightArgs(load=str(load)))
    assert str(file) in str(caught.value)


def test_the_newest_whole_checkpoint_of_a_root_is_used_aloud(
    forms: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(forms / "torch", tmp_path / "in"))
    shutil.copytree(root / "iter_0000001", root / "iter_0000002")
    (root / TRACKER).write_text("2")
    flip(root / "iter_0000002" / "mp_rank_01" / "model_optim_rng.pt")
    said = samples.to_hf(root, tmp_path / "hf")
    assert f"{root / 'iter_0000002' / 'mp_rank_01' / 'model_optim_rng.pt'} is damaged" in said
    assert "iter_0000001 is the newest complete checkpoint and is used" in said
    samples.assert_same_weights(models["tied"], tmp_path / "hf")


@pytest.mark.parametrize(
    ("tracker", "words"),
    [
        (b"\0\0\xff", "{} says no iteration"),
        (b"", "{} says no iteration"),
        ("\u00b2".encode(), "{} says no iteration"),  # a digit to str.isdigit, none to int
        (b"release", "release does not exist"),
        (b"0", "iter_0000000 does not exist"),
    ],
)
def test_a_damaged_tracker_beside_whole_checkpoints(
    tracker: bytes, words: str, forms: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(forms / "torch_dist", tmp_path / "in"))
    (root / TRACKER).write_bytes(tracker)
    said = samples.to_hf(root, tmp_path / "hf")
    assert words.format(root / TRACKER) in said
    samples.assert_same_weights(models["tied"], tmp_path / "hf")


@pytest.mark.parametrize("form", ["hf", "torch/iter_0000001", "torch_dist/iter_0000001"])
def test_the_record_holds_what_lies_on_disk(form: str, forms: Path) -> None:
    said = json.loads((forms / form / "integrity.json").read_text())
    assert said["hash"] == "xxh3_128"
    weights = {str(p.relative_to(forms / form)) for p in (forms / form).rglob("*") if p.suffix in (".pt", ".distcp")}
    assert weights <= said["files"].keys()
    for name, seal in said["files"].items():
        data = (forms / form / name).read_bytes()
        assert seal == {"bytes": len(data), "digest": xxhash.xxh3_128(data).hexdigest()}, name


def test_records_of_older_checkpoints_are_read(forms: Path, tmp_path: Path) -> None:
    """{"files": {name: {"bytes", "sha256"}}}, without the name of a hash."""
    folder = Path(shutil.copytree(forms / "torch", tmp_path / "in")) / "iter_0000001"
    files = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in folder.rglob("*.pt")
    }
    (folder / "integrity.json").write_text(json.dumps({"files": files}))
    mg = ("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", folder)
    samples.ok(*mg, "--save-dir", tmp_path / "hf")
    flip(folder / "mp_rank_00" / "model_optim_rng.pt")
    assert "its sha256 digest is another" in samples.refused(*mg, "--save-dir", tmp_path / "hf2")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("torch/iter_0000001/mp_rank_00", "is one rank's part of a checkpoint; give {root}/torch/iter_0000001"),
        (
            "torch/iter_0000001/mp_rank_01/model_optim_rng.pt",
            "is one rank's part of a checkpoint; give {root}/torch/iter_0000001",
        ),
        ("hf/config.json", "is a file; give the folder of a model or checkpoint, as {root}/hf"),
        ("weightless", "has a config.json and no weights (*.safetensors)"),
        ("nowhere", "does not exist"),
    ],
)
def test_what_is_no_model_is_refused_as_what_it_is(path: str, words: str, forms: Path, tmp_path: Path) -> None:
    from qwen3_npu.checkpoint.formats.open import nothing_there

    (forms / "weightless").mkdir(exist_ok=True)
    shutil.copy(forms / "hf" / "config.json", forms / "weightless")
    said = f"{forms / path} {words.format(root=forms)}"
    line = samples.refused(
        "--load-dir",
        forms / "hf",
        "--lora-load",
        forms / path,
        "--save-dir",
        tmp_path / "out",
        "--save-model-type",
        "hf",
    )
    assert f"--lora-load {said}" in line
    assert nothing_there(forms / path, None) == said
