"""Patterns say which weights are trained; what they cannot mean is refused by name."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import pytest
import safetensors

import tiny
from qwen3_npu.args.lora import FreezeArgs
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
    "some experts": ("moe", ["*.experts.[0-3].*"], [], "which are one tensor here"),
    "everything": ("untied", ["*"], [], "nothing is trained; give --freeze-exclude"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_patterns_that_cannot_be_meant_are_refused(name: str) -> None:
    kind, include, exclude, message = REFUSED[name]
    with pytest.raises(UsageError) as raised:
        frozen(kind, include, exclude)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
