"""--verify uses nothing of what it proves: mistakes in the weight table and in the merge are found."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import torch

from qwen3_npu.checkpoint.binary.dtypes import BF16
from qwen3_npu.checkpoint.convert import plan, run
from qwen3_npu.checkpoint.formats import adapters, dist_keys, huggingface
from qwen3_npu.checkpoint.mapping import table
from qwen3_npu.checkpoint.mapping.lora import Lora, peft_name
from qwen3_npu.checkpoint.verify.adapters import PlainTensors
from qwen3_npu.distributed import layout

TP2_PP2 = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)
EP2 = ("--target-expert-parallel-size", 2)
Change = Callable[[pytest.MonkeyPatch], None]


def row_with(name: str, wrong: Callable[[Any, Sequence[str]], tuple]) -> Change:
    """The weight table with another rule for one tensor; `wrong` gets the right rule's answer."""

    def change(patch: pytest.MonkeyPatch) -> None:
        def rule_of(row: table.WeightRow) -> Callable[..., tuple]:
            return lambda at, hf: wrong(row.rule(at, hf), hf)

        rows = [dataclasses.replace(r, rule=rule_of(r)) if r.megatron == name else r for r in table.TABLE]
        assert any(a is not b for a, b in zip(rows, table.TABLE, strict=True))
        patch.setattr(table, "TABLE", tuple(rows))

    return change


def with_names(swap: Callable[[list], list]) -> Callable[[Any, Sequence[str]], tuple]:
    """The pieces in the same places, taken from other tensors of the same shapes."""

    def wrong(found: tuple, hf: Sequence[str]) -> tuple:
        shape, view, pieces = found
        other = dict(zip(hf, swap(list(hf)), strict=True))
        return shape, view, [dataclasses.replace(p, hf=other.get(p.hf, p.hf)) for p in pieces]

    return wrong


def shifted(found: tuple, hf: Sequence[str]) -> tuple:
    """The places of the first two pieces, which are of one size, exchanged."""
    shape, view, (first, second, *rest) = found
    swapped = [dataclasses.replace(first, target=second.target), dataclasses.replace(second, target=first.target)]
    return shape, view, [*swapped, *rest]


def padded_with_the_first(found: tuple, hf: Sequence[str]) -> tuple:
    shape, view, pieces = found
    return shape, view, [dataclasses.replace(p, source=((0, 1), p.source[1])) if p.padding else p for p in pieces]


def stages_exchanged(patch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **named: Any) -> layout.Layout:
        found = layout.plan(*args, **named)
        return dataclasses.replace(found, chunks=found.chunks[::-1])

    patch.setattr(run, "plan", wrong)


