"""Cases of generation; each runs on every rank and returns something for JSON."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import generation
import llama  # noqa: F401 - registers a family
import serving
from qwen3_npu import cli
from qwen3_npu.inference.plan import plan_inference


def answers(platform: Any, world: Any, folder: str, flags: list[str]) -> dict[str, list[list[int]]]:
    """Answers to the prompts by greedy decoding with different engines, by sampling and by beams."""
    from qwen3_npu.inference.beam import BeamSearch, beam_search
    from qwen3_npu.inference.engine import Request
    from qwen3_npu.inference.sampling import Sampling

    prompts = generation.prompts()
    with generation.runner(platform, world, folder, *flags) as made:
        found = {
            "greedy": generation.generated(made, prompts, 24, Sampling()),
            "no prefix cache": generation.generated(made, prompts, 12, Sampling(), prefix_cache=False, slots=2),
            "no cache": generation.generated(made, prompts, 8, Sampling(), kv_cache=False),
            "sampled": generation.generated(made, prompts, 12, Sampling(True, 0.8, 20, 0.9, seed=11)),
        }
        request = Request(0, list(prompts[2]), 12)
        beam_search(made, request, BeamSearch(3, 1.0, Sampling()))
        while made.anyone(False):
            made.idle()
        return {**found, "beams": [request.generated]}


def likelihoods(platform: Any, world: Any, folder: str, flags: list[str], data: str, out: str) -> list[list[float]]:
    """Log-likelihoods of MMLU's choices, as `evaluation.py` writes them into samples_mmlu.jsonl."""
    words = ["--load", folder, "--task", "mmlu", "--task-data-path", data, "--device", "cpu", "--log-samples"]
    evaluated(platform, world, [*words, "--output-dir", out, *flags])
    samples = (json.loads(line) for line in (Path(out) / "samples_mmlu.jsonl").open()) if world.rank == 0 else ()
    return [sample["loglikelihoods"] for sample in samples]


def served(platform: Any, world: Any, folder: str, flags: list[str], texts: list[str]) -> list[str]:
    """What a server on all ranks answers to texts that are asked at the same time."""
    serve, listening = serving.start(platform, world, folder, [*flags, "--predict-batch-size", "3"])
    found: list[str] = []

    def ask() -> None:
        server = listening.get(timeout=120)
        try:
            with ThreadPoolExecutor(len(texts)) as pool:
                bodies = [{"prompt": text, "max_tokens": 6, "temperature": 0, "logprobs": 1} for text in texts]
                answers = pool.map(lambda body: serving.post(f"{server.url}/v1/completions", body), bodies)
                found.extend(answer["choices"][0]["text"] for answer in answers)
        finally:
            server.desk.stop()

    client = threading.Thread(target=ask)
    if world.rank == 0:
        client.start()
    serve()
    if world.rank == 0:
        client.join()
    return found


def harnessed(platform: Any, world: Any, folder: str, flags: str, out: str) -> dict[str, Any]:
    """What lm-evaluation-harness says of the model `qwen3-npu` on all ranks; only a node's first one is told."""
    import harness_tasks
    from qwen3_npu.distributed import launch
    from qwen3_npu.evaluation.harness import Qwen3Harness

    place = Path(out) / str(world.rank)
    place.mkdir()
    with mock.patch.object(launch, "process_group", return_value=contextlib.nullcontext(world)):
        made = Qwen3Harness.create_from_arg_string(f"load={folder},{flags}", {"device": "cpu"})
    found = harness_tasks.evaluated(made, place)
    copies = made.runner.data_parallel
    made.close()
    return {"copies": copies, **({name: found[name] for name in ("results", "samples")} if found else {})}


def evaluated(platform: Any, world: Any, flags: list[str]) -> None:
    """What `evaluation.py` does with these flags."""
    from qwen3_npu.args.evaluation import FOREIGN, GROUPS, EvaluationArgs
    from qwen3_npu.evaluation.run import evaluate

    args = EvaluationArgs(*cli.parse("evaluation.py", "", GROUPS, FOREIGN, argv=flags).groups)
    plan = plan_inference(
        args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=world.size
    )
    evaluate(platform, world, args, plan)


def generated(platform: Any, world: Any, flags: list[str]) -> None:
    """What `inference.py` does with these flags."""
    from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs
    from qwen3_npu.inference.run import generate

    args = InferenceArgs(*cli.parse("inference.py", "", GROUPS, FOREIGN, argv=flags).groups)
    plan = plan_inference(
        args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=world.size
    )
    generate(platform, world, args, plan)
