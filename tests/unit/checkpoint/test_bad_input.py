"""Every bad input is one clear line and exit status 2, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import samples
import torch
import transformers
from safetensors.torch import load_file, save_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TRACKER = "latest_checkpointed_iteration.txt"
RANK = "iter_0000001/mp_rank_00/model_optim_rng.pt"


@pytest.fixture
def hf(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["untied"], tmp_path / "hf"))


@pytest.fixture
def mg(models: dict[str, Path], tmp_path: Path) -> Path:
    samples.to_mg(models["untied"], tmp_path / "mg")
    return tmp_path / "mg"


@pytest.fixture
def dist(models: dict[str, Path], tmp_path: Path) -> Path:
    samples.to_mg(models["untied"], tmp_path / "dist", "--ckpt-format", "torch_dist")
    return tmp_path / "dist"


def cut(path: Path, share: float = 0.7) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def edit(path: Path, **changes: object) -> None:
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def put(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def rename(folder: Path, old: str, new: str) -> None:
    """Give tensors other names, with the safetensors library."""
    tensors = load_file(folder / SINGLE)
    save_file({name.replace(old, new, 1): tensor for name, tensor in tensors.items()}, folder / SINGLE)


def split(folder: Path) -> None:
    """The model in several files, of which one is then gone."""
    samples.ok("--load-dir", folder, "--save-dir", folder / "x", "--save-model-type", "hf", "--max-shard-size", 0.0001)
    (folder / "model.safetensors").unlink()
    for path in (folder / "x").iterdir():
        shutil.move(path, folder / path.name)
    min(folder.glob("model-00002-of-*.safetensors")).unlink()


HF = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config.json is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "not Qwen3": (lambda f: edit(f / "config.json", model_type="llama"), "model_type is 'llama'"),
    "another Qwen3": (lambda f: edit(f / "config.json", hidden_size=32), "has shape"),
    "more layers": (lambda f: edit(f / "config.json", num_hidden_layers=5), "tensors missing"),
    "fewer layers": (lambda f: edit(f / "config.json", num_hidden_layers=3), "tensors not expected"),
    "truncated": (lambda f: cut(f / "model.safetensors"), "is truncated"),
    "empty file": (lambda f: cut(f / "model.safetensors", 0), "is not a complete safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "--load-dir|not a Megatron|safetensors"),
    "a shard is missing": (lambda f: (split(f), samples.unsealed(f)), "1 of . weight files missing"),
    "index is no index": (lambda f: put(f / INDEX, "[]"), "index.json is .*; a JSON object is expected"),
    "index of numbers": (lambda f: put(f / INDEX, '{"weight_map": {"a": 1}}'), "a is 1; a string is expected"),
    "index of elsewhere": (
        lambda f: put(f / INDEX, '{"weight_map": {"a": "../x"}}'),
        "'../x'; a file in .* is expected",
    ),
    "a tensor in two files": (
        lambda f: shutil.copy(f / SINGLE, f / "b.safetensors"),
        r"is in b\.safetensors too|too; remove",
    ),
    "a pipe for weights": (lambda f: instead(f / SINGLE, os.mkfifo), "is not a regular file"),
    "a folder for weights": (lambda f: instead(f / SINGLE, os.mkdir), "is not a regular file"),
    "a pipe for config.json": (lambda f: instead(f / "config.json", os.mkfifo), "--load-dir|not a|config"),
    "config.json is a list": (lambda f: put(f / "config.json", "[1]"), "a JSON object is expected"),
    "config.json is nested": (lambda f: put(f / "config.json", "[" * 100_000), "nested too deeply"),
    "config.json is not UTF-8": (lambda f: put(f / "config.json", b'{"\xff": 1}'), "cannot be read as JSON"),
    "FP8 without a configuration": (
        lambda f: rename(f, "q_proj.weight", "q_proj.weight_scale_inv"),
        r"config.json: quantization_config: quant_method null, but the weights are FP8",
    ),
    "scales without weights": (
        lambda f: (
            rename(f, "q_proj.weight", "q_proj.weight_scale_inv"),
            edit(f / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ),
        "q_proj.weight_scale_inv is the scale of no weight",
    ),
    "AWQ by its configuration": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "awq"}),
        "quant_method 'awq': such weights are not read",
    ),
    "GPTQ by its configuration": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}),
        "quant_method 'gptq': such weights are not read",
    ),
    "GPTQ": (lambda f: rename(f, "q_proj.weight", "q_proj.g_idx"), "holds GPTQ weights"),
    "compressed-tensors": (lambda f: rename(f, "q_proj.weight", "q_proj.weight_packed"), "holds compressed-tensors"),
    "FP8 of compressed-tensors": (lambda f: rename(f, "q_norm.weight", "q_proj.weight_scale"), "compressed-tensors"),
    "bitsandbytes": (lambda f: rename(f, "q_norm.weight", "q_proj.weight.absmax"), "holds bitsandbytes weights"),
    "bitsandbytes of 8 bits": (lambda f: rename(f, "q_norm.weight", "q_proj.SCB"), "weights of 8 bits"),
    "AWQ": (lambda f: rename(f, "q_proj.weight", "q_proj.qweight"), "holds AWQ"),
    "a reward model": (lambda f: rename(f, "lm_head.weight", "score.weight"), "holds a classification model"),
    "an embedding model": (lambda f: rename(f, "model.", ""), "holds an embedding model"),
    "control characters": (lambda f: rename(f, "lm_head", "\x1b[2J\n"), r"not expected .*\\x1b\[2J\\n|tensors missing"),
}


@pytest.mark.parametrize("name", HF)
def test_hugging_face_sources(name: str, hf: Path, tmp_path: Path) -> None:
    import re

    damage, message = HF[name]
    damage(samples.unsealed(hf))
    assert re.search(message, samples.refused("--load-dir", hf, "--save-dir", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


MG: dict[str, tuple[Callable, str]] = {
    "no tracker": (lambda f: (f / TRACKER).unlink(), f"it has no {TRACKER}"),
    "tracker of nothing": (
        lambda f: (f / TRACKER).write_text("7"),
        "iter_0000007 does not exist; iterations there: iter_",
    ),
    "tracker of nonsense": (lambda f: (f / TRACKER).write_text("x"), "says 'x'"),
    "empty iteration": (lambda f: shutil.rmtree(f / "iter_0000001/mp_rank_00"), "the checkpoint is incomplete"),
    "truncated": (lambda f: cut(f / RANK), "is not a complete torch checkpoint"),
    "no zip": (lambda f: (f / RANK).write_bytes(b"x" * 999), "is not a complete torch checkpoint"),
    "config of another model": (lambda f: edit(f / "config.json", num_hidden_layers=6), "tensors missing for layout"),
    "a rank is missing": (lambda f: shutil.rmtree(f / "iter_0000001/mp_rank_00"), "incomplete"),
    "args are no namespace": (lambda f: resave(f, args={"num_layers": 4}), "is no dict with args"),
    # What `int` takes or what `str.isdigit` says is no number of an iteration or of a model.
    "tracker of another digit": (lambda f: (f / TRACKER).write_text("\u00b2"), "says '\u00b2'"),
    "tracker of too many digits": (lambda f: (f / TRACKER).write_text("9" * 5000), "says '999"),
    "too many layers": (lambda f: resay(f, num_layers=2**70), "num_layers is 1180591620717411303424; at most 1048576"),
    "too many experts": (lambda f: edit(f / "config.json", **MOE), "65536 experts cannot be meant; at most 1048576"),
    "one norm under two names": (lambda f: resave(f, model=with_a_fused_norm(f)), "are one norm under two names"),
    "chunks beside a model": (lambda f: resave(f, model0={}), "has model and model0: one model or several chunks"),
    "ranks as text": (lambda f: resay(f, pipeline_model_parallel_size="2"), "pipeline_model_parallel_size is '2'; an"),
    "no ranks": (lambda f: resay(f, tensor_model_parallel_size=0), "tensor_model_parallel_size is 0; at least 1"),
    "no-op layers as fractions": (lambda f: resay(f, noop_layers=[1.5]), "[1.5] is not a list of numbers"),
}
MOE = {"model_type": "qwen3_moe", "num_experts": 2**16, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
MOE |= {"num_hidden_layers": 32}


def resave(folder: Path, **changes: object) -> None:
    """Other content of the rank's file, in torch's writing."""
    torch.save(torch.load(folder / RANK, weights_only=False) | changes, folder / RANK)


def with_a_fused_norm(folder: Path) -> dict[str, torch.Tensor]:
    """Transformer Engine's name of a norm beside its usual one, with other values."""
    model = torch.load(folder / RANK, weights_only=False)["model"]
    layer = "decoder.layers.0."
    fused = f"{layer}self_attention.linear_qkv.layer_norm_weight"
    return model | {fused: 2 * model[f"{layer}input_layernorm.weight"]}


