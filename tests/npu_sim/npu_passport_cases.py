"""The numerics passport on a simulated NPU whose kernels have a fault."""

from __future__ import annotations

import sys
import tempfile
import unittest.mock
from pathlib import Path
from typing import Any

from npu_cases import _changed
from qwen3_npu.args.parallel import RuntimeArgs
from qwen3_npu.distributed.launch import World
from qwen3_npu.parity import passport
from qwen3_npu.parity.walk import walk
from qwen3_npu.platform.base import Platform
from qwen3_npu.training.fingerprints.files import Recording, read


def first_operators(
    platform: Platform, world: World, cases: list[str], changes: list[tuple[str, str] | None]
) -> list[dict[str, list[Any]]]:
    """For each change of the kernels' text: case -> what is named first, and how much of a tolerance was used."""
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
                    walked = walk(case, Recording("", "", "", "", {case: noted}), expected)
                    first = walked.first
                    said[case] = [round(walked.used, 3), *((first and [*first.place, first.what]) or [])]
            everything.append(said)
    return everything
