"""Each tensor keeps its dtype, both ways; what must change says so, and never loses a value in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import samples
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file

TP2 = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)
SINGLE = "model.safetensors"


def mixed(source: Path, folder: Path, dtypes: dict[str, torch.dtype], **values: torch.Tensor) -> dict:
    """A model of which tensors whose names hold a word have another dtype."""
    import shutil

    shutil.copytree(source, folder)
    tensors = load_file(folder / SINGLE)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        dtype = next((dtype for word, dtype in dtypes.items() if word in name), torch.bfloat16)
        tensors[name] = torch.randn(tensor.shape, generator=generator).to(dtype)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return tensors


def assert_equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


MIXES = {
    "float32 norms": {"norm": torch.float32},
    "float16 embedding": {"embed_tokens": torch.float16},
    "one float32 layer": {"layers.1.mlp": torch.float32, "lm_head": torch.float16},
}


@pytest.mark.parametrize("kind", ["untied", "moe"])
@pytest.mark.parametrize("name", MIXES)
def test_mixed_dtypes_survive_the_way_there_and_back(name: str, kind: str, models: dict, tmp_path: Path) -> None:
    expected = mixed(models[kind], tmp_path / "hf", MIXES[name])
    printed = samples.to_mg(tmp_path / "hf", tmp_path / "mg", *TP2, "--verify")
    assert "tensors stay " in printed
    assert "converted" not in printed
    samples.to_mg(tmp_path / "mg", tmp_path / "other", "--target-tensor-parallel-size", 4, "--verify")
    samples.to_hf(tmp_path / "other", tmp_path / "back", "--verify", "--max-shard-size", 0.0002)
    assert_equal(tmp_path / "back", expected)
    ran = samples.run("--verify-only", "--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "mg")
    assert ran.code == 0, ran.out


def test_torch_dist_has_one_dtype_for_all_layers(models: dict, tmp_path: Path) -> None:
    """It stores a tensor of all layers as one: norms of float32 stay, a single layer of float32 makes all so."""
    expected = mixed(models["untied"], tmp_path / "hf", {"norm": torch.float32, "layers.1.mlp.down": torch.float32})
    samples.to_mg(tmp_path / "hf", tmp_path / "mg", *TP2, "--ckpt-format", "torch_dist", "--verify")
    samples.to_hf(tmp_path / "mg", tmp_path / "back", "--verify")
    metadata = torch.distributed.checkpoint.FileSystemReader(tmp_path / "mg" / "iter_0000001").read_metadata()
    stored = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    assert stored.properties.dtype is torch.float32
    assert_equal(tmp_path / "back", expected)


def test_a_tensor_joined_from_several_dtypes_holds_all_exactly(models: dict, tmp_path: Path) -> None:
    words = {"k_proj": torch.float32, "gate_proj": torch.float16}
    expected = mixed(models["untied"], tmp_path / "hf", words)
    printed = samples.to_mg(tmp_path / "hf", tmp_path / "mg", *TP2, "--verify")
    assert "8 Megatron tensors join several dtypes" in printed
    path = tmp_path / "mg/iter_0000001/mp_rank_00_000/model_optim_rng.pt"
    model = torch.load(path, weights_only=False)["model"]
    dtypes = {name.split(".", 3)[-1]: tensor.dtype for name, tensor in model.items() if "layers.0." in name}
    assert dtypes["self_attention.linear_qkv.weight"] is torch.float32
    assert dtypes["mlp.linear_fc1.weight"] is torch.float32  # of float16 and bfloat16
    assert dtypes["mlp.linear_fc2.weight"] is torch.bfloat16
    samples.to_mg(tmp_path / "mg", tmp_path / "other", "--ckpt-format", "torch_dist", "--verify")
    samples.to_hf(tmp_path / "other", tmp_path / "back", "--verify")
    assert_equal(tmp_path / "back", expected)
    ran = samples.run("--verify-only", "--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "other")
    assert ran.code == 0, ran.out


def test_values_that_a_tensor_had_no_room_for_are_not_rounded(models: dict, tmp_path: Path) -> None:
    """Its float32 tensor was trained on, or edited, after it was joined from bfloat16 and float32 ones."""
    mixed(models["untied"], tmp_path / "hf", {"k_proj": torch.float32})
    samples.to_mg(tmp_path / "hf", tmp_path / "mg")
    path = tmp_path / "mg/iter_0000001/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.layers.1.self_attention.linear_qkv.weight"][0, 0] = 1 + 2**-20
    torch.save(content, path)
    (path.parents[1] / "integrity.json").unlink()
    back = ("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", tmp_path / "mg")
    line = samples.refused(*back, "--save-dir", tmp_path / "no")
    assert "model.layers.1.self_attn.q_proj.weight was bfloat16 and has values now" in line
    samples.ok(*back, "--save-dir", tmp_path / "back", "--ignore-args", "own_dtypes")
    assert load_file(tmp_path / "back" / SINGLE)["model.layers.1.self_attn.q_proj.weight"][0, 0] == 1 + 2**-20


def test_ranks_of_other_dtypes_are_read_as_values(models: dict, tmp_path: Path) -> None:
    """The two halves of a tensor lie in two files; one of these was saved again in float32."""
    expected = mixed(models["untied"], tmp_path / "hf", {})
    samples.to_mg(tmp_path / "hf", tmp_path / "mg", "--target-tensor-parallel-size", 2)
    path = tmp_path / "mg/iter_0000001/mp_rank_01/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"] = {name: tensor.float() for name, tensor in content["model"].items()}
    torch.save(content, path)
    (tmp_path / "mg/iter_0000001/integrity.json").unlink(missing_ok=True)  # another program wrote it
    samples.to_hf(tmp_path / "mg", tmp_path / "back", "--verify")
    found = load_file(tmp_path / "back" / SINGLE)
    assert found["model.layers.0.mlp.up_proj.weight"].dtype is torch.float32
    assert found["model.norm.weight"].dtype is torch.bfloat16
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in expected.items())


def test_params_dtype_converts_counts_and_never_overflows(models: dict, tmp_path: Path) -> None:
    tensors = mixed(models["untied"], tmp_path / "hf", {"norm": torch.float32})
    printed = samples.to_mg(tmp_path / "hf", tmp_path / "mg", "--params-dtype", "fp16", "--verify")
    assert "(35 tensors compared, 35 of them converted to another dtype)" in printed
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name][1, 2] = 1e6
    save_file(tensors, tmp_path / "hf" / SINGLE, metadata={"format": "pt"})
    line = samples.refused("--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "out", "--params-dtype", "fp16")
    assert f"{name} has a value of 9.994e+05, which float16 cannot hold" in line
    assert not (tmp_path / "out" / "iter_0000001").exists()
    tensors[name][1, 2] = float("inf")  # an infinity of the source is no overflow
    save_file(tensors, tmp_path / "hf" / SINGLE, metadata={"format": "pt"})
    samples.ok("--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "inf", "--params-dtype", "fp16", "--verify")


def test_verify_finds_what_a_conversion_did_wrong(models: dict, tmp_path: Path, monkeypatch) -> None:
    """The readers of conversions are broken here; --verify, which uses torch and safetensors, finds it."""
    from qwen3_npu.checkpoint.binary import safetensors, torch_zip_read

    def off_by_one(fd: int, offset: int, *rest: object, **named: object) -> np.ndarray:
        return whole(fd, offset - 2 if offset > 90_000 else offset, *rest, **named)

    whole = safetensors.read_region
    monkeypatch.setattr(safetensors, "read_region", off_by_one)
    ran = samples.run("--load-dir", models["untied"], "--save-dir", tmp_path / "mg", "--verify")
    assert ran.code == 1
    assert "differs: " in ran.out
    monkeypatch.setattr(safetensors, "read_region", whole)
    samples.to_mg(models["untied"], tmp_path / "good")
    monkeypatch.setattr(torch_zip_read, "read_region", off_by_one)
    mg = ("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", tmp_path / "good")
    ran = samples.run(*mg, "--save-dir", tmp_path / "hf", "--verify")
    assert ran.code == 1
    assert "differs: " in ran.out


@pytest.mark.parametrize("direction", ["into torch_dist", "out of torch_dist", "of an adapter"])
def test_verify_reads_neither_chunks_nor_adapters_as_conversions_do(
    direction: str, models: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its readers are torch and safetensors: what ours or our writer gets wrong is found."""
    from qwen3_npu.checkpoint.binary import torch_zip_read, torch_zip_write
    from qwen3_npu.checkpoint.formats import peft
    from qwen3_npu.checkpoint.mapping.lora import Lora

    mg = ("--load-model-type", "mg", "--save-model-type", "hf")
    if direction == "into torch_dist":
        section = torch_zip_write.PtSection.write
        monkeypatch.setattr(torch_zip_write.PtSection, "write", lambda self, data: section(self, data[::-1]))
        argv = ("--load-dir", models["untied"], "--save-dir", tmp_path / "out", "--ckpt-format", "torch_dist")
    elif direction == "out of torch_dist":
        samples.to_mg(models["untied"], tmp_path / "mg", "--ckpt-format", "torch_dist", *TP2)
        read = torch_zip_read.PtArchive.read
        monkeypatch.setattr(torch_zip_read.PtArchive, "read", lambda *args: read(*args)[::-1])
        argv = (*mg, "--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "out")
    else:
        lora = Lora(4, 8.0, samples.ALL_TARGETS)
        adapter = samples.write_adapter(tmp_path / "peft", samples.ARCHS["untied"], lora, shared_a=True)
        read = peft.SafetensorsFile.read
        monkeypatch.setattr(peft.SafetensorsFile, "read", lambda *args: read(*args)[::-1])
        argv = ("--load-dir", adapter, "--hf-cfg-dir", models["untied"], "--save-dir", tmp_path / "out")
        argv += ("--load-model-type", "hf", "--save-model-type", "mg")
    ran = samples.run(*argv, "--verify")
    assert ran.code == 1, ran.out + ran.err
    assert "differs: " in ran.out