def resay(folder: Path, **changes: object) -> None:
    """Other arguments, and no config.json beside them."""
    args = torch.load(folder / RANK, weights_only=False)["args"]
    vars(args).update(changes)
    resave(folder, args=args)
    (folder / "config.json").unlink()


@pytest.mark.parametrize("name", MG)
def test_megatron_sources(name: str, mg: Path, tmp_path: Path) -> None:
    damage, message = MG[name]
    damage(samples.unsealed(mg))
    command = ("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", mg, "--save-dir", tmp_path / "out")
    assert message in samples.refused(*command)
    assert not (tmp_path / "out").exists()


def test_content_that_others_add_is_passed_over(mg: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Keys that are no text, and arguments whose names mean something to Python."""
    resay(samples.unsealed(mg), self=False, name=None, pipeline_model_parallel_size=None)
    resave(mg, **{"model\u00b2": 1})
    content = torch.load(mg / RANK, weights_only=False)
    torch.save({**content, 5: "x"}, mg / RANK)
    samples.to_hf(mg, tmp_path / "hf")
    samples.assert_same_weights(models["untied"], tmp_path / "hf")


def test_a_missing_rank(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["untied"], tmp_path / "mg", "--target-tensor-parallel-size", 2)
    shutil.rmtree(samples.unsealed(tmp_path / "mg") / "iter_0000001" / "mp_rank_01")
    command = ("--load-model-type", "mg", "--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "out")
    assert "mp_rank_01/model_optim_rng.pt does not exist; the checkpoint's args say TP2 PP1" in samples.refused(
        *command
    )


DIST: dict[str, tuple[Callable, str]] = {
    "no metadata": (lambda f: (f / ".metadata").unlink(), "has no .metadata"),
    "no common.pt": (lambda f: (f / "common.pt").unlink(), "has no common.pt"),
    "a file is missing": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp cannot be opened"),
    "truncated": (lambda f: cut(f / "__0_0.distcp"), "is truncated"),
    "common.pt is a list": (lambda f: torch.save([1], f / "common.pt"), "common.pt is no dict with args"),
    "truncated metadata": (lambda f: cut(f / ".metadata"), "cannot be read"),
    "metadata is something else": (lambda f: (f / ".metadata").write_bytes(b"\x80\x02N."), "is not the metadata"),
    "a key is missing": (lambda f: rename_key(f, b"final_layernorm", b"xinal_layernorm"), "tensors missing for"),
    "a chunk is missing": (lambda f: drop_chunk(f), "is incomplete: a part of decoder.layers.2.mlp.linear_fc2"),
}


def rename_key(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes().replace(old, new))


def drop_chunk(folder: Path) -> None:
    from qwen3_npu.checkpoint.formats.dist_metadata import read_metadata, write_metadata

    tensors, _ = read_metadata(folder / ".metadata")
    key = "decoder.layers.mlp.linear_fc2.weight"
    stored = tensors[key]
    kept = tuple(chunk for chunk in stored.chunks if chunk.region[0] != (2, 3))
    write_metadata(folder / ".metadata", {**tensors, key: type(stored)(stored.dtype, stored.size, kept)}, {})


@pytest.mark.parametrize("name", DIST)
def test_torch_dist_sources(name: str, dist: Path, tmp_path: Path) -> None:
    damage, message = DIST[name]
    damage(samples.unsealed(dist) / "iter_0000001")
    command = ("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", dist, "--save-dir", tmp_path / "out")
    assert message in samples.refused(*command)
    assert not (tmp_path / "out").exists()


TARGETS = {
    "TP and heads": (("--target-tensor-parallel-size", 3), "3 does not divide the 4 KV heads; use one of 1, 2, 4, 8"),
    "PP and layers": (("--target-pipeline-parallel-size", 3), "3 does not divide the 4 layers"),
    "EP of a dense model": (("--target-expert-parallel-size", 2), "needs a MoE model; this one is dense"),
    "VPP": (("--num-layers-per-virtual-pipeline-stage", 3), "does not divide the 4 layers"),
    "layer list": (("--num-layer-list", "1,2"), "must have 1 entries"),
    "noop": (("--noop-layers", "9"), "distinct numbers from 0 to 4 expected"),
    "noop is no list": (("--noop-layers", "a"), "is not a list of numbers"),
    "vocabulary": (("--padded-vocab-size", 100), "is smaller than the model's vocabulary of 250"),
    "unknown flag": (("--target-tensor-paralel-size", 2), "did you mean --target-tensor-parallel-size?"),
    "another architecture": (("--add-qkv-bias",), "Qwen3 has no bias in q, k and v"),
    "model type": (("--model-type-hf", "qwen3-moe"), "--model-type-hf qwen3-moe, but the model in"),
    "load type": (("--load-model-type", "mg"), "holds a Hugging Face model; give --load-model-type hf"),
    "format": (("--ckpt-format", "zarr"), "invalid choice: 'zarr'"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    flags, message = TARGETS[name]
    assert message in samples.refused("--load-dir", models["untied"], "--save-dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_the_wrong_load_type_of_a_megatron_checkpoint(mg: Path, tmp_path: Path) -> None:
    line = samples.refused("--load-dir", mg, "--save-dir", tmp_path / "out")
    assert "holds a Megatron checkpoint; give --load-model-type mg" in line


def test_a_folder_that_cannot_be_written(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    line = samples.refused("--load-dir", models["untied"], "--save-dir", tmp_path / "file" / "out")
    assert "another --save-dir" in line


def with_head(folder: Path, head: torch.Tensor) -> None:
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {"lm_head.weight": head.contiguous()}, folder / SINGLE, metadata={"format": "pt"})


def test_a_tied_model_may_store_its_output_layer_if_it_is_the_embedding(real_models: dict, tmp_path: Path) -> None:
    shutil.copytree(real_models["tied"], tmp_path / "hf")
    embedding = load_file(tmp_path / "hf" / SINGLE)["model.embed_tokens.weight"]
    with_head(tmp_path / "hf", embedding.clone())
    samples.to_mg(tmp_path / "hf", tmp_path / "mg", "--verify")
    # transformers is the judge: another matrix is not tied, whatever config.json says.
    with_head(tmp_path / "hf", embedding + 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    line = samples.refused("--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "out")
    assert "set tie_word_embeddings to false" in line
    edit(tmp_path / "hf" / "config.json", tie_word_embeddings=False)
    samples.to_mg(tmp_path / "hf", tmp_path / "mg2")
    samples.to_hf(tmp_path / "mg2", tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back" / SINGLE)["lm_head.weight"], embedding + 1)
