"""Generation straight from every kind of checkpoint, with and without an adapter: transformers' and peft's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import samples
import torch

import generation
from qwen3_npu.checkpoint.mapping.lora import Lora
from qwen3_npu.platform import select_platform

LORA = Lora(4, 8.0, samples.ALL_TARGETS)
LAYOUT = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)


def answers(process: Any, folder: Path, config: Path, *flags: object) -> list[list[int]]:
    from qwen3_npu.inference.sampling import Sampling

    words = ["--hf-dir", str(config), *map(str, flags)]
    with generation.runner(select_platform("cpu"), process, folder, *words) as made:
        return generation.generated(made, prompts(), 12, Sampling())


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(2, 250, (n,), generator=draw).tolist() for n in (9, 4)]


def expected(folder: Path, adapter: Path | None = None) -> list[list[int]]:
    model = generation.transformers_model(folder)
    if adapter is not None:
        peft = pytest.importorskip("peft", reason="adapters are compared with peft (pip install peft)")
        model = peft.PeftModel.from_pretrained(model, str(adapter))
        answered = [model.generate(input_ids=torch.tensor([t]), **OPTIONS)[0].tolist()[len(t) :] for t in prompts()]
        return answered
    return generation.transformers_answers(model, prompts(), 12)


OPTIONS = {"do_sample": False, "eos_token_id": generation.EOS, "pad_token_id": 0, "max_new_tokens": 12}


@pytest.mark.parametrize("kind", ["tied", "moe", "qwen2"])
def test_every_format_and_adapters(kind: str, process: Any, real_models: dict[str, Path], tmp_path: Path) -> None:
    config = real_models[kind]
    adapter = samples.write_adapter(tmp_path / "adapter", samples.ARCHS[kind], LORA, shared_a=True)
    samples.to_mg(config, tmp_path / "torch", *LAYOUT)
    samples.to_mg(config, tmp_path / "dist", "--target-tensor-parallel-size", 2, "--ckpt-format", "torch_dist")
    samples.to_mg(adapter, tmp_path / "mg_adapter", *LAYOUT, "--hf-cfg-dir", config)
    plain, adapted = expected(config), expected(config, adapter)
    assert plain != adapted, "the adapter must matter"
    for folder in (config, tmp_path / "torch", tmp_path / "dist"):
        assert answers(process, folder, config) == plain, folder
    for folder, lora in ((config, "adapter"), (tmp_path / "torch", "mg_adapter"), (tmp_path / "dist", "adapter")):
        assert answers(process, folder, config, "--lora-load", tmp_path / lora) == adapted, (folder, lora)
