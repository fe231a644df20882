"""Cases of generation; each runs on every rank and returns something for JSON."""

from __future__ import annotations

from typing import Any

import generation


def answers(platform: Any, world: Any, folder: str, flags: list[str]) -> dict[str, list[list[int]]]:
    """Answers to the prompts by greedy decoding with different engines, by sampling and by beams."""
    from qwen3_npu.inference.beam import BeamSearch, beam_search
    from qwen3_npu.inference.engine import Request
    from qwen3_npu.inference.sampling import Sampling

    prompts = generation.prompts()
    with generation.runner(platform, world, folder, *flags) as made:
        found = {
            "greedy": generation.generated(made, prompts, 64, Sampling()),
            "no prefix cache": generation.generated(made, prompts, 12, Sampling(), prefix_cache=False, slots=2),
            "no cache": generation.generated(made, prompts, 8, Sampling(), kv_cache=False),
            "sampled": generation.generated(made, prompts, 12, Sampling(True, 0.8, 20, 0.9, seed=11)),
        }
        request = Request(0, list(prompts[2]), 12)
        beam_search(made, request, BeamSearch(3, 1.0, Sampling()))
        while made.anyone(False):
            made.idle()
        return {**found, "beams": [request.generated]}
