"""LoRA computes what peft computes, in every layout; QLoRA what LoRA computes on restored weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llama
import tiny
from apart import experts_apart
from plain import (
    FLAGS,
    STEPS,
    VARIABLE,
    check,
    plain_loop,
    write_restored,
    write_some_adapters,
)
from qwen3_npu.args.convert import ConvertArgs, LegacyConvertArgs, LoraConvertArgs, TargetArgs
from qwen3_npu.checkpoint.convert.run import convert
from qwen3_npu.parity.rows import CHUNKS, EP2, ETP1, FULL, HIDDEN, PER_DOCUMENT, PP2, RING, SP, TP2, VPP, ZERO
from worlds import World

RANK, ALPHA = 4, 8
LORA = ["--lora-r", str(RANK), "--lora-alpha", str(ALPHA)]


def with_magnitudes(adapter: str, folder: Path) -> str:
    """The same with DoRA."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    rng = np.random.default_rng(4)
    for name in [name for name in tensors if "lora_B" in name]:
        lengths = 1 + rng.random(len(tensors[name]), np.float32)
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = lengths
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kind of model -> a PEFT adapter: A's of one linear are equal, B's are not zero."""
    from safetensors.numpy import save_file

    from qwen3_npu.args.lora import LORA_TARGETS
    from qwen3_npu.checkpoint.mapping.lora import Lora, peft_shapes

    with llama.registered() as outside:
        archs = {kind: tiny.arch(kind) for kind in ("untied", "moe", "few", "qwen2")} | {"llama": outside}
        shapes = {kind: peft_shapes(arch, Lora(RANK, ALPHA, tuple(LORA_TARGETS))) for kind, arch in archs.items()}
    made = {}
    for kind in archs:
        folder = tmp_path_factory.mktemp(f"adapter-{kind}")
        rng = np.random.default_rng(3)
        tensors: dict[str, np.ndarray] = {}
        siblings = {projection: names[0] for names in LORA_TARGETS.values() for projection in names}
        for name, shape in shapes[kind].items():
            projection = name.split(".")[-3]
            first = name.replace(f".{projection}.", f".{siblings[projection]}.")
            if ".lora_A." in name and first in tensors:
                tensors[name] = tensors[first]
            else:
                size = 0.1 if ".lora_B." in name else 1.0
                tensors[name] = (size * rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
        save_file(tensors, folder / "adapter_model.safetensors")
        modules = [projection for names in LORA_TARGETS.values() for projection in names]
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
        config |= {"bias": "none", "target_modules": modules, "base_model_name_or_path": models[kind]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        made[kind] = str(folder)
    rs = tmp_path_factory.mktemp("adapter-rs")
    shutil.copytree(made["untied"], rs, dirs_exist_ok=True)
    config = json.loads((rs / "adapter_config.json").read_text())
    (rs / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    dora = with_magnitudes(made["untied"], tmp_path_factory.mktemp("adapter-dora"))
    some, some_dora = (str(tmp_path_factory.mktemp("adapter-some")) for _ in range(2))
    write_some_adapters(models["untied"], some, r=RANK, lora_alpha=ALPHA)
    write_some_adapters(models["untied"], some_dora, r=RANK, lora_alpha=ALPHA, use_dora=True)
    named = {"untied rs": str(rs), "untied some": some, "untied some dora": some_dora, "untied dora": dora}
    return {**made, **named, "moe dora": with_magnitudes(made["moe"], tmp_path_factory.mktemp("adapter-moe-dora"))}


@pytest.fixture(scope="module")
def peft_loop(models: dict[str, str], data: dict[str, str], adapters: dict[str, str]) -> Any:
    """Form of data, kind of model -> what peft on transformers computes with the same A and B."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    from transformers import AutoModelForCausalLM

    known: dict[tuple[str, str], dict[str, Any]] = {}

    def compute(form: str, kind: str) -> dict[str, Any]:
        if (form, kind) not in known:
            base = AutoModelForCausalLM.from_pretrained(models[kind.split()[0]], dtype=torch.float32)
            base = experts_apart(base) if kind.startswith("moe") else base
            model = peft.PeftModel.from_pretrained(base, adapters[kind], is_trainable=True)
            shared = []
            for layer in model.base_model.model.model.layers:
                a, mlps = layer.self_attn, getattr(layer.mlp, "experts", [layer.mlp])
                for linears in ((a.q_proj, a.k_proj, a.v_proj), *((m.gate_proj, m.up_proj) for m in mlps)):
                    shared.append([one.lora_A["default"].weight for one in linears if hasattr(one, "lora_A")])
            known[form, kind] = plain_loop(model, data[form], shared)
        return known[form, kind]

    return compute


