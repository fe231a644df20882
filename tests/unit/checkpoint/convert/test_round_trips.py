"""Every way of cutting a model gives back the same bits, and every way of getting to a layout gives the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import samples

import llama

TP2 = ("--target-tensor-parallel-size", 2)
TP4 = ("--target-tensor-parallel-size", 4)
PP2 = ("--target-pipeline-parallel-size", 2)
PP3 = ("--target-pipeline-parallel-size", 3)
PP4 = ("--target-pipeline-parallel-size", 4)
VPP = ("--num-layers-per-virtual-pipeline-stage", 1)
EP2 = ("--target-expert-parallel-size", 2)
EP4 = ("--target-expert-parallel-size", 4)
ETP1 = ("--expert-tensor-parallel-size", 1)
ETP2 = ("--expert-tensor-parallel-size", 2)
SINGLE_EXPERTS = ("--no-moe-grouped-gemm",)

LAYOUTS = {
    "TP1": (),
    "TP2": TP2,
    "TP4": TP4,
    "TP2 PP2": TP2 + PP2,
    "TP4 PP2 VPP": TP4 + PP2 + VPP,
    "PP4": PP4,
    "layer list": (*PP2, "--num-layer-list", "1,3"),
    "noop": (*PP3, *TP2, "--noop-layers", "0,5"),
    "noop VPP": (*PP3, "--noop-layers", "4,5", *VPP),
    "vocabulary x 16": (*TP4, "--make-vocab-size-divisible-by", 16),
    "vocabulary 512": (*TP2, *PP2, "--padded-vocab-size", 512),  # the second TP rank holds padding only
}
MOE_LAYOUTS = {
    "TP1": (),
    "TP2 PP2": TP2 + PP2,
    "EP2": EP2,
    "EP4 PP2 VPP": EP4 + PP2 + VPP,
    "TP2 EP2": TP2 + EP2,
    "TP2 EP2 ETP1": TP2 + EP2 + ETP1,
    "TP4 EP2 ETP2 PP2": TP4 + EP2 + ETP2 + PP2,
    "TP2 EP4 ETP1": TP2 + EP4 + ETP1,
    "single experts": SINGLE_EXPERTS,
    "single experts, TP2 EP2 ETP1": SINGLE_EXPERTS + TP2 + EP2 + ETP1,
    "single experts, TP4 ETP2 noop": (*SINGLE_EXPERTS, *TP4, *ETP2, *PP3, "--noop-layers", "0,1"),
}
PT_FILES = "iter_*/**/*.pt"
CASES = [(kind, name) for kind in ("untied", "tied") for name in LAYOUTS] + [("moe", name) for name in MOE_LAYOUTS]
CASES += [("few", name) for name in ("TP4", "TP4 PP2 VPP")]
CASES += [("qwen2", name) for name in ("TP2 PP2", "noop VPP")]
IDS = [f"{kind}: {name}" for kind, name in CASES]


def flags(kind: str, name: str) -> tuple:
    return (MOE_LAYOUTS if kind == "moe" else LAYOUTS)[name]


@pytest.fixture(scope="module")
def converted(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(kind, layout) -> the Megatron checkpoint made from the Hugging Face model."""
    root = tmp_path_factory.mktemp("converted")
    made = {}
    for number, (kind, name) in enumerate(CASES):
        made[kind, name] = root / str(number)
        samples.to_mg(models[kind], made[kind, name], *flags(kind, name))
    return made


@pytest.mark.parametrize(("kind", "name"), CASES, ids=IDS)
def test_back_to_the_same_bits(
    kind: str, name: str, models: dict[str, Path], converted: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    samples.to_hf(converted[kind, name], tmp_path)
    samples.assert_same_weights(models[kind], tmp_path)


@pytest.mark.parametrize(("kind", "name"), CASES, ids=IDS)
def test_resharding_gives_the_files_of_converting(
    kind: str, name: str, converted: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    # From the layout before it in the list: each layout is a source once and a target once.
    names = [n for k, n in CASES if k == kind]
    source = converted[kind, names[names.index(name) - 1]]
    samples.to_mg(source, tmp_path / "mg", *flags(kind, name))
    assert samples.digests(tmp_path / "mg", PT_FILES) == samples.digests(converted[kind, name], PT_FILES)


@pytest.mark.parametrize(("kind", "name"), CASES, ids=IDS)
def test_through_torch_dist(
    kind: str, name: str, models: dict[str, Path], converted: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    layout, dist = flags(kind, name), ("--ckpt-format", "torch_dist")
    samples.to_mg(converted[kind, name], tmp_path / "dist", *layout, *dist)
    samples.to_hf(tmp_path / "dist", tmp_path / "hf")
    samples.assert_same_weights(models[kind], tmp_path / "hf")
    samples.to_mg(tmp_path / "dist", tmp_path / "mg", *layout)
    assert samples.digests(tmp_path / "mg", PT_FILES) == samples.digests(converted[kind, name], PT_FILES)


def test_workers_write_the_same_files(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["moe"], tmp_path / "one", *TP2, *PP2, *EP2)
    samples.to_mg(models["moe"], tmp_path / "three", *TP2, *PP2, *EP2, "--jobs", 3)
    assert samples.digests(tmp_path / "one") == samples.digests(tmp_path / "three")
    samples.to_hf(tmp_path / "three", tmp_path / "hf", "--max-shard-size", 0.0001, "--jobs", 3)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    samples.assert_same_weights(models["moe"], tmp_path / "hf")


def test_a_padded_vocabulary_never_leaks(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["untied"], tmp_path / "mg", *TP2, "--padded-vocab-size", 512)
    samples.to_mg(tmp_path / "mg", tmp_path / "again", *TP4, "--padded-vocab-size", 400, "--ckpt-format", "torch_dist")
    samples.to_hf(tmp_path / "again", tmp_path / "hf")
    assert samples.weights(tmp_path / "hf")["lm_head.weight"].shape == (samples.ARCHS["untied"].vocab_size, 64)
    samples.assert_same_weights(models["untied"], tmp_path / "hf")


def test_a_family_from_outside(tmp_path: Path) -> None:
    with llama.registered() as arch:
        source = samples.write_bits(tmp_path / "hf", arch)
        samples.to_mg(source, tmp_path / "mg", *TP2, *PP2, "--noop-layers", "0,5", "--verify")
        samples.to_mg(tmp_path / "mg", tmp_path / "dist", *TP4, "--ckpt-format", "torch_dist")
        samples.to_hf(tmp_path / "dist", tmp_path / "back")
        samples.assert_same_weights(source, tmp_path / "back")
