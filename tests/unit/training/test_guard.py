"""Weights that are not finite are never saved."""

from __future__ import annotations

import pytest
import torch

from qwen3_npu.errors import Stopped
from qwen3_npu.training.guard import NanGuard


@pytest.mark.usefixtures("process")
def test_a_checkpoint_has_finite_weights() -> None:
    guard, device = NanGuard(10), torch.device("cpu")
    good = [torch.ones(3), torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(0)]
    guard.check_weights(good, 5, device)
    for bad in ("nan", "inf", "-inf"):
        with pytest.raises(Stopped, match="step 5: weights are NaN or Inf"):
            guard.check_weights([*good, torch.tensor([1.0, float(bad)])], 5, device)
