"""The files hold what MindSpeed-LLM's hold: its own steps (split, reshape, chunk), written out here with numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import samples

from qwen3_npu.checkpoint.binary.dtypes import BF16
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile
from qwen3_npu.checkpoint.formats.open import find
from qwen3_npu.checkpoint.formats.torch_read import checkpoint_args

ARCH = samples.ARCHS["untied"]
HEADS, GROUPS, DIM = ARCH.num_attention_heads, ARCH.num_key_value_heads, ARCH.head_dim


def load(folder: Path, rank: str, key: str = "model") -> dict[str, np.ndarray]:
    """A rank's tensors, as bits."""
    file = PtFile(folder / "iter_0000001" / rank / "model_optim_rng.pt")
    found = {
        name: file.read(ref, ref.shape, tuple((0, n) for n in ref.shape)) for name, ref in file.content[key].items()
    }
    file.close()
    return found


def convert(model: Path, folder: Path, **sizes: object) -> Path:
    names = {"tp": "--target-tensor-parallel-size", "pp": "--target-pipeline-parallel-size"}
    names |= {"ep": "--target-expert-parallel-size", "etp": "--expert-tensor-parallel-size"}
    names |= {"vpp": "--num-layers-per-virtual-pipeline-stage", "noop": "--noop-layers", "list": "--num-layer-list"}
    samples.to_mg(model, folder, *(word for name, value in sizes.items() for word in (names[name], value)))
    return folder


