"""A poisoned batch is left out, in any layout; a rank with another bit than its replicas is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_resume import BASE

import tiny
from pairs import write_pairs
from qwen3_npu.parity.rows import PP2, ZERO
from worlds import World

STEPS, BAD = 30, 24  # the step whose samples are rubbish
GUARDED = [
    *BASE,
    "--train-iters",
    str(STEPS),
    "--lr",
    "3e-3",
    "--lr-decay-style",
    "constant",
    "--micro-batch-size",
    "4",
]
SAMPLES = list(range((BAD - 1) * 8, BAD * 8))


def test_after_a_rollback_losses_are_those_of_a_training_that_never_saw_the_samples(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    other = str(tiny.write_tokens(tmp_path / "other", seed=5))
    flags = [*GUARDED, "--load", models["tied"], "--data-path", "0.7", tokens, "0.3", other]
    never = worlds[1].run("spike_cases.spiked", flags=flags, rubbish=[], gone=SAMPLES)
    save = ["--save", str(tmp_path / "a"), "--save-interval", "10"]
    guarded = [*flags, *ZERO, *save, "--spike-guard", "rollback"]
    found = worlds[2].run("spike_cases.spiked", flags=guarded, rubbish=SAMPLES, gone=[])
    assert found["spikes"] == [BAD]
    assert found["losses"] == pytest.approx(never["losses"], rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "a" / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["number"], one["step"], one["action"]) for one in lines] == [(n, BAD, "left out") for n in SAMPLES]

    # Resumed before the spike, in another layout and without the guard, it still does not see them.
    shutil.rmtree(tmp_path / "a" / "iter_0000030")
    resumed = [*flags, *PP2, "--load", str(tmp_path / "a")]
    rest = worlds[2].run("spike_cases.spiked", flags=resumed, rubbish=SAMPLES, gone=[])
    assert rest["losses"] == pytest.approx(never["losses"][20:], rel=1e-5)


def test_spikes_are_left_out_on_all_ranks_and_too_many_rollbacks_end_the_training(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    flags = [*GUARDED, "--load", models["tied"], "--data-path", tokens, "--save", str(tmp_path)]
    skipped = worlds[2].run("spike_cases.spiked", flags=[*flags, "--spike-guard", "skip"], rubbish=SAMPLES, gone=[])
    assert (skipped["spikes"], len(skipped["losses"]), skipped["stopped"]) == ([BAD], STEPS - 1, None)
    ended = [*flags, "--spike-guard", "rollback", "--max-rollbacks", "0", "--finetune"]
    assert (
        "as many as --max-rollbacks allows"
        in worlds[2].run("spike_cases.spiked", flags=ended, rubbish=SAMPLES, gone=[])["stopped"]
    )


def test_pairs_whose_wrong_answer_is_preferred_are_left_out(worlds: dict[int, World], tmp_path: Path) -> None:
    """Of a preference training, whose losses have no natural ceiling."""
    model = tiny.write_model(tmp_path / "model", tiny.arch("untied", num_hidden_layers=1))
    flags = ["--stage", "dpo", "--load", str(model), "--data-path", write_pairs(tmp_path / "pairs", count=120)]
    flags += ["--seq-length", "64", "--global-batch-size", "4", "--micro-batch-size", "4", "--train-iters", "24"]
    flags += ["--lr", "3e-3", "--lr-decay-style", "constant", "--device", "cpu", "--eval-iters", "0"]
    flags += ["--split", "1,0,0"]
    swapped = list(range(21 * 4, 22 * 4))
    never = worlds[1].run("spike_cases.spiked", flags=flags, rubbish=[], gone=swapped)
    guarded = [*flags, "--save", str(tmp_path / "save"), "--save-interval", "20", "--spike-guard", "rollback"]
    found = worlds[1].run("spike_cases.spiked", flags=guarded, rubbish=swapped, gone=[])
    assert found["spikes"] == [22]
    assert found["losses"] == pytest.approx(never["losses"], rel=1e-5)


@pytest.mark.parametrize("what", ["weight", "exp_avg_sq"])
def test_a_flipped_bit_names_its_rank(what: str, worlds: dict[int, World], models: dict[str, str], tokens: str) -> None:
    flags = [*BASE, "--load", models["tied"], "--data-path", tokens, "--replica-check-interval", "1"]
    said = worlds[4].run("spike_cases.flipped", flags=flags, rank=2, what=what)
    assert len(set(said)) == 1
    assert said[0].startswith("step 1: silent corruption: rank 2 differs in ")
    assert "decoder.layers.1.mlp.linear_fc2.weight from the same on ranks 0, 1, 2, 3" in said[0]


STATE = {"weight", "exp_avg", "exp_avg_sq"}
HOLDERS = {  # flags -> what a rank holds then
    "whole": (["--no-bf16"], STATE),
    "sharded": (["--bf16", *ZERO], {*STATE, "float32 master"}),
    "halved": (["--bf16", *ZERO, "--reuse-fp32-param"], {*STATE, "float32 master"}),
    "on the host": (["--bf16", *ZERO, "--swap-optimizer"], {*STATE, "float32 master"}),
    "quantized": (["--bf16", "--lora-r", "2", "--qlora"], {*STATE, "float32 master", "frozen weight", "scales"}),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_every_bit_that_changes_between_two_updates_is_found_in_the_next_step(
    name: str, worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    extra, expected = HOLDERS[name]
    model = models["tied"]
    if name == "quantized":  # in blocks of 64
        model = str(tiny.write_model(tmp_path / "model", tiny.arch("untied", intermediate_size=128)))
    flags = [*BASE, "--load", model, "--data-path", tokens, "--train-iters", "30"]
    flags = [flag for flag in flags if flag not in ("--bf16", "--no-bf16")] + extra
    plain = worlds[2].run("train", flags=flags, steps=2)["loss"]
    found = worlds[2].run("spike_cases.flips", flags=[*flags, "--state-check-interval", "1"], rank=1)
    said = found["said"]
    assert said.keys() == {f"{what} of {kind}" for what in ("mantissa", "exponent") for kind in expected}
    for flip, texts in said.items():
        kind = flip.partition(" of ")[2]
        assert len(set(texts)) == 1
        assert str(texts[0]).startswith(f"step 2: silent corruption: on rank 1, {kind} "), (flip, texts[0])
        assert "changed between two updates; nothing is saved" in texts[0]
    assert found["losses"] == plain, "no update was made while a bit was wrong, and none is missing"
