"""The numerics passport with kernels of the CPU and of simulated NPUs, some with a fault."""

from __future__ import annotations

import sys
import tempfile
import unittest.mock
from pathlib import Path
from typing import Any

import torch

from qwen3_npu.args.parallel import RuntimeArgs
from qwen3_npu.distributed.launch import World
from qwen3_npu.kernels import torch_native
from qwen3_npu.parity import passport
from qwen3_npu.parity.measure import trainer
from qwen3_npu.parity.walk import walk
from qwen3_npu.platform.base import Platform
from qwen3_npu.training.fingerprints.files import Recording, read


class _ForgetsUp(torch.autograd.Function):
    """Right forward; the gradient of the gate lacks the factor `up`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate, _ = x.chunk(2, dim=-1)
        return torch.cat((torch.ops.aten.silu_backward(grad, gate), grad * torch.nn.functional.silu(gate)), -1)


FAULTS: dict[str, Any] = {
    "swiglu": _ForgetsUp.apply,
    "rms_norm": lambda x, weight, eps: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6),
}


def agreement(
    platform: Platform, world: World, cases: list[str], fault: str | None = None
) -> dict[str, list[Any]] | None:
    """Case -> how much of a tolerance torch's kernels use, and the place that is named first."""
    expected, said = read(passport.shipped()), {}
    faulty = unittest.mock.patch.object(
        torch_native, fault or "swiglu", FAULTS[fault] if fault else torch_native.swiglu
    )
    with tempfile.TemporaryDirectory() as folder, faulty:
        passport.write_inputs(Path(folder))
        for case in cases:
            layout = passport.LAYOUTS[world.size].get(case.split()[0], [])
            noted = passport.run_case(
                case, platform, world, RuntimeArgs(kernels="torch"), folder=Path(folder), layout=layout
            )
            if noted is not None and not world.rank:
                walked = walk(case, Recording("", "", "", layout="", cases={case: noted}), expected)
                said[case] = [walked.used, walked.first and list(walked.first.place)]
    return said if world.rank == 0 else None


def faulty_training(platform: Platform, world: World, flags: list[str], fault: str) -> None:
    """A whole training with such a kernel."""
    with unittest.mock.patch.object(torch_native, fault, FAULTS[fault]), trainer(platform, world, flags) as made:
        made.train()


def first_operators(
    platform: Platform, world: World, cases: list[str], changes: list[tuple[str, str] | None]
) -> list[dict[str, list[Any]]]:
    """On simulated NPUs, for each change: case -> how much of a tolerance was used, and what is named first."""
    from kernel_cases import _changed
    from qwen3_npu.kernels import npu, npu_gradients

    expected, everything = read(passport.shipped()), []
    with tempfile.TemporaryDirectory() as name:
        passport.write_inputs(Path(name))
        for change in changes:
            kernels = npu if change is None else _changed((npu, npu_gradients), *change)
            kernels._compressed_mask.cache_clear()
            said = {}
            with unittest.mock.patch.dict(sys.modules, {"qwen3_npu.kernels.npu": kernels}):
                for case in cases:
                    noted = passport.run_case(case, platform, world, RuntimeArgs(kernels="npu"), folder=Path(name))
                    assert noted is not None
                    walked = walk(case, Recording("", "", "", layout="", cases={case: noted}), expected)
                    first = walked.first
                    said[case] = [round(walked.used, 3), *((first and [*first.place, first.what]) or [])]
            everything.append(said)
    return everything
