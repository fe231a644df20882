"""Fine-tuning computes what a plain loop over transformers and torch computes, document by document, unpadded."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llama
import tiny
from plain import (
    EPS,
    FLAGS,
    LONGEST,
    LR,
    MICRO2,
    STEPS,
    VARIABLE,
    document_loss,
    documents,
    unstacked,
    write_some_adapters,
)
from qwen3_npu.parity.measure import largest_difference
from qwen3_npu.parity.rows import CHUNKS, EP2, ETP1, FULL, PER_DOCUMENT, PP2, RING, SP, TP2, ULYSSES, VPP, ZERO
from worlds import World


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Form -> prefix."""
    root = tmp_path_factory.mktemp("instructions")
    return {
        "single": str(tiny.write_instructions(root / "single")),
        "packed": str(tiny.write_instructions(root / "packed", pack=LONGEST)),
    }


def plain_loop(model: Any, prefix: str, shared: Sequence[Sequence[torch.nn.Parameter]] = ()) -> dict[str, Any]:
    """Train a transformers model. `shared`: groups of parameters that are one, so that their gradients are summed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim == 1]}]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS, weight_decay=0.01)
    losses, norms, gradients = [], [], {}
    for step in documents(prefix):
        optimizer.zero_grad()
        flat = [document for sample in step for document in sample]
        tokens = sum(label != -100 for _, labels in flat for label in labels[1:])
        total = 0.0
        for document in flat:
            loss = document_loss(model, document) / tokens
            loss.backward()
            total += loss.item()
        for group in shared:
            together = sum(p.grad for p in group)
            for p in group:
                p.grad = together.clone()
        same = {id(p) for group in shared for p in group[1:]}
        norms.append(sum(p.grad.square().sum() for p in trained if id(p) not in same).sqrt().item())
        losses.append(total)
        if not gradients:
            gradients = {name: p.grad.clone().numpy() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    return {"loss": losses, "grad_norm": norms, "gradients": gradients}


def check(got: dict[str, Any], expected: dict[str, Any], gradients: Path, rename: Any = lambda name: name) -> None:
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    wanted = unstacked({rename(name): gradient for name, gradient in expected["gradients"].items()})
    assert all(np.abs(gradient).max() > 0 for gradient in wanted.values())
    difference, where = largest_difference(dict(np.load(gradients)), wanted)
    assert difference <= 1e-5, where


@pytest.fixture(scope="module")
def plain(models: dict[str, str], data: dict[str, str]) -> Any:
    """(kind of model, form of data) -> what the plain loop computes; each once."""
    from transformers import AutoModelForCausalLM

    known: dict[tuple[str, str], dict[str, Any]] = {}

    def compute(kind: str, form: str) -> dict[str, Any]:
        if (kind, form) not in known:
            model = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32)
            known[kind, form] = plain_loop(model, data[form])
        return known[kind, form]

    return compute


SFT = {
    "single, padded": ("untied", "single", 1, []),
    "single, dynamic lengths, micro-batches of 2": ("untied", "single", 1, VARIABLE + MICRO2),
    "single, dynamic, TP2 SP PP2": ("tied", "single", 4, VARIABLE + MICRO2 + TP2 + SP + PP2),
    "single, padded, TP2 PP2": ("untied", "single", 4, TP2 + PP2),
    "single, dynamic, PP2 VPP2": ("untied", "single", 2, VARIABLE + PP2 + VPP),
    "single, dynamic, DP2 distributed optimizer": ("tied", "single", 2, VARIABLE + MICRO2 + ZERO),
    "single, dynamic, CP2 ring": ("untied", "single", 2, VARIABLE + RING),
    "single, dynamic, CP2 ulysses TP2 SP": ("untied", "single", 4, VARIABLE + ULYSSES + TP2 + SP),
    "single, chunked loss": ("untied", "single", 1, CHUNKS),
    "packed": ("untied", "packed", 1, PER_DOCUMENT),
    "packed, positions spelling, micro-batches of 2": ("untied", "packed", 1, ["--reset-position-ids", *MICRO2]),
    "packed, reference kernels": ("untied", "packed", 1, [*PER_DOCUMENT, "--kernels", "reference"]),
    "packed, TP2 SP PP2": ("tied", "packed", 4, PER_DOCUMENT + TP2 + SP + PP2),
    "packed, PP2 VPP2": ("untied", "packed", 2, PER_DOCUMENT + MICRO2 + PP2 + VPP),
    "packed, dynamic, PP2": ("untied", "packed", 2, PER_DOCUMENT + VARIABLE + PP2),
    "packed, CP2 ring": ("untied", "packed", 2, PER_DOCUMENT + RING),
    "packed, CP2 ulysses": ("untied", "packed", 2, PER_DOCUMENT + ULYSSES),
    "packed, CP2 ring PP2": ("untied", "packed", 4, PER_DOCUMENT + RING + PP2),
    "Qwen2.5, packed, TP2 SP PP2": ("qwen2", "packed", 4, PER_DOCUMENT + TP2 + SP + PP2),
    "Qwen2.5, dynamic, DP2 distributed optimizer": ("qwen2", "single", 2, VARIABLE + ZERO),
    "Llama, TP2 PP2": ("llama", "single", 4, VARIABLE + TP2 + PP2),
    "YaRN, packed, CP2 ring TP2 SP": ("yarn", "packed", 4, PER_DOCUMENT + RING + TP2 + SP),
    "YaRN, packed, CP2 ulysses": ("yarn", "packed", 2, PER_DOCUMENT + ULYSSES),
    "YaRN, dynamic, PP2 VPP2": ("yarn", "single", 2, VARIABLE + PP2 + VPP),
    "TP4 SP of 2 KV heads, packed": ("few", "packed", 4, ["--tensor-model-parallel-size", "4", *SP, *PER_DOCUMENT]),
    "moe, packed": ("moe", "packed", 1, PER_DOCUMENT),
    "moe, dynamic, EP2": ("moe", "single", 2, VARIABLE + EP2),
    "moe, packed, TP2 SP EP2": ("moe", "packed", 4, PER_DOCUMENT + TP2 + SP + EP2),
}


@pytest.mark.parametrize("name", SFT)
def test_full_fine_tuning_equals_a_plain_loop(
    name: str, worlds: dict[int, World], models: dict[str, str], data: dict[str, str], plain: Any, tmp_path: Path
) -> None:
    kind, form, size, extra = SFT[name]
    flags = [*FLAGS, "--load", models[kind], "--data-path", data[form], *extra]
    flags += ["--moe-aux-loss-coeff", "0"] if kind == "moe" else []
    gradients = tmp_path / "gradients.npz"
    got = worlds[size].run("gradients", flags=flags, steps=STEPS, file=str(gradients))
    expected = plain(kind, form)
    assert expected["loss"][-1] < expected["loss"][0] - 0.1, "the reference does not learn; the comparison says little"
    check(got, expected, gradients)


FROZEN = {
    # Full recomputation of layers whose input has no gradient, and a layer that is frozen as a whole.
    "full recompute": ("untied", 1, FULL, ["model.embed_tokens.*", "model.layers.0.*", "*layernorm*"], []),
    # Nothing is trained on the first stage; the embedding is tied, so the output layer is frozen, too.
    "TP2 SP PP2 distributed optimizer": ("tied", 4, [*TP2, *SP, *PP2, *ZERO], [], ["*.[23].self_attn.*", "*.3.mlp*"]),
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_part_of_the_weights_is_trained_as_by_a_plain_loop(
    name: str, worlds: dict[int, World], models: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    kind, size, extra, include, exclude = FROZEN[name]
    model = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        is_in, is_out = (
            any(fnmatch.fnmatch(parameter_name, pattern) for pattern in patterns) for patterns in (include, exclude)
        )
        parameter.requires_grad_(is_out or not (is_in or exclude))
    expected = plain_loop(model, data["single"])
    flags = [*FLAGS, "--load", models[kind], "--data-path", data["single"]]
    for flag, patterns in (("--freeze-include", include), ("--freeze-exclude", exclude)):
        flags += [flag, *patterns] if patterns else []
    gradients = tmp_path / "gradients.npz"
    got = worlds[size].run("gradients", flags=[*flags, *extra], steps=STEPS, file=str(gradients))
    assert got["frozen"]
    assert not got["changed"]
    check(got, expected, gradients)
    # It resumes from a checkpoint that holds every weight and the state of the trained ones.
    save = ["--save", str(tmp_path / "save"), "--ckpt-format", "torch_dist" if size > 1 else "torch"]
    worlds[size].run("train", flags=[*flags, *extra, *save], steps=3)
    again = worlds[1].run("train", flags=[*flags, "--load", str(tmp_path / "save")], steps=1)
    assert again["loss"] == pytest.approx(got["loss"][3:], rel=1e-5)


def test_micro_batch_normalization(
    worlds: dict[int, World], models: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    """The mean of the micro-batches' means, for any way of cutting."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32)
    samples = documents(data["single"])[0]
    means = [
        sum(document_loss(model, d) for d in sample) / sum(x != -100 for _, labels in sample for x in labels[1:])
        for sample in samples
    ]
    loss = sum(means) / len(means)
    loss.backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
    flags = [*FLAGS, "--load", models["untied"], "--data-path", data["single"], "--loss-normalization", "micro-batch"]
    for size, extra in ((1, []), (2, ZERO), (2, RING), (2, [*PP2, *VARIABLE])):
        got = worlds[size].run("train", flags=flags + extra, steps=1)
        assert got["loss"][0] == pytest.approx(loss.item(), rel=1e-5)
        assert got["grad_norm"][0] == pytest.approx(norm, rel=1e-5)


