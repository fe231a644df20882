"""--verify and --verify-only: a difference of one bit anywhere in the output is found, named, and exit status 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import samples

from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile, SafetensorsWriter
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile

TP2 = ("--target-tensor-parallel-size", 2)
PP2 = ("--target-pipeline-parallel-size", 2)


def flip(path: Path, where: int) -> None:
    """Turn one bit of a file over."""
    with open(path, "r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 1]))


def flip_tensor(path: Path, name: str) -> None:
    """Turn the lowest bit of a tensor's last element over, in a file of the torch format."""
    file = PtFile(path)
    ref = file.content["model"][name]
    numel = int(np.prod(ref.shape))
    where = file._data[ref.storage].start + (numel - 1) * ref.dtype.itemsize
    file.close()
    flip(path, where)


def verify_only(source: Path, output: Path, *flags: object) -> samples.Ran:
    return samples.run("--verify-only", "--load-dir", source, "--save-dir", output, *flags)


@pytest.fixture
def megatron(models: dict[str, Path], tmp_path: Path) -> Path:
    """The tied model at TP2 PP2, with rows of padding and a copy of the embedding on the last stage."""
    printed = samples.to_mg(models["tied"], tmp_path / "mg", *TP2, *PP2, "--padded-vocab-size", 300, "--verify")
    assert "is bit for bit what the source gives" in printed
    return tmp_path / "mg"


def test_a_whole_output_passes(megatron: Path, models: dict[str, Path]) -> None:
    assert verify_only(models["tied"], megatron).code == 0
    assert verify_only(models["tied"], megatron, *TP2, *PP2, "--padded-vocab-size", 300, "--jobs", 2).code == 0


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        ("mp_rank_00_000", "embedding.word_embeddings.weight"),
        ("mp_rank_01_000", "embedding.word_embeddings.weight"),  # its last row is padding
        ("mp_rank_01_001", "output_layer.weight"),  # the tied copy
        ("mp_rank_01_000", "decoder.layers.1.input_layernorm.weight"),  # the second TP rank's copy
        ("mp_rank_00_001", "decoder.layers.0.self_attention.linear_qkv.weight"),
    ],
)
def test_one_bit(rank: str, name: str, megatron: Path, models: dict[str, Path]) -> None:
    flip_tensor(megatron / "iter_0000001" / rank / "model_optim_rng.pt", name)
    ran = verify_only(models["tied"], megatron)
    assert ran.code == 1
    assert f"differs: {rank}/model_optim_rng.pt: model.{name}\n" in ran.out
    assert ran.out.count("differs:") == 1


def test_files_and_layouts(megatron: Path, models: dict[str, Path]) -> None:
    folder = megatron / "iter_0000001"
    ran = verify_only(models["tied"], megatron, "--target-tensor-parallel-size", 4, *PP2)
    assert ran.code == 1
    assert "missing file: mp_rank_02_000" in ran.out
    assert "is [150, 64] bfloat16, not [63, 64] bfloat16" in ran.out
    shutil.copytree(folder / "mp_rank_00_000", folder / "mp_rank_05_000")
    shutil.rmtree(folder / "mp_rank_01_001")
    ran = verify_only(models["tied"], megatron)
    assert ran.code == 1
    assert "missing file: mp_rank_01_001/model_optim_rng.pt" in ran.out
    assert "extra file: mp_rank_05_000/model_optim_rng.pt" in ran.out


def test_a_damaged_file_is_a_difference(megatron: Path, models: dict[str, Path]) -> None:
    path = megatron / "iter_0000001" / "mp_rank_01_000" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:5000])
    ran = verify_only(models["tied"], megatron)
    assert ran.code == 1
    assert "unreadable file" in ran.out
    assert "mp_rank_01_000" in ran.out


def test_another_model(megatron: Path, models: dict[str, Path]) -> None:
    ran = verify_only(models["moe"], megatron)
    assert ran.code == 1
    assert "extra: mp_rank_00_000/model_optim_rng.pt: model.decoder.layers.0.mlp.linear_fc1.weight" in ran.out
    assert "missing: mp_rank_00_000/model_optim_rng.pt: model.decoder.layers.0.mlp.router.weight" in ran.out


