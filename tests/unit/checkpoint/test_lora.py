"""LoRA: what `peft` computes with an adapter, merged and exported weights compute; names and shapes are known ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import samples

from qwen3_npu.checkpoint.binary.dtypes import F32
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile
from qwen3_npu.checkpoint.convert.jobs import run_jobs
from qwen3_npu.checkpoint.convert.output import MegatronOutput
from qwen3_npu.checkpoint.formats.open import open_checkpoint
from qwen3_npu.checkpoint.formats.torch_write import Target
from qwen3_npu.checkpoint.mapping.lora import Lora, peft_shapes
from qwen3_npu.checkpoint.mapping.source import Contents
from qwen3_npu.distributed.layout import plan

TP2_PP2 = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)
EP2 = ("--target-expert-parallel-size", 2)
LORA = Lora(4, 8.0, samples.ALL_TARGETS)
FLAGS = ("--lora-r", 4, "--lora-alpha", 8, "--lora-target-modules", *samples.ALL_TARGETS)
KINDS = tuple(samples.ARCHS)


def layout_flags(kind: str) -> tuple:
    return TP2_PP2 + EP2 if kind == "moe" else TP2_PP2


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """(kind, whether the A's are shared) -> PEFT directory."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        (kind, shared): samples.write_adapter(root / f"{kind}{shared}", arch, LORA, shared_a=shared)
        for kind, arch in samples.ARCHS.items()
        for shared in (False, True)
    }


@pytest.fixture(scope="module")
def megatron_adapters(
    real_models: dict[str, Path], adapters: dict[tuple[str, bool], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Kind -> adapter as a Megatron checkpoint, TP2 PP2 (MoE: and EP2)."""
    root = tmp_path_factory.mktemp("megatron_adapters")
    for kind in KINDS:
        flags = ("--hf-cfg-dir", real_models[kind], *layout_flags(kind))
        samples.to_mg(adapters[kind, True], root / kind, *flags)
    return {kind: root / kind for kind in KINDS}


TOKENS = [[3, 14, 15, 92, 65, 35, 89, 79], [1, 2, 3, 5, 8, 13, 21, 34]]


def logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """What transformers (and peft) compute."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.fixture(scope="module")
def live(real_models: dict[str, Path], adapters: dict[tuple[str, bool], Path]) -> dict[tuple[str, bool], np.ndarray]:
    """(kind, shared) -> logits of base and adapter in peft; the adapter must matter."""
    found = {}
    for (kind, shared), adapter in adapters.items():
        found[kind, shared] = logits(real_models[kind], adapter)
        assert np.abs(found[kind, shared] - logits(real_models[kind])).max() > 0.05
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True], ids=["own A", "shared A"])
def test_merged_from_peft(
    kind: str, shared: bool, real_models: dict, adapters: dict, live: dict, tmp_path: Path
) -> None:
    merge = ("--load-dir", real_models[kind], "--lora-load", adapters[kind, shared])
    samples.ok("--save-model-type", "hf", "--save-dir", tmp_path / "hf", *merge, *FLAGS, "--verify")
    assert np.abs(logits(tmp_path / "hf") - live[kind, shared]).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_own_a_survives_the_way_through_megatron(
    kind: str, real_models: dict, adapters: dict, live: dict, tmp_path: Path
) -> None:
    samples.to_mg(adapters[kind, False], tmp_path / "lora", "--hf-cfg-dir", real_models[kind], *layout_flags(kind))
    assert open_checkpoint(tmp_path / "lora").contents.lora == Lora(12, 24.0, samples.ALL_TARGETS)
    merge = ("--load-dir", real_models[kind], "--lora-load", tmp_path / "lora")
    samples.ok("--save-model-type", "hf", "--save-dir", tmp_path / "hf", *merge)
    assert np.abs(logits(tmp_path / "hf") - live[kind, False]).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_merged_into_megatron(
    kind: str, ckpt_format: str, real_models: dict, megatron_adapters: dict, live: dict, tmp_path: Path
) -> None:
    samples.to_mg(
        real_models[kind], tmp_path / "base", "--target-tensor-parallel-size", 4, "--ckpt-format", ckpt_format
    )
    lora = ("--lora-load", megatron_adapters[kind], *FLAGS)
    printed = samples.to_mg(tmp_path / "base", tmp_path / "merged", *TP2_PP2, *lora, "--ckpt-format", ckpt_format)
    assert "LoRA check" in printed
    samples.to_hf(tmp_path / "merged", tmp_path / "hf")
    assert np.abs(logits(tmp_path / "hf") - live[kind, True]).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_exported_to_peft(
    kind: str, real_models: dict, adapters: dict, megatron_adapters: dict, live: dict, tmp_path
) -> None:
    samples.to_hf(megatron_adapters[kind], tmp_path, "--save-lora-to-hf", *FLAGS, "--verify")
    first, second = (samples.tensors(f / "adapter_model.safetensors") for f in (adapters[kind, True], tmp_path))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert np.abs(logits(real_models[kind], tmp_path) - live[kind, True]).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_resharded(kind: str, real_models: dict, adapters: dict, megatron_adapters: dict, tmp_path: Path) -> None:
    other = ("--target-tensor-parallel-size", 4, "--noop-layers", "0,1", "--target-pipeline-parallel-size", 2)
    other += (*EP2, "--expert-tensor-parallel-size", 2, "--no-moe-grouped-gemm") if kind == "moe" else ()
    samples.to_mg(adapters[kind, True], tmp_path / "a", *other, "--hf-cfg-dir", real_models[kind])
    samples.to_mg(megatron_adapters[kind], tmp_path / "b", *other)
    samples.to_mg(megatron_adapters[kind], tmp_path / "dist", *other, "--ckpt-format", "torch_dist")
    samples.to_mg(tmp_path / "dist", tmp_path / "c", *other)
    first = samples.digests(tmp_path / "a", "iter_*/**/*.pt")
    assert len(first) >= 8
    assert samples.digests(tmp_path / "b", "iter_*/**/*.pt") == first
    assert samples.digests(tmp_path / "c", "iter_*/**/*.pt") == first


