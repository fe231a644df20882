"""Patterns say which weights are trained, and which have adapters; what they cannot mean is refused by name."""

from __future__ import annotations

import fnmatch
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import safetensors

import tiny
from qwen3_npu import cli
from qwen3_npu.args.lora import FreezeArgs, LoraArgs, spelled
from qwen3_npu.args.preference import PREFERENCE_STAGES
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.args.rules.switches import check_switches
from qwen3_npu.checkpoint.mapping.frozen import frozen_share, frozen_weights
from qwen3_npu.errors import UsageError


def frozen(kind: str, include: list[str], exclude: list[str]) -> frozenset[str]:
    return frozen_weights(tiny.arch(kind), FreezeArgs(freeze_include=include, freeze_exclude=exclude))


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_patterns_mean_what_fnmatch_says_of_the_names_in_a_hugging_face_file(kind: str, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", tiny.arch(kind))
    with safetensors.safe_open(next(folder.glob("*.safetensors")), "np") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    include, exclude = ["model.layers.*", "model.embed_tokens.*"], ["*.layers.3.*", "*norm*"]
    expected = {n for n in sizes if any(fnmatch.fnmatchcase(n, p) for p in include)}
    expected -= {n for n in sizes if any(fnmatch.fnmatchcase(n, p) for p in exclude)}
    assert frozen(kind, include, exclude) == expected
    assert frozen(kind, [], exclude) == set(sizes) - {n for n in sizes if any(fnmatch.fnmatch(n, p) for p in exclude)}
    index = json.loads((folder / "config.json").read_text())
    assert index["tie_word_embeddings"] == (kind == "tied")

    def count(names: object) -> float:
        total = 0
        for name in names:  # type: ignore[attr-defined]
            product = 1
            for n in sizes[name]:
                product *= n
            total += product
        return total

    assert frozen_share(tiny.arch(kind), frozenset(expected)) == pytest.approx(count(expected) / count(sizes))


REFUSED = {
    "nothing matches": ("untied", ["model.layer.*"], [], "--freeze-include model.layer.* matches no weight of Qwen3"),
    "nothing is spared": ("untied", ["*.layers.0.*"], ["*.layers.1.*"], "--freeze-exclude *.layers.1.*: --freeze-incl"),
    "an unknown exception": ("untied", ["*"], ["lm_heads.*"], "--freeze-exclude lm_heads.* matches no weight"),
    "a tied output layer": ("tied", ["lm_head.weight"], [], "the output layer is model.embed_tokens.weight here"),
    "a part of q, k and v": ("untied", ["*.q_proj.*"], [], "which are one tensor here"),
    "some experts": ("moe", ["*.experts.[01].*"], [], "which are one tensor here"),
    "everything": ("untied", ["*"], [], "nothing is trained; give --freeze-exclude"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_patterns_that_cannot_be_meant_are_refused(name: str) -> None:
    kind, include, exclude, message = REFUSED[name]
    with pytest.raises(UsageError) as raised:
        frozen(kind, include, exclude)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_targets_may_be_expressions_and_are_spelled_so_that_they_mean_the_same() -> None:
    entries = ["linear_proj", r"decoder\.layers\.[0-2]\..*(qkv|fc1)", r".*\.2\.mlp\..*", "output"]
    targets, layers = LoraArgs(lora_target_modules=entries).places(tiny.arch())
    assert targets == ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output")
    assert layers == (("linear_qkv", (0, 1, 2)), ("linear_fc1", (0, 1, 2)), ("linear_fc2", (2,)))
    again = [word.strip("'") for word in spelled(targets, layers).split()]
    assert LoraArgs(lora_target_modules=again).places(tiny.arch()) == (targets, layers)
    assert LoraArgs(lora_target_modules=[".*"]).places(tiny.arch("tied"))[0] == targets[:4]


TARGETS = {
    "a typo": ("untied", "linear_kqv", "is not known; known: linear_qkv, .*did you mean linear_qkv"),
    "no expression": ("untied", "(linear_qkv", "is no regular expression"),
    "nothing matches": ("untied", r"layers\.0\..*", "matches no module of Qwen3 dense"),
    "a tied output layer": ("tied", "output", "its output layer is the embedding; drop the target"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_cannot_be_meant_are_refused(name: str) -> None:
    kind, entry, message = TARGETS[name]
    with pytest.raises(UsageError, match=message):
        LoraArgs(lora_target_modules=[entry]).places(tiny.arch(kind))


def test_pissa_has_no_more_ranks_than_a_weight_has_singular_vectors() -> None:
    arch = tiny.arch("untied")
    rank = min(arch.hidden_size, arch.intermediate_size)
    LoraArgs(lora_r=rank, lora_init="pissa", lora_target_modules=["linear_fc2"]).places(arch)
    with pytest.raises(UsageError, match=f"of linear_fc2 have {rank} singular vectors; use --lora-r {rank} or less"):
        LoraArgs(lora_r=rank + 1, lora_init="pissa", lora_target_modules=["linear_fc2"]).places(arch)


def test_lora_freezes_by_itself() -> None:
    words = ["--data-path", "x", "--lr", "1", "--train-iters", "1", "--lora-r", "4", "--freeze-include", "*norm*"]
    parsed = cli.parse("p", "d", GROUPS, {}, argv=words)
    with pytest.raises(UsageError, match="LoRA trains its adapters only"):
        check_switches(PretrainArgs(*parsed.groups), parsed.given)


@pytest.mark.parametrize("stage", PREFERENCE_STAGES)
def test_pissa_needs_another_reference_only_where_one_is_compared_with(stage: str) -> None:
    words = ["--data-path", "x", "--lr", "1", "--train-iters", "1", "--lora-r", "4", "--lora-init", "pissa"]
    parsed = cli.parse("p", "d", GROUPS, {}, argv=[*words, "--stage", stage])
    refuses = pytest.raises(UsageError, match="give --ref-model") if stage in ("dpo", "kto") else nullcontext()
    with refuses:
        check_switches(PretrainArgs(*parsed.groups), parsed.given)