CHANGES: dict[str, tuple[str, Change]] = {
    "k and v exchanged": (
        "untied",
        row_with("self_attention.linear_qkv.weight", with_names(lambda names: [names[0], names[2], names[1]])),
    ),
    "gate and up exchanged": ("untied", row_with("mlp.linear_fc1.weight", with_names(lambda names: names[::-1]))),
    "padding of another row": ("tied", row_with("embedding.word_embeddings.weight", padded_with_the_first)),
    "stages exchanged": ("untied", stages_exchanged),
    "experts exchanged": ("moe", row_with("mlp.experts.weight2", shifted)),
    "gate and up of an expert exchanged": ("moe", row_with("mlp.experts.weight1", shifted)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_mistake_in_the_weight_table_is_found(
    name: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, change = CHANGES[name]
    change(monkeypatch)
    flags = (*TP2_PP2, "--padded-vocab-size", 300, *(EP2 if kind == "moe" else ()))
    ran = samples.run("--load-dir", models[kind], "--save-dir", tmp_path / "mg", *flags, "--verify")
    assert ran.code == 1, ran.out
    assert "differs: mp_rank_" in ran.out


@pytest.mark.parametrize("form", ["hf", "torch", "torch_dist"])
def test_a_dtype_that_cannot_hold_the_weights_is_found(
    form: str, real_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dtype for the whole model, as if --params-dtype were given."""
    monkeypatch.setattr(plan, "_dtypes", lambda *_: (BF16, BF16, {}))
    to = ("--save-model-type", "hf") if form == "hf" else ("--ckpt-format", form)
    ran = samples.run("--load-dir", real_models["tied"], "--save-dir", tmp_path / "out", *to, "--verify")
    assert ran.code == 1
    assert "is [64] bfloat16, not [64] float32" in ran.out


def test_tensors_that_a_reader_passes_over_are_found(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models["tied"], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    monkeypatch.setattr(huggingface, "check_tensors", lambda *_: None)
    ran = samples.run("--load-dir", samples.unsealed(tmp_path / "hf"), "--save-dir", tmp_path / "mg", "--verify")
    assert ran.code == 1
    assert "missing: model.layers.3.self_attn.o_proj.weight\n" in ran.out


def test_a_mistake_on_the_way_back_is_found(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples.to_mg(models["untied"], tmp_path / "mg", *TP2_PP2)
    _, change = CHANGES["k and v exchanged"]
    change(monkeypatch)
    mg = ("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", tmp_path / "mg")
    ran = samples.run(*mg, "--save-dir", tmp_path / "hf", "--verify")
    assert ran.code == 1
    assert "differs: model.safetensors: model.layers.2.self_attn.k_proj.weight\n" in ran.out


def test_a_mistake_in_the_places_of_torch_dist_is_found(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = dist_keys.layer_places
    monkeypatch.setattr(dist_keys, "layer_places", lambda at: {n: (p + 1) % 4 for n, p in places(at).items()})
    to_dist = ("--load-dir", models["moe"], "--ckpt-format", "torch_dist", *TP2_PP2, *EP2, "--verify")
    ran = samples.run(*to_dist, "--save-dir", tmp_path / "layers")
    assert ran.code == 1
    assert "differs: __0_0.distcp: decoder.layers.self_attention.linear_qkv.weight/1.0.0\n" in ran.out
    monkeypatch.undo()
    experts = dist_keys.local_experts
    monkeypatch.setattr(dist_keys, "local_experts", lambda at: (range(1 - experts(at)[0].start, 9), experts(at)[1]))
    assert samples.run(*to_dist, "--save-dir", tmp_path / "experts").code != 0


MERGES: dict[str, tuple[str, Change]] = {
    "scale": (
        "untied",
        lambda patch: patch.setattr(Lora, "scale", property(lambda self: 1.001 * self.alpha / self.r)),
    ),
    "B of the row above": (
        "untied",
        lambda patch: patch.setattr(
            adapters.MergedSource,
            "matrix",
            lambda self, *args, right=adapters.MergedSource.matrix: (
                np.roll(right(self, *args), 1, 0) if args[1] == "B" else right(self, *args)
            ),
        ),
    ),
    "one projection is forgotten": (
        "untied",
        lambda patch: patch.setattr(
            adapters.MergedSource,
            "is_adapted",
            lambda self, name, right=adapters.MergedSource.is_adapted: "v_proj" not in name and right(self, name),
        ),
    ),
    "experts of an adapter exchanged": (
        "moe",
        lambda patch: patch.setattr(
            adapters, "peft_name", lambda hf, matrix: peft_name(hf.replace("experts.1.", "experts.2."), matrix)
        ),
    ),
}


@pytest.mark.parametrize("name", MERGES)
def test_a_mistake_in_the_merge_is_found(
    name: str, real_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, change = MERGES[name]
    adapter = samples.write_adapter(tmp_path / "lora", samples.ARCHS[kind], Lora(4, 8.0, samples.ALL_TARGETS))
    argv = ("--load-dir", real_models[kind], "--lora-load", adapter, "--verify", "--save-model-type", "hf")
    printed = samples.ok(*argv, "--save-dir", tmp_path / "right")
    adapted = 4 * (7 if kind == "untied" else 4 + 3 * 8)
    assert f"{adapted} of them merged: base + adapter to the rounding of float32" in printed
    change(monkeypatch)
    ran = samples.run(*argv, "--save-dir", tmp_path / "wrong")
    assert ran.code == 1, ran.out
    assert "differs: model.safetensors: model.layers.0." in ran.out


def test_a_mistake_in_an_adapters_new_form_is_found(
    real_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A's of q, k and v below each other, and each B beside zeros: what is added must stay the same."""
    adapter = samples.write_adapter(tmp_path / "lora", samples.ARCHS["few"], Lora(4, 8.0, samples.ALL_TARGETS))
    argv = ("--load-dir", adapter, "--hf-cfg-dir", real_models["few"], *TP2_PP2, "--verify")
    samples.to_mg(adapter, tmp_path / "right", *argv[2:])
    read = adapters.SharedA.read

    def wrong(self: adapters.SharedA, name: str, region: Any) -> np.ndarray:
        return read(self, name.replace("v_proj.lora_B", "k_proj.lora_B"), region)

    monkeypatch.setattr(adapters.SharedA, "read", wrong)
    ran = samples.run(*argv, "--save-dir", tmp_path / "wrong")
    assert ran.code == 1, ran.out
    assert "differs: scale * B @ A of model.layers.0.self_attn.v_proj.weight" in ran.out


def test_what_pissa_began_with_in_an_embedding_is_zero_without_a_sign() -> None:
    """What is compared are bits: -0.0 was said to differ from what is written."""

    class Ones(PlainTensors):
        def __init__(self) -> None:
            pass

        def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
            return torch.ones(rows[1] - rows[0], columns[1] - columns[0])

    for matrix in "AB":
        name = f"base_model.model.model.embed_tokens.lora_embedding_{matrix}"
        found = PlainTensors(Ones(), 2).read(name, (0, 5), (0, 4))
        assert torch.equal(found, torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(5, 4))
        assert not torch.signbit(found).any()