class Both:
    """Base and adapter as one source, as a LoRA training holds them."""

    def __init__(self, base: Path, adapter: Path) -> None:
        self.base = open_checkpoint(base)
        self.arch = self.base.arch
        self.adapter = open_checkpoint(adapter, arch=self.arch)

    def _of(self, name: str):
        return self.adapter if name.startswith("base_model.") else self.base

    def dtype(self, name: str):
        return self._of(name).dtype(name)

    def read(self, name: str, region):
        return self._of(name).read(name, region)

    def close(self) -> None:
        self.base.close()
        self.adapter.close()


def unify(folder: Path, lora: Lora, base: Path, adapter: Path) -> None:
    source = Both(base, adapter)
    layout = plan(source.arch, tensor=2, pipeline=2, expert=2 if source.arch.is_moe else 1)
    output = MegatronOutput(folder, Target(Contents(source.arch, True, lora), layout, F32, F32), "torch")
    records = run_jobs(output.jobs, lambda: source, output.stage, plan="", workers=1, resume=False, what="test")
    output.finish(records)
    output.publish()
    output.commit()


@pytest.fixture(scope="module")
def unified(real_models: dict, adapters: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a checkpoint with base and adapter, as a LoRA training saves it by default."""
    root = tmp_path_factory.mktemp("unified")
    for kind in samples.ARCHS:
        unify(root / kind, LORA, real_models[kind], adapters[kind, True])
    return {kind: root / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_unified_checkpoints(kind: str, unified: dict, adapters: dict, live: dict, tmp_path: Path) -> None:
    samples.to_hf(unified[kind], tmp_path / "hf")
    assert np.abs(logits(tmp_path / "hf") - live[kind, True]).max() < 1e-5
    samples.to_mg(unified[kind], tmp_path / "merged", *FLAGS)
    samples.to_hf(tmp_path / "merged", tmp_path / "hf2")
    samples.assert_same_weights(tmp_path / "hf", tmp_path / "hf2")
    # Without --lora-r both are kept, in any layout and format.
    samples.to_mg(unified[kind], tmp_path / "kept", "--ckpt-format", "torch_dist", "--verify")
    assert open_checkpoint(tmp_path / "kept").contents == Contents(samples.ARCHS[kind], True, LORA)
    samples.to_mg(tmp_path / "kept", tmp_path / "again", *layout_flags(kind))
    expected = samples.digests(unified[kind], "iter_*/**/*.pt")
    assert samples.digests(tmp_path / "again", "iter_*/**/*.pt") == expected
    samples.to_hf(unified[kind], tmp_path / "peft", "--save-lora-to-hf")
    original = samples.digests(adapters[kind, True], "adapter_model.safetensors")
    assert samples.digests(tmp_path / "peft", "adapter_model.safetensors") == original


def test_an_adapter_beside_the_embedding_is_merged(real_models: dict, tmp_path: Path) -> None:
    """The embedding has another name there; the same adapter from PEFT gives the same model."""
    lora = Lora(4, 8.0, ("linear_qkv", "embedding", "output"))
    adapter = samples.write_adapter(tmp_path / "peft", samples.ARCHS["untied"], lora, shared_a=True)
    unify(tmp_path / "unified", lora, real_models["untied"], adapter)
    samples.to_hf(tmp_path / "unified", tmp_path / "merged", "--lora-r", 4, "--verify")
    flags = ("--load-dir", real_models["untied"], "--lora-load", adapter, "--save-model-type", "hf")
    samples.ok(*flags, "--save-dir", tmp_path / "expected")
    samples.assert_same_weights(tmp_path / "merged", tmp_path / "expected")


def stored(root: Path, folder: str) -> dict[str, tuple[int, ...]]:
    file = PtFile(root / "iter_0000001" / folder / "model_optim_rng.pt")
    return {name: tensor.shape for name, tensor in file.content["model"].items()}


def test_names_and_shapes_are_mindspeeds(megatron_adapters: dict, unified: dict) -> None:
    # hidden 64, 8 + 2 x 4 heads of 16, FFN 96; TP2; rank 4.
    layer = {
        "self_attention.linear_qkv.lora_A.default.weight": (4, 64),
        "self_attention.linear_qkv.lora_B.default.weight": (128, 4),
        "self_attention.linear_proj.lora_A.default.weight": (4, 64),
        "self_attention.linear_proj.lora_B.default.weight": (64, 4),
        "mlp.linear_fc1.lora_A.default.weight": (4, 64),
        "mlp.linear_fc1.lora_B.default.weight": (96, 4),
        "mlp.linear_fc2.lora_A.default.weight": (4, 48),
        "mlp.linear_fc2.lora_B.default.weight": (64, 4),
    }
    expected = {f"decoder.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert stored(megatron_adapters["untied"], "mp_rank_01_001") == expected
    both = stored(unified["untied"], "mp_rank_01_001")
    assert expected.items() <= both.items()
    assert both["decoder.layers.1.self_attention.linear_qkv.base_layer.weight"] == (128, 64)
    assert both["decoder.layers.1.input_layernorm.weight"] == (64,)
    assert "decoder.layers.1.self_attention.linear_qkv.weight" not in both
    args = PtFile(unified["untied"] / "iter_0000001" / "mp_rank_00_000" / "model_optim_rng.pt").content["args"]
    assert (args.lora_r, args.lora_alpha) == (4, 8)
    assert args.lora_target_modules == list(samples.ALL_TARGETS)

    # 4 of 8 experts here, FFN 32 cut over TP2.
    moe = stored(unified["moe"], "mp_rank_01_001_001")
    experts = {name: shape for name, shape in moe.items() if "layers.0.mlp.experts" in name}
    assert experts == {
        "decoder.layers.0.mlp.experts.weight1": (64, 4 * 32),
        "decoder.layers.0.mlp.experts.weight2": (4 * 16, 64),
        "decoder.layers.0.mlp.experts.weight1_lora_a": (64, 4 * 4),
        "decoder.layers.0.mlp.experts.weight1_lora_b": (4, 4 * 32),
        "decoder.layers.0.mlp.experts.weight2_lora_a": (4 * 16, 4),
        "decoder.layers.0.mlp.experts.weight2_lora_b": (4 * 4, 64),
    }


def test_the_memory_of_expert_adapters(unified: dict, adapters: dict) -> None:
    """weight1 (E, H, 2F) += scale * lora_a (E, H, r) @ lora_b (E, r, 2F): MindSpeed-LLM's merge, on one rank."""
    file = PtFile(unified["moe"] / "iter_0000001" / "mp_rank_01_000_001" / "model_optim_rng.pt")
    model = file.content["model"]

    def read(name: str, *view: int) -> np.ndarray:
        ref = model[f"decoder.layers.1.mlp.experts.{name}"]
        return file.read(ref, view, tuple((0, n) for n in view))

    delta1 = read("weight1_lora_a", 4, 64, 4) @ read("weight1_lora_b", 4, 4, 32)
    delta2 = read("weight2_lora_a", 4, 16, 4) @ read("weight2_lora_b", 4, 4, 64)
    peft = samples.tensors(adapters["moe", True] / "adapter_model.safetensors")
    for local, expert in enumerate(range(4, 8)):
        stem = f"base_model.model.model.layers.1.mlp.experts.{expert}."
        gate, up, down = (
            peft[f"{stem}{p}.lora_B.weight"] @ peft[f"{stem}{p}.lora_A.weight"]
            for p in ("gate_proj", "up_proj", "down_proj")
        )
        expected = np.concatenate([gate[16:], up[16:]]).T  # the second half of the FFN: TP rank 1
        np.testing.assert_allclose(delta1[local], expected, atol=1e-6)
        np.testing.assert_allclose(delta2[local], down[:, 16:].T, atol=1e-6)


def test_an_adapter_on_some_projections(real_models: dict, tmp_path: Path) -> None:
    lora = Lora(4, 8.0, ("linear_qkv",))
    adapter = samples.write_adapter(tmp_path / "qv", samples.ARCHS["untied"], lora, drop=("k_proj",))
    expected = logits(real_models["untied"], adapter)
    base = ("--save-model-type", "hf", "--load-dir", real_models["untied"])
    samples.ok(*base, "--lora-load", adapter, "--save-dir", tmp_path / "hf")
    assert np.abs(logits(tmp_path / "hf") - expected).max() < 1e-5
    samples.to_mg(adapter, tmp_path / "mg", "--hf-cfg-dir", real_models["untied"], *TP2_PP2)
    assert open_checkpoint(tmp_path / "mg").contents.lora == Lora(8, 16.0, ("linear_qkv",))
    samples.ok(*base, "--lora-load", tmp_path / "mg", "--save-dir", tmp_path / "hf2")
    assert np.abs(logits(tmp_path / "hf2") - expected).max() < 1e-5


def test_a_merge_is_rounded_once(models: dict, tmp_path: Path) -> None:
    """bf16 base, float32 sum: exactly round(float32(W) + scale * B @ A)."""
    import torch

    arch = samples.ARCHS["untied"]
    base = samples.write_floats(tmp_path / "base", arch, samples.BF16)
    adapter = samples.write_adapter(tmp_path / "adapter", arch, LORA)
    samples.ok("--save-model-type", "hf", "--load-dir", base, "--lora-load", adapter, "--save-dir", tmp_path / "hf")
    name = "model.layers.2.mlp.down_proj"
    peft = samples.tensors(adapter / "adapter_model.safetensors")
    a, b = (torch.from_numpy(peft[f"base_model.model.{name}.lora_{m}.weight"]) for m in "AB")
    weight = torch.from_numpy(samples.weights(base)[f"{name}.weight"].view(np.int16)).view(torch.bfloat16)
    expected = (weight.float() + 2.0 * b @ a).to(torch.bfloat16)
    got = samples.weights(tmp_path / "hf")[f"{name}.weight"].view(np.int16)
    assert (torch.from_numpy(got).view(torch.bfloat16) != expected).float().mean() < 1e-3  # the sums' order may differ


BAD = {
    "rank": (("--lora-r", 8), "--lora-r 8, but the adapter"),
    "alpha": (("--lora-alpha", 16), "--lora-alpha 16"),
    "targets": (("--lora-target-modules", "linear_qkv"), "--lora-target-modules linear_qkv"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_flag_that_contradicts_the_adapter(name: str, real_models: dict, megatron_adapters: dict, tmp_path) -> None:
    flags, message = BAD[name]
    base = ("--load-dir", real_models["untied"], "--save-model-type", "hf", "--save-dir", tmp_path / "out")
    assert message in samples.refused(*base, "--lora-load", megatron_adapters["untied"], *flags)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model(real_models: dict, adapters: dict, megatron_adapters: dict, tmp_path) -> None:
    base = ("--load-dir", real_models["untied"], "--save-dir", tmp_path / "out")
    assert "is for Qwen3 MoE" in samples.refused(*base, "--lora-load", megatron_adapters["moe"])
    assert "tensors not expected for Qwen3 dense" in samples.refused(*base, "--lora-load", adapters["moe", True])
    other = dataclasses.replace(samples.ARCHS["untied"], hidden_size=32)
    adapter = samples.write_adapter(tmp_path / "adapter", other, LORA)
    line = samples.refused(*base, "--lora-load", adapter)
    assert "have shapes" in line
    assert "hidden 64" in line


def test_what_cannot_be_done_with_adapters(
    real_models: dict, adapters: dict, megatron_adapters: dict, tmp_path
) -> None:
    out, mg = ("--save-dir", tmp_path / "out"), ("--load-model-type", "mg", "--save-model-type", "hf")
    assert "holds an adapter only" in samples.refused(*mg, "--load-dir", megatron_adapters["tied"], *out)
    line = samples.refused("--load-dir", real_models["tied"], *out, "--lora-r", 4)
    assert "holds no LoRA tensors" in line
    line = samples.refused("--load-dir", real_models["tied"], *out, "--lora-load", real_models["tied"])
    assert "holds a model and no LoRA tensors" in line
    line = samples.refused("--load-dir", adapters["tied", True], *out, "--lora-load", adapters["tied", True])
    assert "--hf-cfg-dir" in line
    line = samples.refused(
        "--load-dir", adapters["tied", True], *out, "--save-lora-to-hf", "--hf-cfg-dir", real_models["tied"]
    )
    assert "--save-model-type hf" in line


def test_peft_names() -> None:
    names = list(peft_shapes(samples.ARCHS["tied"], Lora(4, 8.0, ("linear_qkv",))))
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(names) == 4 * 3 * 2