ISOLATION = {"PP2": (2, PP2), "PP2 VPP2": (2, PP2 + VPP)}


@pytest.mark.parametrize("name", ISOLATION)
def test_documents_of_a_pack_do_not_see_each_other(
    name: str, worlds: dict[int, World], models: dict[str, str], data: dict[str, str]
) -> None:
    """On every pipeline stage and in every chunk."""
    size, extra = ISOLATION[name]
    flags = [*FLAGS, "--load", models["untied"], "--data-path", data["packed"], *PER_DOCUMENT, *extra]
    flags += ["--global-batch-size", "2"]
    everyone = worlds[size].run("packing_isolation", flags=flags, changed=1)
    layers = [differences for rank in everyone for differences in rank.values()]
    assert len(layers) == 4
    for differences in layers:
        assert differences[1] > 1e-4
        assert len(differences) > 2
        assert max(differences[:1] + differences[2:]) == 0.0


# LoRA


RANK, ALPHA = 4, 8
LORA = ["--lora-r", str(RANK), "--lora-alpha", str(ALPHA)]


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
    some = str(tmp_path_factory.mktemp("adapter-some"))
    write_some_adapters(models["untied"], some, r=RANK, lora_alpha=ALPHA)
    return {**made, "untied rs": str(rs), "untied some": some}


