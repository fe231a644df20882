"""The first import of megatron-core, without parts that it would load needlessly.

Measured on a CPU with torch 2.13 and wandb installed: 3.4 s of processor time per process instead of 5.5 s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from qwen3_npu.errors import UsageError

VERSION = "0.16.1"  # of megatron-core, as in pyproject.toml
F = TypeVar("F", bound=Callable[..., object])


def _uncompiled(function: F) -> F:
    return function


def import_megatron() -> None:
    """Import megatron-core: its helpers are not compiled, and wandb is not loaded.

    Its `jit_fuser` is torch.compile while the package is being imported, so each helper that it decorates there would
    load torch's compiler and call it at the first use: `disable_jit_fuser` alone comes too late for those. Its
    inference engine, which we do not use, imports wandb where that is installed.

    Raises:
        UsageError: another version is imported, such as that of a checkout of Megatron-LM on PYTHONPATH.
    """
    compiler, wandb = torch.compile, sys.modules.get("wandb")
    torch.compile = _uncompiled  # type: ignore[assignment]
    sys.modules["wandb"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        import megatron.core

        found = getattr(megatron.core, "__version__", "of an unknown version")
        if found != VERSION:
            text = f"megatron.core {found} is imported from {megatron.core.__file__}; {VERSION} is needed"
            raise UsageError(f"{text}: look at PYTHONPATH and at the folder that the program is started in")
        from megatron.core import jit
    finally:
        torch.compile = compiler
        del sys.modules["wandb"]
        if wandb is not None:
            sys.modules["wandb"] = wandb
    jit.disable_jit_fuser()  # for what is imported later
