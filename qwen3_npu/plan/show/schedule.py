"""The times at which each pipeline stage computes: the 1F1B and the interleaved schedule in megatron-core's order."""

from __future__ import annotations

from typing import NamedTuple

from qwen3_npu.plan.setup import Setup


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one model chunk.

    Attributes:
        start, end: seconds.
    """

    stage: int
    chunk: int
    micro_batch: int
    is_forward: bool
    start: float
    end: float


def order(setup: Setup, stage: int) -> list[tuple[bool, int, int]]:
    """(is forward, micro-batch, chunk) of a stage's passes in order (Narayanan et al., arXiv:2104.04473)."""
    stages, chunks, passes = setup.pipeline, setup.virtual, setup.num_microbatches
    total = passes * chunks
    # Interleaved, `stages` micro-batches go through a chunk before the next one is taken.
    ids = [
        (group + number, chunk)
        for group in range(0, passes, stages)
        for chunk in range(chunks)
        for number in range(min(stages, passes - group))
    ]
    ids = ids if chunks > 1 else [(number, 0) for number in range(passes)]
    back = [(number, chunks - 1 - chunk) for number, chunk in ids]
    ahead = stages - stage - 1 if chunks == 1 else (stages - stage - 1) * 2 + (chunks - 1) * stages
    ahead = min(total, ahead + int(setup.interleaved))  # a forward pass needs another one's backward beside it
    found = [(True, *one) for one in ids[:ahead]]
    for number in range(total):
        found += [(True, *ids[number + ahead])] if number + ahead < total else []
        found.append((False, *back[number]))
    return found


def timeline(setup: Setup, forward: float, backward: float) -> list[Pass]:
    """Every pass of a step.

    Args:
        forward, backward: seconds of a micro-batch in all chunks of a stage.
    """
    last, chunks = setup.pipeline - 1, setup.virtual
    seconds = {True: forward / chunks, False: backward / chunks}
    waiting = {stage: order(setup, stage) for stage in range(setup.pipeline)}
    free, done = [0.0] * setup.pipeline, []
    ends: dict[tuple[bool, int, int, int], float] = {}
    while any(waiting.values()):
        for stage, passes in waiting.items():
            while passes:
                is_forward, number, chunk = passes[0]
                before = _before((stage, chunk), -1 if is_forward else 1, last, chunks)
                key = (is_forward, number, *before) if before else (True, number, last, chunks - 1)
                is_first = is_forward and before is None
                if not is_first and key not in ends:
                    break
                start = max(free[stage], 0.0 if is_first else ends[key])
                free[stage] = ends[is_forward, number, stage, chunk] = start + seconds[is_forward]
                done.append(Pass(stage, chunk, number, is_forward, start=start, end=free[stage]))
                passes.pop(0)
    return done


def _before(place: tuple[int, int], step: int, last: int, chunks: int) -> tuple[int, int] | None:
    """The stage and chunk of the previous pass of the same kind; None if there is none.

    Args:
        step: difference from a stage to the previous one; -1 in forward.
    """
    stage, chunk = place
    chunk += 0 if 0 <= stage + step <= last else step
    return ((stage + step) % (last + 1), chunk) if 0 <= chunk < chunks else None