@pytest.fixture(scope="module")
def peft_loop(models: dict[str, str], data: dict[str, str], adapters: dict[str, str]) -> Any:
    """Form of data, kind of model -> what peft on transformers computes with the same A and B."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    from transformers import AutoModelForCausalLM

    known: dict[tuple[str, str], dict[str, Any]] = {}

    def compute(form: str, kind: str) -> dict[str, Any]:
        if (form, kind) not in known:
            base = AutoModelForCausalLM.from_pretrained(models[kind.split()[0]], dtype=torch.float32)
            model = peft.PeftModel.from_pretrained(base, adapters[kind], is_trainable=True)
            shared = []
            for layer in model.base_model.model.model.layers:
                a, m = layer.self_attn, layer.mlp
                for linears in ((a.q_proj, a.k_proj, a.v_proj), (m.gate_proj, m.up_proj)):
                    shared.append([one.lora_A["default"].weight for one in linears if hasattr(one, "lora_A")])
            known[form, kind] = plain_loop(model, data[form], shared)
        return known[form, kind]

    return compute


SOME = ["--lora-target-modules", "embedding", "output", r"decoder\.layers\.[13]\..*linear_qkv"]
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
    "embedding, output layer and some layers": (1, "single", [*SOME, *CHUNKS], "untied some"),
    "embedding, output layer and some layers, TP2 SP PP2": (4, "single", SOME + TP2 + SP + PP2, "untied some"),
    "embedding, output layer and some layers, TP2, chunked": (2, "single", SOME + TP2 + CHUNKS, "untied some"),
    "embedding, output layer and some layers, TP2 SP, chunked": (2, "single", SOME + TP2 + SP + CHUNKS, "untied some"),
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
    got = worlds[size].run("gradients", flags=flags + extra, steps=STEPS, file=str(gradients))
    assert got["frozen"]
    assert not got["changed"]
    check(got, expected, gradients, lambda name: name.replace(".default", ""))


MOE_LORA = {
    "TP2 SP PP2": (4, TP2 + SP + PP2),
    "EP2": (2, EP2),
    "TP2 SP EP2 ETP1 distributed optimizer": (4, TP2 + SP + EP2 + ETP1 + ZERO),
}


@pytest.fixture(scope="module")
def moe_lora(
    worlds: dict[int, World],
    models: dict[str, str],
    data: dict[str, str],
    adapters: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """One process's LoRA of a MoE model."""
    gradients = tmp_path_factory.mktemp("moe-lora") / "gradients.npz"
    flags = [*FLAGS, *LORA, "--load", models["moe"], "--lora-load", adapters["moe"], "--data-path", data["single"]]
    got = worlds[1].run("gradients", flags=flags, steps=STEPS, file=str(gradients))
    return {**got, "flags": flags, "gradients": dict(np.load(gradients))}


@pytest.mark.parametrize("name", MOE_LORA)
def test_lora_of_experts_equals_one_process(
    name: str, worlds: dict[int, World], moe_lora: dict[str, Any], tmp_path: Path
) -> None:
    size, extra = MOE_LORA[name]
    gradients = tmp_path / "gradients.npz"
    got = worlds[size].run("gradients", flags=moe_lora["flags"] + extra, steps=STEPS, file=str(gradients))
    assert not got["changed"]
    check(got, moe_lora, gradients)


def test_lora_resumes(worlds: dict[int, World], models: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    """Updates alone are small; they and the optimizer go on in another layout; frozen weights never change."""
    flags = [*FLAGS, *LORA, "--load", models["tied"], "--data-path", data["single"], "--train-iters", "20"]
    save, whole_save = tmp_path / "updates", tmp_path / "whole"
    whole = worlds[1].run("gradients", flags=flags, steps=20, file=str(tmp_path / "g.npz"))
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
