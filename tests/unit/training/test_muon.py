"""--optimizer muon: the updates of torch.optim.Muon, of each matrix that a parameter holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen3_npu.args.training import OptimizerArgs

SCALES = {"original": ("shape_scaling", 1.0), "match_rms_adamw": ("spectral", 0.2)}


def steps(start: torch.Tensor, gradients: list[torch.Tensor], matrix: Any, **flags: Any) -> torch.Tensor:
    """A parameter after our steps, whose iteration is in bfloat16, as torch's."""
    from qwen3_npu.training.muon.optimizer import MuonAdamW

    args = OptimizerArgs(lr=0.02, optimizer="muon", **flags)
    parameter = torch.nn.Parameter(start.clone())
    made = torch.optim.AdamW([parameter], lr=0.02, weight_decay=0.1)
    made.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
    MuonAdamW.adopt(made, {parameter: matrix}, args, torch.bfloat16)
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
    assert_near(steps(start, gradients, LayerMatrix(None), **flags), expected, start)


def test_queries_keys_and_values_are_matrices_of_their_own() -> None:
    """Two key/value heads of width 4, three query heads each; rows are q q q k v of each."""
    from qwen3_npu.training.muon.matrices import LayerMatrix

    start, gradients = drawn(2 * 5 * 4, 16)
    found = steps(start, gradients, LayerMatrix(None, heads=(12, 4, 4)), muon_scale_mode="shape_scaling")
    for rows in ((0, 12), (12, 16), (16, 20)):
        place = torch.cat([torch.arange(*rows), torch.arange(*rows) + 20])
        own = [gradient[place] for gradient in gradients]
        assert_near(found[place], theirs(start[place], own, nesterov=False, adjust_lr_fn="original"), start[place])


def test_each_expert_is_a_matrix_of_its_own_stored_from_input_to_output() -> None:
    from qwen3_npu.training.muon.matrices import LayerMatrix

    start, gradients = drawn(8, 3 * 20)  # as weight1: three experts, [8, 20] each in memory
    found = steps(start, gradients, LayerMatrix(None, True, 3, 8), muon_scale_mode="shape_scaling").view(3, 8, 20)
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
