"""Exports just work: transformers loads weights and tokenizer; the commands of both MindSpeed-LLM generations run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import samples

from qwen3_npu.checkpoint.binary.dtypes import full
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile, SafetensorsWriter
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile
from qwen3_npu.checkpoint.binary.torch_zip_write import PtWriter
from qwen3_npu.checkpoint.convert.probe import logits, probe_tokens
from qwen3_npu.checkpoint.formats.open import open_checkpoint
from qwen3_npu.checkpoint.mapping.lora import Lora

TP2_PP2 = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)
V1 = ("--use-mcore-models", "--model-type", "GPT", "--spec", "mindspeed_llm.tasks.models.spec.qwen3_spec", "layer_spec")
V2 = ("--model-type-hf", "qwen3", "--save-layer-by-layer", "--transformer-impl", "local")


@pytest.mark.parametrize("kind", samples.ARCHS)
@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_transformers_loads_an_export(
    kind: str, ckpt_format: str, real_models: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    import transformers

    samples.to_mg(real_models[kind], tmp_path / "mg", *TP2_PP2, "--ckpt-format", ckpt_format)
    samples.to_hf(tmp_path / "mg", tmp_path / "hf", "--max-shard-size", 0.0003)
    tokens = torch.tensor([[5, 1, 4, 2, 3]])
    with torch.no_grad():
        expected, got = (
            transformers.AutoModelForCausalLM.from_pretrained(f, dtype="auto")(tokens).logits
            for f in (real_models[kind], tmp_path / "hf")
        )
    assert got.dtype is torch.float32
    assert torch.equal(expected, got)


@pytest.mark.parametrize("kind", samples.ARCHS)
def test_the_probe_computes_what_transformers_does(kind: str, real_models: dict[str, Path]) -> None:
    import torch
    import transformers

    source = open_checkpoint(real_models[kind])
    tokens = probe_tokens(source.arch, 6)
    assert len(set(tokens)) == 6
    model = transformers.AutoModelForCausalLM.from_pretrained(real_models[kind], dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(logits(source, tokens) - expected).max() < 1e-5


def test_the_tokenizer_comes_along(real_data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    model = Path(shutil.copytree(models["tied"], tmp_path / "model"))
    for path in (real_data / "qwen3-tokenizer").iterdir():
        shutil.copyfile(path, model / path.name)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643], "temperature": 0.6}))
    samples.to_mg(model, tmp_path / "mg", *TP2_PP2)
    samples.to_hf(tmp_path / "mg", tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer("Qwen3 你好").input_ids) == "Qwen3 你好"
    assert tokenizer.chat_template
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert config.temperature == 0.6


def test_a_tied_model_that_stores_its_output_layer(models: dict[str, Path], tmp_path: Path) -> None:
    """As published tied models do."""
    model = Path(shutil.copytree(models["tied"], tmp_path / "model"))
    file = SafetensorsFile(model / "model.safetensors")
    tensors = {name: (file.dtype(name), file.shape(name)) for name in file.header}
    data = {name: file.read(name, full(shape)) for name, (_, shape) in tensors.items()}
    tensors["lm_head.weight"], data["lm_head.weight"] = (
        tensors["model.embed_tokens.weight"],
        data["model.embed_tokens.weight"],
    )
    writer = SafetensorsWriter(model / "model.safetensors", tensors)
    for name, array in data.items():
        writer.write(name, array)
    writer.close()
    samples.to_mg(model, tmp_path / "mg", *TP2_PP2)
    samples.to_hf(tmp_path / "mg", tmp_path / "hf")
    samples.assert_same_weights(models["tied"], tmp_path / "hf")


def test_commands_of_2_1_0(models: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = ("--tokenizer-model", models["untied"] / "tokenizer.json")
    samples.to_mg(models["untied"], tmp_path / "mg", *V1, *tokenizer, "--params-dtype", "bf16", *TP2_PP2)
    original = Path(shutil.copytree(models["untied"], tmp_path / "original"))
    one = ("--target-tensor-parallel-size", 1, "--target-pipeline-parallel-size", 1)
    printed = samples.to_hf(tmp_path / "mg", original, *V1, *tokenizer, "--params-dtype", "bf16", *one)
    assert "--target-tensor-parallel-size: no effect on a Hugging Face output" in printed
    samples.assert_same_weights(models["untied"], original / "mg2hf")
    samples.assert_same_weights(models["untied"], original)


def test_commands_of_its_successor(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["untied"], tmp_path / "mg", *V2, *TP2_PP2)
    (tmp_path / "mg" / "config.json").unlink()
    samples.to_hf(tmp_path / "mg", tmp_path / "hf", *V2, "--hf-cfg-dir", models["untied"])
    samples.assert_same_weights(models["untied"], tmp_path / "hf")
    # Without any config.json, what the checkpoint's own arguments say.
    samples.to_hf(tmp_path / "mg", tmp_path / "hf2")
    samples.assert_same_weights(models["untied"], tmp_path / "hf2")


def edit(folder: Path, change) -> None:
    """Save the files of a checkpoint again, with other contents."""
    for path in folder.glob("iter_*/*/model_optim_rng.pt"):
        file = PtFile(path)
        data: list[np.ndarray] = []

        def announce(value, file=file, data=data):
            from qwen3_npu.checkpoint.binary.pickles import TensorRef
            from qwen3_npu.checkpoint.binary.torch_zip_write import Tensor

            if isinstance(value, TensorRef):
                data.append(file.read(value, value.shape, full(value.shape)))
                return Tensor(value.dtype, value.shape)
            return {k: announce(v) for k, v in value.items()} if isinstance(value, dict) else value

        content = announce(change(dict(file.content)))
        writer = PtWriter(path, content)
        for array in data:
            writer.write(array)
        writer.close()


def test_checkpoints_of_mindspeed_trainings(models: dict[str, Path], tmp_path: Path) -> None:
    """No num_key_value_heads (their own converter then writes half of q), no config, other arguments, files beside."""
    experts = ("--target-expert-parallel-size", 2, "--expert-tensor-parallel-size", 1)
    samples.to_mg(models["moe"], tmp_path / "mg", *TP2_PP2, *experts)

    def as_trained(content: dict) -> dict:
        args = content["args"]
        for name in ("num_key_value_heads", "expert_tensor_parallel_size", "norm_topk_prob", "bos_token_id"):
            delattr(args, name)
        args.noop_layers, args.vocab_size, args.lora_r, args.lora_alpha = set(), None, 16, 32
        args.padded_vocab_size = 250
        model = {**content["model"], "decoder.layers.0.self_attention.linear_qkv._extra_state": None}
        return content | {"model": model, "optimizer": {"param_groups": []}, "rng_state": [], "num_floating_point": 1.5}

    edit(samples.unsealed(tmp_path / "mg"), as_trained)
    (tmp_path / "mg" / "config.json").unlink()
    for folder in (tmp_path / "mg" / "iter_0000001").glob("mp_rank_*"):
        (folder / "distrib_optim.pt").write_bytes(b"not read")
    shutil.copytree(tmp_path / "mg" / "iter_0000001", tmp_path / "mg" / "iter_0000020")
    shutil.rmtree(tmp_path / "mg" / "iter_0000001" / "mp_rank_00_000_000")
    (tmp_path / "mg" / "latest_checkpointed_iteration.txt").write_text("20\n")
    samples.to_hf(tmp_path / "mg", tmp_path / "hf")
    samples.assert_same_weights(models["moe"], tmp_path / "hf")
    samples.ok(
        *("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", tmp_path / "mg"),
        *("--ckpt-step", 20, "--save-dir", tmp_path / "hf2"),
    )
    (tmp_path / "mg" / "iter_0000020").rename(tmp_path / "mg" / "release")
    (tmp_path / "mg" / "latest_checkpointed_iteration.txt").write_text("release")
    samples.to_hf(tmp_path / "mg", tmp_path / "hf3")
    samples.assert_same_weights(models["moe"], tmp_path / "hf3")


def test_dtypes(real_models: dict[str, Path], tmp_path: Path) -> None:
    import torch

    samples.to_mg(real_models["tied"], tmp_path / "mg", "--params-dtype", "bf16", *TP2_PP2)
    samples.to_hf(tmp_path / "mg", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    name = "model.layers.1.mlp.gate_proj.weight"
    original = torch.from_numpy(samples.weights(real_models["tied"])[name].view(np.float32))
    rounded = torch.from_numpy(samples.weights(tmp_path / "hf")[name].view(np.int16)).view(torch.bfloat16)
    assert torch.equal(original.to(torch.bfloat16), rounded)
    samples.to_hf(tmp_path / "mg", tmp_path / "hf32", "--params-dtype", "fp32")
    widened = torch.from_numpy(samples.weights(tmp_path / "hf32")[name].view(np.float32))
    assert torch.equal(rounded.float(), widened)


def test_how_prompts_were_written_goes_along(models: dict[str, Path], tmp_path: Path) -> None:
    """From a training's args to a merged model, an adapter and back; an older file of the output goes."""
    import torch

    said = {"prompt_type": "qwen3", "enable_thinking": "true", "tokenizer_digest": "1f" * 16}
    lora = Lora(4, 8.0, samples.ALL_TARGETS)
    samples.write_adapter(tmp_path / "peft", samples.ARCHS["untied"], lora, shared_a=True)
    base = ("--load-dir", models["untied"])
    mg = ("--save-model-type", "mg", "--hf-cfg-dir", models["untied"])
    samples.ok("--load-dir", tmp_path / "peft", "--load-model-type", "hf", *mg, "--save-dir", tmp_path / "lora")
    (file,) = (tmp_path / "lora").rglob("model_optim_rng.pt")
    content = torch.load(file, weights_only=False)
    vars(content["args"]).update(said, enable_thinking=True)
    torch.save(content, file)
    (file.parents[1] / "integrity.json").unlink()
    adapter = ("--load-model-type", "mg", "--load-dir", tmp_path / "lora", "--hf-cfg-dir", models["untied"])
    samples.ok(*adapter, "--save-model-type", "hf", "--save-lora-to-hf", "--save-dir", tmp_path / "exported")
    merged = (*base, "--lora-load", tmp_path / "exported", "--no-lora-check", "--params-dtype", "bf16")
    samples.ok(*merged, "--save-model-type", "hf", "--save-dir", tmp_path / "hf")
    for folder in ("exported", "hf"):
        assert json.loads((tmp_path / folder / "qwen3_npu_prompts.json").read_text()) == said
    samples.to_mg(tmp_path / "hf", tmp_path / "dist", "--ckpt-format", "torch_dist")
    samples.to_mg(tmp_path / "dist", tmp_path / "torch")
    (file,) = (tmp_path / "torch").rglob("model_optim_rng.pt")
    assert said.items() <= vars(torch.load(file, weights_only=False)["args"]).items()
    samples.to_mg(models["untied"], tmp_path / "silent")
    samples.to_hf(tmp_path / "silent", tmp_path / "hf", "--overwrite")
    assert not (tmp_path / "hf" / "qwen3_npu_prompts.json").exists()
    (tmp_path / "exported" / "qwen3_npu_prompts.json").write_text(json.dumps({**said, "system": "x"}))
    line = samples.refused(*merged, "--save-dir", tmp_path / "no")
    assert "qwen3_npu_prompts.json: 'system' is not understood" in line
