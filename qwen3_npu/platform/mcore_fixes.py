"""What of megatron-core 0.16.1 does not work, on every device.

`FIXED` are names that it uses without Transformer Engine although only Transformer Engine defines them; a test pins
the list. Recomputed dropout draws other numbers than forward did; see `_name_streams`.
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
    """Define the missing names, and mend recomputation; names that Transformer Engine defines do not change."""
    from megatron.core.tensor_parallel import random

    for name, value in FIXED.items():
        attribute = name.rsplit(".", 1)[1]
        if not hasattr(random, attribute):
            setattr(random, attribute, value)
    if not hasattr(random._get_all_rng_states, "names_stream"):
        _name_streams()


def _name_streams() -> None:
    """Let recomputation restore also which stream of random numbers is drawn from.

    Under sequence parallelism the layers run inside the tracker's `fork`, and attention's dropout forks again. It goes
    on with the outer fork's numbers, since the tracker knows the name of the stream that is drawn from. megatron
    restores states without this name. Attention that is recomputed after a hidden dropout then drew from where the last
    fork had ended: it dropped other weights than forward had, and gradients were wrong.
    """
    from megatron.core.tensor_parallel import random

    get, put = random._get_all_rng_states, random._set_all_rng_states

    def get_named() -> tuple[object, ...]:
        return *get(), random.get_cuda_rng_tracker()._current_state_name

    def put_named(*states: object) -> None:
        put(*states[:-1])
        random.get_cuda_rng_tracker()._current_state_name = states[-1]

    vars(get_named)["names_stream"] = True
    random._get_all_rng_states, random._set_all_rng_states = get_named, put_named
