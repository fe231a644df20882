"""--optimizer muon: the updates of torch.optim.Muon, of each matrix that a parameter holds."""

from __future__ import annotations

import itertools
import types
from typing import Any

import pytest
import torch

import tiny
from qwen3_npu.args.training import OptimizerArgs

SCALES = {"original": ("shape_scaling", 1.0), "match_rms_adamw": ("spectral", 0.2)}


def steps(start: torch.Tensor, gradients: list[torch.Tensor], matrix: Any, **flags: Any) -> torch.Tensor:
    """A parameter after our steps, whose iteration is in bfloat16, as torch's."""
    from qwen3_npu.training.muon.optimizer import MuonAdamW
    from qwen3_npu.training.muon.shares import undivided

    args = OptimizerArgs(lr=0.02, optimizer="muon", **flags)
    parameter = torch.nn.Parameter(start.clone())
    made = torch.optim.AdamW([parameter], lr=0.02, weight_decay=0.1)
    made.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
    matrices = {parameter: matrix}
    MuonAdamW.adopt(made, matrices, undivided(matrices), args=args, dtype=torch.bfloat16)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    assert made.state[parameter]["step"] == len(gradients)
    return parameter.detach()


def theirs(start: torch.Tensor, gradients: list[torch.Tensor], **options: Any) -> torch.Tensor:
    """The same by torch.optim.Muon."""
    parameter = torch.nn.Parameter(start.clone())
    made = torch.optim.Muon([parameter], lr=0.02, weight_decay=0.1, **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach()


def drawn(*shape: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(sum(shape))
    start, *gradients = (torch.randn(shape, generator=draw) for _ in range(4))
    return start, gradients


def assert_near(found: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> None:
    """Equal to the rounding of bfloat16, beside what the steps changed."""
    assert (found - expected).norm() < 5e-3 * (expected - start).norm()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torch(shape: tuple[int, int], scale: str, nesterov: bool) -> None:
    from qwen3_npu.training.muon.matrices import LayerMatrix

    mode, factor = SCALES[scale]
    start, gradients = drawn(*shape)
    expected = theirs(start, gradients, nesterov=nesterov, adjust_lr_fn=scale)
    flags = {"muon_scale_mode": mode, "muon_extra_scale_factor": factor, "muon_use_nesterov": nesterov}
    assert_near(steps(start, gradients, LayerMatrix(*shape), **flags), expected, start)


def test_queries_keys_and_values_are_matrices_of_their_own() -> None:
    """Two key/value heads of width 4, three query heads each; rows are q q q k v of each."""
    from qwen3_npu.training.muon.matrices import LayerMatrix

    start, gradients = drawn(2 * 5 * 4, 16)
    found = steps(start, gradients, LayerMatrix(40, 16, heads=(12, 4, 4)), muon_scale_mode="shape_scaling")
    for rows in ((0, 12), (12, 16), (16, 20)):
        place = torch.cat([torch.arange(*rows), torch.arange(*rows) + 20])
        own = [gradient[place] for gradient in gradients]
        assert_near(found[place], theirs(start[place], own, nesterov=False, adjust_lr_fn="original"), start[place])


def test_each_expert_is_a_matrix_of_its_own_stored_from_input_to_output() -> None:
    from qwen3_npu.training.muon.matrices import LayerMatrix

    start, gradients = drawn(8, 3 * 20)  # as weight1: three experts, [8, 20] each in memory
    found = steps(start, gradients, LayerMatrix(20, 8, expert=True), muon_scale_mode="shape_scaling").view(3, 8, 20)
    for expert in range(3):
        own = [gradient.view(3, 8, 20)[expert].T.contiguous() for gradient in gradients]
        first = start.view(3, 8, 20)[expert].T.contiguous()
        assert_near(found[expert].T, theirs(first, own, nesterov=False, adjust_lr_fn="original"), first)


def test_singular_values_come_near_one_and_singular_vectors_stay() -> None:
    from qwen3_npu.training.muon.matrices import orthogonal

    matrix = drawn(16, 30)[0].double()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ orthogonal(matrix.unsqueeze(0), 5)[0] @ v.T
    values = turned.diagonal()
    assert (turned - values.diag()).abs().max() < 1e-9
    assert values.min() > 0.6
    assert values.max() < 1.3


def slices_of(rank: int, ranks: int) -> tuple[Any, dict[torch.Tensor, torch.Tensor]]:
    """A distributed optimizer's part, as far as it is asked here: two buckets of a norm, matrices and experts."""
    from qwen3_npu.training.muon.matrices import LayerMatrix

    kinds = {"norm": (7, None), "proj": (48, LayerMatrix(6, 8)), "up": (96, LayerMatrix(12, 8))}
    kinds |= {"experts": (5 * 24, LayerMatrix(4, 6, expert=True)), "router": (40, LayerMatrix(5, 8))}
    index, matrices, buckets, mains = {}, {}, [], {}
    for number, names in enumerate((["norm", "proj", "up"], ["experts", "router"])):
        start = begin = sum(bucket.grad_data.numel() for bucket in buckets)
        for name in names:
            parameter = torch.nn.Parameter(torch.arange(float(kinds[name][0])))
            index[parameter] = (begin, begin + parameter.numel(), number)
            begin += parameter.numel()
            if kinds[name][1]:
                matrices[parameter] = kinds[name][1]
        each = -(-(begin - start) // ranks)
        buckets.append(types.SimpleNamespace(offset=start, grad_data=torch.empty(each * ranks)))
        for parameter, (first, last, bucket) in index.items():
            if bucket == number:
                own = slice(max(0, start + rank * each - first), max(0, min(last, start + (rank + 1) * each) - first))
                if own.start < min(own.stop, parameter.numel()):
                    mains[parameter] = parameter.detach()[own]
    group = types.SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    buffer = types.SimpleNamespace(param_index_map=index, buckets=buckets, grad_data=torch.empty(0))
    return types.SimpleNamespace(buffers=[buffer], data_parallel_group=group), {"matrices": matrices, "mains": mains}


def test_a_rank_of_no_op_layers_alone_has_no_work() -> None:
    from qwen3_npu.training.muon.shares import divided

    part, known = slices_of(0, 2)
    part.buffers = []
    work = divided(part, **known)
    assert not work.whole
    assert not work.rounds


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
def test_each_matrix_is_whole_on_one_rank_and_all_ranks_have_work(ranks: int) -> None:
    from qwen3_npu.training.muon.shares import divided

    works = [divided(part, **known) for part, known in (slices_of(rank, ranks) for rank in range(ranks))]
    values: list[list[float]] = []  # of each matrix, in the order of memory
    for work in works:
        for share in work.whole:
            values += share.of(share.main).view(-1, share.matrix.size).tolist()
    for turns in zip(*(work.rounds for work in works), strict=True):
        assert len({tuple(turn) for turn in turns}) == 1, "the ranks agree on owners and their order"
        for owner in turns[0]:
            pieces = [turn[owner] for turn in turns]
            assert len({piece.lengths for piece in pieces}) == 1
            held = [piece.share.of(piece.share.main).tolist() if piece.share else [] for piece in pieces]
            assert [len(piece) for piece in held] == list(pieces[0].lengths)
            assert sum(map(bool, held)) > 1, "a matrix on one rank is not sent"
            values.append(list(itertools.chain(*held)))
    sizes = [48, 96, 40] + [24] * 5
    starts = [0, 0, 0, 0, 24, 48, 72, 96]
    assert sorted(values) == sorted(list(range(a, a + n)) for a, n in zip(starts, sizes, strict=True))
    cost = {48: 48 * 6, 96: 96 * 8, 40: 40 * 5, 24: 24 * 4}
    loads = [0] * ranks
    for rank, work in enumerate(works):
        loads[rank] += sum(cost[s.matrix.size] * (s.stop - s.start) // s.matrix.size for s in work.whole)
        loads[rank] += sum(cost[turn[rank].matrix.size] for turn in work.rounds if rank in turn)
    assert max(loads) <= max(768, sum(loads) / ranks + 768 / 2)


def test_adapters_are_matrices_whose_dimension_of_the_linear_is_sharded(process: Any) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs, make_layout
    from qwen3_npu.distributed.launch import model_parallel
    from qwen3_npu.training.muon.matrices import LayerMatrix, layer_matrix

    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 4}
    config = TransformerConfig(num_moe_experts=3, **sizes)
    attention, experts = "decoder.layers.0.self_attention.", "decoder.layers.0.mlp.experts."
    found = {
        attention + "linear_qkv.lora_A.default.weight": ((2, 16), LayerMatrix(2, 16)),
        attention + "linear_qkv.lora_B.default.weight": ((32, 2), LayerMatrix(32, 2, 1, heads=(8, 4, 4))),
        attention + "linear_proj.lora_A.default.weight": ((2, 16), LayerMatrix(2, 16, 2)),
        attention + "linear_proj.lora_B.default.weight": ((16, 2), LayerMatrix(16, 2)),
        attention + "linear_proj.lora_magnitude_vector.default.weight": ((16,), None),
        experts + "weight1_lora_a": ((16, 6), LayerMatrix(2, 16, expert=True)),
        experts + "weight1_lora_b": ((2, 30), LayerMatrix(10, 2, 1, expert=True)),
        experts + "weight2_lora_a": ((15, 2), LayerMatrix(2, 5, 2, expert=True)),
        experts + "weight2_lora_b": ((6, 16), LayerMatrix(16, 2, expert=True)),
        "embedding.word_embeddings.lora_A.default.weight": ((2, 64), None),
    }
    parallel = ParallelArgs()
    with model_parallel(make_layout(tiny.arch("untied"), parallel), parallel, RuntimeArgs()):
        for name, (shape, expected) in found.items():
            assert layer_matrix(name, torch.empty(shape), config, split_qkv=True) == expected, name
