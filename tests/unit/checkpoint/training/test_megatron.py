"""megatron-core itself loads the torch_dist checkpoints written here, and those that it saves are read here."""

from __future__ import annotations

import collections
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import samples
import torch

from qwen3_npu.checkpoint.binary.dtypes import BF16

WORLD = 2
# Target otherwise than megatron loads it (TP2 EP2 ETP1, vocabulary of 256), so that it reads across our chunks.
WRITTEN = ("--target-tensor-parallel-size", 4, "--target-pipeline-parallel-size", 2, "--ckpt-format", "torch_dist")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> Hugging Face directory; values, not random bits: megatron's own norms are float32 on the CPU."""
    root = tmp_path_factory.mktemp("models")
    return {kind: samples.write_floats(root / kind, arch, BF16) for kind, arch in samples.ARCHS.items()}


@pytest.fixture(scope="module")
def passed_through(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints written here, loaded and saved again by two processes of megatron-core: KIND/ours, KIND/theirs."""
    root = tmp_path_factory.mktemp("megatron")
    cases = []
    for kind in samples.ARCHS:
        expert = ("--target-expert-parallel-size", 4, "--expert-tensor-parallel-size", 2) if kind == "moe" else ()
        samples.to_mg(models[kind], root / kind / "ours", *WRITTEN, *expert)
        (root / kind / "theirs").mkdir()
        (root / kind / "theirs" / "latest_checkpointed_iteration.txt").write_text("7")
        cases.append(
            {
                "kind": kind,
                "load": str(root / kind / "ours" / "iter_0000001"),
                "save": str(root / kind / "theirs" / "iter_0000007"),
                "dump": str(root / kind / "parameters"),
                "vocab_size": samples.ARCHS[kind].vocab_size,
            }
        )
    (root / "job.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("live_megatron.py")
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(root / "rendezvous"), str(root / "job.json")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in ranks]
    if any(process.returncode for process in ranks):
        pytest.fail("\n".join(outputs))
    return root


@pytest.mark.parametrize("kind", samples.ARCHS)
def test_megatron_loads_what_is_written_here(
    kind: str, passed_through: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    expert = ("--target-expert-parallel-size", WORLD, "--expert-tensor-parallel-size", 1) if kind == "moe" else ()
    layout = ("--target-tensor-parallel-size", WORLD, *expert, "--no-moe-grouped-gemm", "--padded-vocab-size", 256)
    samples.to_mg(models[kind], tmp_path / "mg", *layout)
    for rank, folder in enumerate(sorted((tmp_path / "mg" / "iter_0000001").glob("mp_rank_*"))):
        with torch.serialization.safe_globals([__import__("argparse").Namespace]):
            expected = torch.load(folder / "model_optim_rng.pt", weights_only=True, mmap=True)["model"]
        got = torch.load(passed_through / kind / f"parameters_{rank}.pt", weights_only=True)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            rows = slice(0, None)
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                # Rows of the padding are zeros after megatron's load (it knows that this shape may differ).
                rows = slice(0, min(128, samples.ARCHS[kind].vocab_size - 128 * rank))
            assert torch.equal(got[name][rows].to(tensor.dtype), tensor[rows]), name


@pytest.mark.parametrize("kind", samples.ARCHS)
def test_what_megatron_saves_is_read(kind: str, passed_through: Path, models: dict[str, Path], tmp_path: Path) -> None:
    # megatron saves norms in float32 on the CPU
    samples.to_hf(passed_through / kind / "theirs", tmp_path / "hf", "--verify", "--params-dtype", "bf16")
    samples.assert_same_weights(models[kind], tmp_path / "hf")


def test_torch_loads_the_torch_format_plainly(models: dict[str, Path], tmp_path: Path) -> None:
    """`torch.load` with mmap and weights_only; args is an argparse.Namespace, as Megatron's is, so that is allowed."""
    import argparse

    import torch

    samples.to_mg(models["moe"], tmp_path, "--target-expert-parallel-size", 2)
    path = tmp_path / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        mapped = torch.load(path, weights_only=True, mmap=True)
        whole = torch.load(path, weights_only=True)
    assert mapped["args"].params_dtype is torch.bfloat16
    assert mapped["args"].num_query_groups == mapped["args"].num_key_value_heads == 4
    assert mapped["args"].expert_model_parallel_size == 2
    arch = samples.ARCHS["moe"]
    weight1 = mapped["model"]["decoder.layers.3.mlp.experts.weight1"]
    assert torch.equal(weight1, whole["model"]["decoder.layers.3.mlp.experts.weight1"])
    # Memory (expert, hidden, [gate | up]): the first expert of this rank is expert 4.
    first = weight1.view(4, arch.hidden_size, -1)[0, :, arch.moe_intermediate_size :]
    up = samples.weights(models["moe"])["model.layers.3.mlp.experts.4.up_proj.weight"]
    assert np.array_equal(first.T.contiguous().view(torch.int16).numpy().view(np.uint16), up)


def rewrite(root: Path, change: Callable[[dict], dict]) -> None:
    """Save every file of a torch checkpoint again with torch, its model changed."""
    for path in root.glob("iter_*/*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        torch.save({**content, "model": change(content["model"])}, path)
        (path.parents[1] / "integrity.json").unlink(missing_ok=True)  # another program wrote it


def as_mindspeed_llm(model: dict) -> dict:
    """Its converter fills `collections.defaultdict(dict)`s, one per rank, and saves them as they are."""
    ranks: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    for name, tensor in model.items():
        ranks[0][name] = tensor.clone()
    kept: dict = collections.defaultdict(dict)
    kept.update(ranks[0])
    return kept


def as_transformer_engine(model: dict) -> dict:
    """Its linears hold the norm before them, and extra states: nothing, bytes in memory, or an empty tensor."""
    renamed = {}
    for name, tensor in model.items():
        fused = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        fused = fused.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        renamed[fused] = tensor
    extra = {"self_attention.linear_qkv": None, "self_attention.linear_proj": io.BytesIO(b"x"), "mlp.linear_fc1": None}
    extra["mlp.linear_fc2"] = torch.empty(0, dtype=torch.uint8)
    extra["self_attention.core_attention"] = io.BytesIO(b"")
    return renamed | {f"decoder.layers.0.{module}._extra_state": state for module, state in extra.items()}


@pytest.mark.parametrize("change", [as_mindspeed_llm, as_transformer_engine])
def test_checkpoints_as_others_write_them_are_read(change: Callable, models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["untied"], tmp_path / "mg", "--target-tensor-parallel-size", 2)
    rewrite(samples.unsealed(tmp_path / "mg"), change)
    saved = torch.load(tmp_path / "mg/iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]
    assert type(saved) is collections.defaultdict or "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in saved
    samples.to_hf(tmp_path / "mg", tmp_path / "hf", "--verify")
    samples.assert_same_weights(models["untied"], tmp_path / "hf")


def test_an_entry_of_another_number_of_chunks_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["untied"], tmp_path / "mg")
    (path,) = samples.unsealed(tmp_path / "mg").glob("iter_*/*/model_optim_rng.pt")
    content = torch.load(path, weights_only=False)
    torch.save({"model0": content.pop("model"), **content}, path)
    with pytest.raises(AssertionError, match="holds model0, and its arguments mean model; save it again"):
        samples.to_hf(tmp_path / "mg", tmp_path / "hf")