def test_dense(models: dict[str, Path], tmp_path: Path) -> None:
    hf = samples.weights(models["untied"])
    mg = load(convert(models["untied"], tmp_path, tp=2, pp=2), "mp_rank_01_001")
    p = "model.layers.3."
    q = hf[p + "self_attn.q_proj.weight"].reshape(GROUPS, HEADS // GROUPS * DIM, -1)
    k, v = (hf[f"{p}self_attn.{x}_proj.weight"].reshape(GROUPS, DIM, -1) for x in "kv")
    qkv = np.concatenate([q, k, v], axis=1).reshape(-1, ARCH.hidden_size)
    o = "decoder.layers.1."
    assert np.array_equal(mg[o + "self_attention.linear_qkv.weight"], np.split(qkv, 2)[1])
    assert np.array_equal(
        mg[o + "self_attention.linear_proj.weight"], np.split(hf[p + "self_attn.o_proj.weight"], 2, axis=1)[1]
    )
    gate, up = (np.split(hf[f"{p}mlp.{x}_proj.weight"], 2)[1] for x in ("gate", "up"))
    assert np.array_equal(mg[o + "mlp.linear_fc1.weight"], np.concatenate([gate, up]))
    assert np.array_equal(mg[o + "mlp.linear_fc2.weight"], np.split(hf[p + "mlp.down_proj.weight"], 2, axis=1)[1])
    assert np.array_equal(mg[o + "input_layernorm.weight"], hf[p + "input_layernorm.weight"])
    assert np.array_equal(mg[o + "pre_mlp_layernorm.weight"], hf[p + "post_attention_layernorm.weight"])
    assert np.array_equal(mg[o + "self_attention.q_layernorm.weight"], hf[p + "self_attn.q_norm.weight"])
    assert np.array_equal(mg["decoder.final_layernorm.weight"], hf["model.norm.weight"])
    assert np.array_equal(mg["output_layer.weight"], np.split(hf["lm_head.weight"], 2)[1])


@pytest.mark.parametrize(("etp", "cut"), [(2, True), (1, False)])
def test_stacked_experts(etp: int, cut: bool, models: dict[str, Path], tmp_path: Path) -> None:
    hf = samples.weights(models["moe"])
    rank = "mp_rank_01_001"  # TP rank 1, EP rank 1: the second half of the experts
    mg = load(convert(models["moe"], tmp_path, tp=2, ep=2, etp=etp), rank)
    p, o = "model.layers.2.mlp.experts.", "decoder.layers.2.mlp."

    def half(name: str, axis: int) -> np.ndarray:
        return np.split(hf[name], 2, axis=axis)[1] if cut else hf[name]

    first = [
        np.concatenate([half(f"{p}{e}.{x}_proj.weight", 0).T for x in ("gate", "up")], axis=1) for e in range(4, 8)
    ]
    second = [half(f"{p}{e}.down_proj.weight", 1).T for e in range(4, 8)]
    assert np.array_equal(mg[o + "experts.weight1"], np.stack(first).reshape(ARCH.hidden_size, -1))
    assert np.array_equal(mg[o + "experts.weight2"], np.stack(second).reshape(-1, ARCH.hidden_size))
    assert np.array_equal(mg[o + "router.weight"], hf["model.layers.2.mlp.gate.weight"])


def test_folders_of_expert_tensor_parallel_1(models: dict[str, Path], tmp_path: Path) -> None:
    convert(models["moe"], tmp_path, tp=2, ep=2, etp=1)
    names = {path.name for path in (tmp_path / "iter_0000001").glob("mp_rank_*")}
    assert names == {"mp_rank_00_000", "mp_rank_01_001"}


def test_padding_repeats_the_last_row(models: dict[str, Path], tmp_path: Path) -> None:
    samples.to_mg(models["untied"], tmp_path, "--padded-vocab-size", 256)
    mg = load(tmp_path, "mp_rank_00")
    embedding = samples.weights(models["untied"])["model.embed_tokens.weight"]
    assert np.array_equal(mg["embedding.word_embeddings.weight"][:250], embedding)
    assert all(np.array_equal(row, embedding[-1]) for row in mg["embedding.word_embeddings.weight"][250:])


def test_a_tied_output_layer_on_the_last_of_several_stages(models: dict[str, Path], tmp_path: Path) -> None:
    one = load(convert(models["tied"], tmp_path / "one"), "mp_rank_00")
    assert "output_layer.weight" not in one
    last = load(convert(models["tied"], tmp_path / "two", pp=2), "mp_rank_00_001")
    assert np.array_equal(last["output_layer.weight"], one["embedding.word_embeddings.weight"])


def norms(folder: Path, rank: str, key: str) -> dict[str, bytes]:
    return {name: data.tobytes() for name, data in load(folder, rank, key).items() if "input_layernorm" in name}


def test_virtual_stages_noop_layers_and_lists(models: dict[str, Path], tmp_path: Path) -> None:
    hf = samples.weights(models["untied"])
    norm = [hf[f"model.layers.{i}.input_layernorm.weight"].tobytes() for i in range(4)]

    def held(folder: Path, rank: str, key: str = "model") -> dict[int, int]:
        """Local layer -> the model's layer."""
        return {int(name.split(".")[2]): norm.index(data) for name, data in norms(folder, rank, key).items()}

    vpp = convert(models["untied"], tmp_path / "vpp", pp=2, vpp=1)
    assert held(vpp, "mp_rank_00_001", "model0") == {0: 1}
    assert held(vpp, "mp_rank_00_000", "model1") == {0: 2}
    noop = convert(models["untied"], tmp_path / "noop", pp=2, noop="1,4")
    assert held(noop, "mp_rank_00_000") == {0: 0, 2: 1}
    assert held(noop, "mp_rank_00_001") == {0: 2, 2: 3}
    uneven = convert(models["untied"], tmp_path / "list", pp=2, list="3,1")
    assert held(uneven, "mp_rank_00_000") == {0: 0, 1: 1, 2: 2}
    assert held(uneven, "mp_rank_00_001") == {0: 3}


def test_the_saved_arguments(models: dict[str, Path], tmp_path: Path) -> None:
    convert(models["moe"], tmp_path, tp=2, pp=2, ep=2, noop="4,5")
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
    found = find(tmp_path)
    assert found is not None
    args, _ = checkpoint_args(found)
    # What Megatron's loader compares, and what MindSpeed-LLM's converters read.
    assert args.num_layers == 6
    assert args.noop_layers == "4,5"
    assert (args.hidden_size, args.num_attention_heads, args.kv_channels) == (64, 8, 16)
    assert args.num_query_groups == args.num_key_value_heads == 4
    assert args.add_position_embedding is True
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert (args.expert_model_parallel_size, args.num_experts, args.moe_router_topk) == (2, 8, 2)
    assert args.untie_embeddings_and_output_weights is True
    assert args.params_dtype is BF16
    content = PtFile(tmp_path / "iter_0000001" / "mp_rank_00_000_000" / "model_optim_rng.pt").content
    assert (content["checkpoint_version"], content["iteration"]) == (3.0, 1)