def rewrite(path: Path, drop: str, add: str) -> None:
    """A safetensors file without one tensor and with another."""
    file = SafetensorsFile(path)
    tensors = {name: (file.dtype(name), file.shape(name)) for name in file.header if name != drop}
    data = {name: file.read(name, tuple((0, n) for n in shape)) for name, (_, shape) in tensors.items()}
    some = next(iter(tensors))
    tensors[add], data[add] = tensors[some], data[some]
    writer = SafetensorsWriter(path, tensors)
    for name, array in data.items():
        writer.write(name, array)
    writer.close()


def test_hugging_face_outputs(megatron: Path, models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "hf"
    mg = ("--load-model-type", "mg", "--save-model-type", "hf")
    samples.to_hf(megatron, out, "--verify", "--max-shard-size", 0.0001)
    assert verify_only(megatron, out, *mg).code == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    last = out / index["model.layers.3.mlp.down_proj.weight"]
    flip(last, last.stat().st_size - 1)
    rewrite(out / index["model.layers.1.mlp.up_proj.weight"], "model.layers.1.mlp.up_proj.weight", "model.layers.9.x")
    (out / index["model.layers.2.self_attn.k_norm.weight"]).unlink()
    ran = verify_only(megatron, out, *mg)
    assert ran.code == 1
    assert "differs: " in ran.out
    assert ": model.layers.9.x" in ran.out
    up = "model.layers.1.mlp.up_proj.weight"
    assert f"missing: {index[up]}: {up}" in ran.out
    assert f"missing file: {index['model.layers.2.self_attn.k_norm.weight']}" in ran.out


def test_torch_dist_outputs(models: dict[str, Path], tmp_path: Path) -> None:
    layout = (*TP2, *PP2, "--target-expert-parallel-size", 2)
    samples.to_mg(models["moe"], tmp_path / "mg", *layout, "--ckpt-format", "torch_dist", "--verify")
    assert verify_only(models["moe"], tmp_path / "mg").code == 0
    path = max((tmp_path / "mg" / "iter_0000001").glob("*.distcp"), key=lambda p: p.stat().st_size)
    flip(path, path.stat().st_size // 2)
    ran = verify_only(models["moe"], tmp_path / "mg")
    assert ran.code == 1
    assert f"differs: {path.name}: " in ran.out
    path.unlink()
    ran = verify_only(models["moe"], tmp_path / "mg")
    assert ran.code == 1
    assert f"missing file: {path.name}" in ran.out


def test_a_rounded_output_passes(models: dict[str, Path], real_models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(real_models["moe"], tmp_path / "mg", *TP2, "--params-dtype", "bf16", "--verify")
    assert verify_only(real_models["moe"], tmp_path / "mg").code == 0
    ran = verify_only(real_models["moe"], tmp_path / "mg", "--params-dtype", "fp32")
    assert ran.code == 1
    assert "bfloat16, not [64] float32" in ran.out


def test_the_manifest(megatron: Path, models: dict[str, Path]) -> None:
    import xxhash

    manifest = json.loads((megatron / "conversion.json").read_text())
    assert manifest["source"]["folder"] == str(models["tied"])
    assert manifest["target"]["layout"]["tensor"] == 2
    assert manifest["target"]["layout"]["padded_vocab_size"] == 300
    assert {"qwen3_npu", "numpy", "python"} <= manifest["versions"].keys()
    assert len(manifest["files"]) == 4
    entry = manifest["files"]["iter_0000001/mp_rank_01_001/model_optim_rng.pt"]
    assert entry["bytes"] == (megatron / "iter_0000001/mp_rank_01_001/model_optim_rng.pt").stat().st_size
    norm = samples.weights(models["tied"])["model.layers.2.input_layernorm.weight"]
    assert entry["xxh3_128"]["model.decoder.layers.0.input_layernorm.weight"] == xxhash.xxh3_128_hexdigest(norm)


def test_nothing_to_verify(models: dict[str, Path], tmp_path: Path) -> None:
    ran = verify_only(models["tied"], tmp_path)
    assert ran.code == 1
    assert "not a Megatron checkpoint" in ran.out
