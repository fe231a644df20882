"""Generation by one process: transformers' tokens, with and without caches, beams, distributions."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import generation
import tiny
from qwen3_npu.errors import UsageError
from qwen3_npu.platform import select_platform

LIMIT = 64


class Both:
    """Our model and transformers', with the same weights."""

    def __init__(self, made: Any, folder: Path) -> None:
        self.made, self.theirs = made, generation.transformers_model(folder)


@pytest.fixture(scope="module", params=["untied", "tied", "moe", "yarn"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, process: Any) -> Iterator[Both]:
    folder = tiny.write_model(tmp_path_factory.mktemp(request.param), tiny.arch(request.param))
    with generation.runner(select_platform("cpu"), process, folder) as made:
        yield Both(made, folder)


def greedy() -> Any:
    from qwen3_npu.inference.sampling import Sampling

    return Sampling()


def test_greedy_tokens_are_those_of_transformers(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = generation.prompts()
    # A token that is said in the middle of an answer becomes an end token, so that answers end at different times.
    eos = generation.transformers_answers(both.theirs, prompts, LIMIT)[1][20]
    monkeypatch.setattr(both.made, "plan", dataclasses.replace(both.made.plan, eos=(generation.EOS, eos)))
    expected = generation.transformers_answers(both.theirs, prompts, LIMIT, eos_token_id=[generation.EOS, eos])
    assert len({len(answer) for answer in expected}) > 2, "answers should end at different times"
    for engine in (
        {"slots": 3},  # others wait for a place
        {"slots": 8, "prefix_cache": False},
        {"slots": 8, "kv_cache": False},
        {"slots": 1},
    ):
        assert generation.generated(both.made, prompts, LIMIT, greedy(), **engine) == expected, engine


def test_beams_are_those_of_transformers(both: Both) -> None:
    from qwen3_npu.inference.beam import BeamSearch, beam_search
    from qwen3_npu.inference.engine import Request

    for prompt in generation.prompts()[2:4]:
        for beams, length_penalty in ((2, 1.0), (4, 0.3)):
            request = Request(0, list(prompt), 24)
            score = beam_search(both.made, request, BeamSearch(beams, length_penalty, greedy()))
            theirs = both.theirs.generate(
                torch.tensor([prompt]),
                max_new_tokens=24,
                num_beams=beams,
                length_penalty=length_penalty,
                do_sample=False,
                eos_token_id=generation.EOS,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            )
            assert request.tokens == theirs.sequences[0].tolist()
            assert score == pytest.approx(theirs.sequences_scores.item(), abs=1e-5)


def test_a_repetition_penalty_is_that_of_transformers(both: Both) -> None:
    from qwen3_npu.inference.sampling import Sampling

    prompts = generation.prompts()[:3]
    expected = generation.transformers_answers(both.theirs, prompts, 32, repetition_penalty=1.3)
    assert expected != generation.transformers_answers(both.theirs, prompts, 32)
    assert generation.generated(both.made, prompts, 32, Sampling(repetition_penalty=1.3)) == expected


def test_a_conversation_computes_only_what_is_new(both: Both) -> None:
    from qwen3_npu.inference.engine import Engine, Request

    engine = Engine(both.made, slots=1)
    first = Request(0, list(range(10, 40)), 8)
    engine.generate([first], greedy())
    second = Request(1, [*first.tokens, 50, 51, 52], 8)
    engine.generate([second], greedy())
    assert engine.reused == len(first.tokens) - 1  # the last token was never put into the model
    assert engine.computed == 30 + 1 + 3
    expected = generation.transformers_answers(both.theirs, [second.tokens[: second.prompt]], 8)
    assert second.generated == expected[0]


@pytest.mark.parametrize("pass_tokens", [16, 1000])
def test_scores_are_the_log_softmax_of_transformers(both: Both, pass_tokens: int) -> None:
    """Continuations of one and of three tokens, with beginnings that are shared and that are not."""
    from qwen3_npu.inference.scoring import Choice, Scorer

    prompts = generation.prompts()
    choices = [
        Choice((i, length), "alone" if i == len(prompts) - 1 else "shared", tuple(prompt), length)
        for i, prompt in enumerate(prompts)
        for length in (1, 3 if len(prompt) > 3 else 2)
    ]
    expected = {}
    for choice in choices:
        logits = both.theirs(torch.tensor([choice.tokens[:-1]])).logits[0].log_softmax(-1)
        targets = torch.tensor(choice.tokens[-choice.length :])
        expected[choice.key] = logits[-choice.length :].gather(1, targets[:, None]).sum().item()
    for prefix_cache in (True, False):
        scorer = Scorer(both.made, pass_tokens=pass_tokens, prefix_cache=prefix_cache)
        assert scorer.score(choices) == pytest.approx(expected, abs=1e-5)
        assert (scorer.reused > 0) == prefix_cache
        assert scorer.computed + scorer.reused == sum(len(prompt) - 1 for prompt in prompts)


def test_what_does_not_fit_the_positions(both: Both) -> None:
    from qwen3_npu.inference.engine import Engine, Request

    engine = Engine(both.made, slots=1)
    with pytest.raises(UsageError, match="600 tokens; the model has 512 positions"):
        engine.generate([Request(0, [5] * 600, 8)], greedy())
    with pytest.raises(UsageError, match="prompt 3 is empty"):
        engine.generate([Request(2, [], 8)], greedy())
    request = Request(0, [5] * 500, 100)
    engine.generate([request], greedy())
    assert len(request.generated) <= 12


def test_sampled_tokens_have_the_softmax_as_distribution() -> None:
    from qwen3_npu.inference.sampling import Sampling, choose_tokens

    draws = 20_000
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 1.5
    for sampling in (
        Sampling(True, seed=1),
        Sampling(True, temperature=0.5, seed=2),
        Sampling(True, top_k=5, seed=3),
        Sampling(True, temperature=1.5, top_p=0.7, seed=4),
    ):
        exact = expected_distribution(logits[0], sampling)
        chosen = choose_tokens(logits.expand(draws, -1), sampling, [[7]] * draws, range(draws))
        counts = collections.Counter(chosen.tolist())
        assert set(counts) <= {i for i, p in enumerate(exact) if p > 0}
        statistic = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(exact) if p > 0)
        assert statistic < 35, "chi-square with at most 11 degrees of freedom: above 35 once in 4,000 runs"


def expected_distribution(logits: torch.Tensor, sampling: Any) -> list[float]:
    """The distribution as transformers' own processors make it."""
    from transformers import generation as processors

    scores = logits.unsqueeze(0)
    scores = processors.TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = processors.TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = processors.TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.double().softmax(-1)[0].tolist()


def test_the_seed_decides_a_sample_and_the_batch_does_not(both: Both) -> None:
    from qwen3_npu.inference.sampling import Sampling

    prompts = generation.prompts()
    first = generation.generated(both.made, prompts, 16, Sampling(True, seed=5))
    assert generation.generated(both.made, prompts, 16, Sampling(True, seed=5), slots=1) == first
    assert generation.generated(both.made, prompts, 16, Sampling(True, seed=6)) != first


def test_decode_attention_equals_the_reference() -> None:
    from qwen3_npu.kernels import reference, torch_native

    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=draw) for shape in ((3, 8, 16), (3, 2, 10, 16), (3, 2, 10, 16)))
    for lengths in (None, [9, 4, 1]):  # of slots that have room for more
        options: dict[str, Any] = {"lengths": lengths or [9, 9, 9], "scale": 0.25}
        visible = None if lengths is None else torch.arange(9) < torch.tensor(lengths)[:, None]
        expected = reference.decode_attention(q, k, v, visible, **options)
        torch.testing.assert_close(torch_native.decode_attention(q, k, v, visible, **options), expected)
        # The definition itself, by the attention that training uses.
        for row, length in enumerate(options["lengths"]):
            keys, values = (x[row, :, :length].transpose(0, 1).unsqueeze(1) for x in (k, v))
            alone = reference.attention(q[row][None, None], keys, values, scale=0.25)
            torch.testing.assert_close(expected[row], alone[0, 0])
