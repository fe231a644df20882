"""Names that megatron-core 0.16.1 uses without Transformer Engine although only Transformer Engine defines them.

`FIXED` is the whole list, on every device; a test pins it.
"""

from __future__ import annotations

import contextlib


class _NoFp8:
    """The answers of Transformer Engine's FP8GlobalStateManager without FP8."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def get_fp8_recipe() -> None:
        return None


def _nothing(*args: object, **kwargs: object) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


# `CheckpointWithoutOutput(fp8=False)` means FP8 (it asks `is not None`), so recomputing a norm raises NameError.
_RANDOM = "megatron.core.tensor_parallel.random"
FIXED: dict[str, object] = {
    f"{_RANDOM}.FP8GlobalStateManager": _NoFp8,
    f"{_RANDOM}.activation_recompute_forward": _nothing,
    f"{_RANDOM}.fp8_autocast": _nothing,
}


def apply() -> None:
    """Define the missing names; names that Transformer Engine defines do not change."""
    from megatron.core.tensor_parallel import random

    for name, value in FIXED.items():
        attribute = name.rsplit(".", 1)[1]
        if not hasattr(random, attribute):
            setattr(random, attribute, value)