SOME = ["--lora-target-modules", "embedding", "output", r"decoder\.layers\.[13]\..*linear_qkv"]
EXPERTS = ["--moe-aux-loss-coeff", "0"]
LORA_LAYOUTS = {
    "one process": (1, "single", []),
    "one process, packed": (1, "packed", PER_DOCUMENT),
    "TP2 SP PP2, dynamic lengths": (4, "single", TP2 + SP + PP2 + VARIABLE),
    "TP2 PP2 VPP2, packed": (4, "packed", TP2 + PP2 + VPP + PER_DOCUMENT),
    "DP2 distributed optimizer": (2, "single", ZERO),
    "CP2 ring": (2, "single", RING),
    "Qwen2.5, TP2 SP PP2": (4, "single", TP2 + SP + PP2 + VARIABLE, "qwen2"),
    "Llama, TP2 PP2": (4, "single", TP2 + PP2 + VARIABLE, "llama"),
    "TP4 SP of 2 KV heads": (4, "single", ["--tensor-model-parallel-size", "4", *SP, *VARIABLE], "few"),
    "rsLoRA": (1, "single", ["--use-rslora"], "untied rs"),
    "embedding, output layer and some layers, TP2, chunked": (2, "single", SOME + TP2 + CHUNKS, "untied some"),
    "DoRA of embedding, output layer and some layers, TP2 SP PP2, chunked": (
        4,
        "single",
        ["--use-dora", *SOME, *TP2, *SP, *PP2, *CHUNKS],
        "untied some dora",
    ),
    "experts, EP2, exchange hidden": (2, "single", EXPERTS + EP2 + HIDDEN, "moe"),
    "DoRA of experts, TP2 SP PP2": (4, "single", ["--use-dora", *EXPERTS, *TP2, *SP, *PP2], "moe dora"),
    "DoRA of experts, TP2 SP EP2 ETP1 distributed optimizer": (
        4,
        "single",
        ["--use-dora", *EXPERTS, *TP2, *SP, *EP2, *ETP1, *ZERO, *FULL],
        "moe dora",
    ),
    "DoRA, full recompute": (1, "single", ["--use-dora", *FULL], "untied dora"),
    "DoRA, TP2 SP PP2": (4, "single", ["--use-dora", *TP2, *SP, *PP2], "untied dora"),
    "full recompute": (1, "single", FULL),
    "full recompute, TP2 SP PP2": (4, "single", FULL + TP2 + SP + PP2),
    "recomputed MLP": (1, "single", ["--recompute-granularity", "selective", "--recompute-modules", "mlp"]),
    "recomputed activation and norms": (1, "single", ["--recompute-activation-function", "--recompute-norm"]),
}


@pytest.mark.parametrize("name", LORA_LAYOUTS)
def test_lora_equals_peft(
    name: str,
    worlds: dict[int, World],
    models: dict[str, str],
    data: dict[str, str],
    adapters: dict[str, str],
    peft_loop: Any,
    tmp_path: Path,
) -> None:
    size, form, extra, *others = LORA_LAYOUTS[name]
    kind = others[0] if others else "untied"
    expected = peft_loop(form, kind)
    base = models[kind.split()[0]]
    flags = [*FLAGS, *LORA, "--load", base, "--lora-load", adapters[kind], "--data-path", data[form]]
    gradients = tmp_path / "gradients.npz"
    got = worlds[size].run("gradients", flags=flags + extra, steps=3, file=str(gradients))
    assert got["frozen"]
    assert not got["changed"]
    check(got, expected, gradients, lambda name: name.replace(".default", "").replace("vector.weight", "vector"))


MUON = ["--optimizer", "muon", "--muon-extra-scale-factor", "0.2"]


def test_muon_updates_adapters_as_torch_does_those_of_peft(
    worlds: dict[int, World], models: dict[str, str], data: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    """To the rounding of torch's iteration, which is in bfloat16. Gate and up are one matrix here, so not of them."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    from safetensors.numpy import load_file, save_file
    from transformers import AutoModelForCausalLM

    tensors = load_file(Path(adapters["untied"], "adapter_model.safetensors"))
    save_file(
        {n: t for n, t in tensors.items() if "gate" not in n and "up_" not in n}, tmp_path / "adapter_model.safetensors"
    )
    config = json.loads(Path(adapters["untied"], "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
    attentions = [layer.self_attn for layer in model.base_model.model.model.layers]
    shared = [[getattr(a, f"{x}_proj").lora_A["default"].weight for x in "qkv"] for a in attentions]
    expected = plain_loop(model, data["single"], shared, muon=True)["loss"]
    flags = [*FLAGS, *LORA, *MUON, "--load", models["untied"], "--data-path", data["single"]]
    flags += ["--lora-load", str(tmp_path)]
    flags += ["--lora-target-modules", "linear_qkv", "linear_proj", "linear_fc2"]
    got = worlds[4].run("train", flags=[*flags, *TP2, *SP, *ZERO], steps=STEPS)["loss"]
    assert got == pytest.approx(expected, abs=0.01 * abs(expected[-1] - expected[0]))
    assert abs(expected[-1] - expected[0]) > 0.02, "hardly an update: the comparison says little"


def test_muon_on_adapters_of_experts_equals_one_process(
    worlds: dict[int, World], models: dict[str, str], data: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    """And goes on in another layout."""
    flags = [*FLAGS, *LORA, *MUON, "--load", models["moe"], "--data-path", data["single"]]
    flags += ["--lora-load", adapters["moe"]]
    alone = worlds[1].run("train", flags=flags, steps=STEPS)["loss"]
    layout = [*TP2, *SP, *EP2, *ETP1, *ZERO, "--save", str(tmp_path), "--lora-ckpt-filter"]
    many = worlds[4].run("train", flags=[*flags, *layout], steps=STEPS - 1)["loss"]
    assert many == pytest.approx(alone[:-1], rel=1e-5)
    again = [*flags[:-1], str(tmp_path), *EP2, *ZERO]
    assert worlds[2].run("train", flags=again, steps=1)["loss"] == pytest.approx(alone[-1:], rel=1e-5)


PISSA = {
    "dense": ("untied", [*TP2, *SP, *PP2], ["--lora-ckpt-filter"]),
    "experts": ("moe", [*TP2, *SP, *EP2, *ETP1], []),
}


@pytest.mark.parametrize("name", PISSA)
def test_pissa_is_the_same_in_every_layout_and_becomes_lora_in_peft(
    name: str, worlds: dict[int, World], models: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    """A checkpoint resumes, with the base that PiSSA has changed or from the adapter alone."""
    kind, extra, more = PISSA[name]
    flags = [*FLAGS, *LORA, "--load", models[kind], "--data-path", data["single"], "--lora-init", "pissa"]
    flags += ["--use-rslora"] if name == "dense" else []
    alone = worlds[1].run("train", flags=flags, steps=3)["loss"]
    many = worlds[4].run("train", flags=[*flags, *extra, *more, "--save", str(tmp_path / "mg")], steps=2)["loss"]
    assert many == pytest.approx(alone[:2], rel=1e-5)
    again = [*flags, *more, "--lora-load" if more else "--load", str(tmp_path / "mg")]
    assert worlds[1].run("train", flags=again, steps=1)["loss"] == pytest.approx(alone[2:], rel=1e-5)
    exported = logits_in_peft(models[kind], write(tmp_path / "mg", tmp_path / "peft", save_lora_to_hf=True))
    if more:
        merged = write(models[kind], tmp_path / "hf", lora_load=str(tmp_path / "mg"))
    else:
        merged = write(tmp_path / "mg", tmp_path / "hf")
    assert np.abs(exported - logits_in_peft(merged)).max() < 1e-5
    assert np.abs(exported - logits_in_peft(models[kind])).max() > 1e-3, "the training matters"


def write(source: Any, folder: Path, **lora: Any) -> Path:
    """convert_ckpt.py to Hugging Face or PEFT, compared on disk."""
    kind = "hf" if (Path(source) / "model.safetensors").exists() else "mg"
    args = ConvertArgs(
        load_model_type=kind, save_model_type="hf", load_dir=str(source), save_dir=str(folder), verify=True
    )
    convert(args, TargetArgs(), LoraConvertArgs(**lora), LegacyConvertArgs())
    return folder


def logits_in_peft(base: Any, adapter: Path | None = None) -> np.ndarray:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(torch.tensor([[3, 14, 15, 92, 65, 35], [1, 2, 3, 5, 8, 13]])).logits.numpy()


def test_pissa_on_a_base_in_4_bits_trains_what_is_left_of_it(
    worlds: dict[int, World], models: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    """QPiSSA (arXiv:2404.02948): what torch's SVD leaves of each weight, as bitsandbytes restores it, and A and B.

    In float64: a residual that is rounded otherwise has other codes in 4 bits here and there.
    """
    from safetensors.torch import load_file, save_file

    base = tiny.write_model(tmp_path / "base", tiny.arch("untied", intermediate_size=128))
    tensors, adapter, scale = load_file(base / "model.safetensors"), {}, ALPHA / RANK
    for name in [n for n in tensors if n.endswith(("o_proj.weight", "down_proj.weight"))]:
        u, values, v = torch.linalg.svd(tensors[name].double(), full_matrices=False)
        roots = (values[:RANK] / scale).sqrt()
        a, b = (roots[:, None] * v[:RANK]).float(), (u[:, :RANK] * roots).float()
        tensors[name] = (tensors[name].double() - scale * (b.double() @ a.double())).float()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{stem}.lora_A.weight": a.contiguous(), f"{stem}.lora_B.weight": b.contiguous()}
    shutil.copytree(base, tmp_path / "rest")
    save_file(tensors, tmp_path / "rest" / "model.safetensors")
    write_restored(tmp_path / "rest", tmp_path / "restored", ends=False, double=False)
    (tmp_path / "start").mkdir()
    save_file(adapter, tmp_path / "start" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["o_proj", "down_proj"]}
    (tmp_path / "start" / "adapter_config.json").write_text(json.dumps(config))
    flags = [*FLAGS, *LORA, "--lora-target-modules", "linear_proj", "linear_fc2", "--data-path", data["single"]]
    start = ["--load", str(tmp_path / "restored"), "--lora-load", str(tmp_path / "start")]
    expected = worlds[1].run("train", flags=[*flags, *start], steps=3)["loss"]
    ours = [*flags, "--load", str(base), "--qlora", "--lora-init", "pissa"]
    got = worlds[2].run("train", flags=[*ours, *TP2, *SP, "--save", str(tmp_path / "mg")], steps=2)["loss"]
    assert got == pytest.approx(expected[:2], rel=1e-5)
    again = worlds[1].run("train", flags=[*ours, "--lora-load", str(tmp_path / "mg")], steps=1)["loss"]
    assert again == pytest.approx(expected[2:], rel=1e-5)


QLORA = {
    "experts, scales in 8 bits, TP2 SP EP2, exchange hidden": (
        "moe",
        4,
        [*TP2, *SP, *EP2, *HIDDEN, "--qlora-double-quant"],
    ),
    "and the embedding, TP2 SP PP2, recomputed, chunked": (
        "untied",
        4,
        [*TP2, *SP, *PP2, *FULL, *CHUNKS, "--qlora-embedding", "--qlora-double-quant"],
    ),
    "and the tied embedding, PP2": ("tied", 2, [*PP2, "--qlora-embedding"]),
}


@pytest.mark.parametrize("name", QLORA)
def test_qlora_equals_lora_on_what_bitsandbytes_restores(
    name: str, worlds: dict[int, World], data: dict[str, str], tmp_path: Path
) -> None:
    """Losses and gradients; an adapter that is saved goes on in another layout."""
    kind, size, extra = QLORA[name]
    width = "moe_intermediate_size" if kind == "moe" else "intermediate_size"
    base = tiny.write_model(tmp_path / "base", tiny.arch(kind, **{width: 128}))
    double = "--qlora-double-quant" in extra
    write_restored(base, tmp_path / "restored", ends="--qlora-embedding" in extra, double=double)
    flags = [*FLAGS, *LORA, "--lora-init", "gaussian", "--data-path", data["single"]]
    files = [tmp_path / "expected.npz", tmp_path / "got.npz"]
    plain = [*flags, "--load", str(tmp_path / "restored")]
    # The adapter is random, so both start from one that was saved.
    worlds[1].run("train", flags=[*plain, "--lr", "0.02", "--save", str(tmp_path / "a"), "--lora-ckpt-filter"], steps=1)
    adapter = ["--lora-load", str(tmp_path / "a"), "--finetune"]
    expected = worlds[1].run("gradients", flags=[*plain, *adapter], steps=STEPS, file=str(files[0]))
    ours = [*flags, "--load", str(base), "--qlora", *extra]
    got = worlds[size].run("gradients", flags=[*ours, *adapter], steps=STEPS, file=str(files[1]))
    assert got["frozen"]
    assert not got["changed"]
    check(got, {**expected, "gradients": dict(np.load(files[0]))}, files[1])
    if kind == "untied":
        worlds[size].run("train", flags=[*ours, *adapter, "--save", str(tmp_path / "b")], steps=3)
        again = [*flags, "--load", str(base), "--lora-load", str(tmp_path / "b")]
        again += [flag for flag in ours if flag.startswith("--qlora")]
        assert worlds[1].run("train", flags=again, steps=1)["loss"] == pytest.approx(got["loss"][3:], rel=1e-5)


def test_lora_resumes(worlds: dict[int, World], models: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    """Updates alone are small; they and the optimizer go on in another layout; frozen weights never change."""
    flags = [*FLAGS, *LORA, "--load", models["tied"], "--data-path", data["single"], "--train-iters", "20"]
    save, whole_save = tmp_path / "updates", tmp_path / "whole"
    whole = worlds[1].run("gradients", flags=flags, steps=5, file=str(tmp_path / "g.npz"))
    assert not whole["changed"]
    worlds[1].run("train", flags=[*flags, "--save", str(save), "--lora-ckpt-filter"], steps=3)
    worlds[1].run("train", flags=[*flags, "--save", str(whole_save)], steps=3)
    dist = ["--save", str(tmp_path / "dist"), "--lora-ckpt-filter", "--ckpt-format", "torch_dist", "--async-save"]
    worlds[1].run("train", flags=[*flags, *dist], steps=3)
    sizes = [next(folder.glob("iter_*/mp_rank_*/model_optim_rng.pt")).stat().st_size for folder in (save, whole_save)]
    assert sizes[0] < 0.4 * sizes[1]
    for updates in (save, tmp_path / "dist"):
        again = worlds[1].run("train", flags=[*flags, "--lora-load", str(updates)], steps=2)
        assert again["loss"] == whole["loss"][3:5]
    again = worlds[1].run("train", flags=[*flags, "--load", str(whole_save)], steps=2)
    assert again["loss"] == whole["loss"][3:5]
    for updates in (save, tmp_path / "dist"):
        again = worlds[4].run("train", flags=[*flags, *TP2, *PP2, "--lora-load", str(updates)], steps=2)
        assert again["loss"] == pytest.approx(whole["loss"][3:5], rel=1e-5)
