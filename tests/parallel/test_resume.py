"""A training that is interrupted and resumed continues exactly; in another layout, to rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_npu.parity.rows import EP2, OVERLAP, PP2, SP, TP2, VPP, ZERO
from worlds import World

BASE = ["--seq-length", "32", "--global-batch-size", "8", "--micro-batch-size", "2", "--lr", "1e-3"]
BASE += ["--train-iters", "6", "--device", "cpu", "--lr-decay-style", "cosine", "--eval-iters", "0"]
MUON = ["--optimizer", "muon"]
ETP1, PADDED = ["--expert-tensor-parallel-size", "1"], ["--padded-vocab-size", "512"]


SAVED = {
    "torch": [],
    "torch, async": ["--async-save"],
    "torch_dist": ["--ckpt-format", "torch_dist"],
    "torch_dist, async": ["--ckpt-format", "torch_dist", "--async-save"],
}
SAME = {
    "one process": (1, [], "torch, async"),
    "one process, dropout": (1, ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"], "torch_dist"),
    "one process, bf16": (1, ["--bf16"], "torch_dist, async"),
    "one process, bf16, distributed optimizer": (1, ["--bf16", *ZERO], "torch"),
    "DP2 distributed optimizer": (2, ZERO, "torch_dist, async"),
    "DP2 distributed optimizer, bf16, Muon": (2, ["--bf16", *ZERO, *MUON], "torch, async"),
    "TP2 SP PP2 VPP2": (4, TP2 + SP + PP2 + VPP, "torch"),
    "TP2 DP2 distributed optimizer, dropout": (4, [*TP2, *ZERO, "--hidden-dropout", "0.1"], "torch_dist, async"),
}


@pytest.mark.parametrize("name", SAME)
def test_same_layout_continues_bit_for_bit(
    name: str, worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    size, extra, saved = SAME[name]
    flags = [*BASE, "--data-path", tokens, *extra]
    start = ["--load", models["tied"], "--save", str(tmp_path), *SAVED[saved]]
    whole = worlds[size].run("train", flags=flags + start, steps=6, save_after=3)
    rest = worlds[size].run("train", flags=[*flags, "--load", str(tmp_path)], steps=3)
    assert rest["loss"] == whole["loss"][3:]
    assert rest["grad_norm"] == whole["grad_norm"][3:]


SWAP = [*ZERO, "--swap-optimizer", "--swap-optimizer-times", "5"]
HALVES = [*ZERO, "--reuse-fp32-param"]
SLICED = {
    "on the host, bf16": ("moe", 2, ["--bf16"], SWAP),
    "on the host, fp32": ("untied", 1, [], SWAP),
    "in halves": ("moe", 2, ["--bf16"], HALVES),
}


@pytest.mark.parametrize("name", SLICED)
def test_masters_elsewhere_change_no_bit_and_are_resumed_from_and_into_plain_ones(
    name: str, worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    kind, size, dtype, sliced = SLICED[name]
    flags = [*BASE, *dtype, "--data-path", tokens]
    there, here = (["--save", str(tmp_path / folder)] for folder in ("there", "here"))
    start = ["--load", models[kind]]
    plain = worlds[size].run("train", flags=[*flags, *ZERO, *start, *here], steps=5, save_after=3)
    elsewhere = worlds[size].run("train", flags=[*flags, *sliced, *start, *there], steps=5, save_after=3)
    assert elsewhere == plain
    for saved, how in ((here, sliced), (there, ZERO)):
        rest = worlds[size].run("train", flags=[*flags, *how, "--load", saved[1]], steps=2)
        assert rest["loss"] == plain["loss"][3:]
        assert rest["grad_norm"] == plain["grad_norm"][3:]


OTHER = {
    "tied: DP2 distributed optimizer -> one process": ("tied", 2, ZERO, 1, []),
    "tied: one process -> TP2 PP2": ("tied", 1, [], 4, TP2 + PP2),
    "untied: TP2 PP2 VPP2 -> DP2 distributed optimizer": ("untied", 4, TP2 + PP2 + VPP, 2, ZERO),
    "moe: EP2 distributed optimizer -> TP2 SP": ("moe", 2, EP2 + ZERO, 2, TP2 + SP),
    "moe: TP2 SP EP2 distributed optimizer -> DP2, Muon": ("moe", 4, [*TP2, *SP, *EP2, *ZERO, *MUON], 2, MUON),
    "moe: DP2, Muon -> EP2 distributed optimizer, Muon": ("moe", 2, MUON, 2, [*EP2, *ZERO, *MUON]),
    "moe: TP2 SP EP2 -> PP2 distributed optimizer": ("moe", 4, TP2 + SP + EP2, 2, PP2 + ZERO),
    "moe: TP2 SP EP2 ETP1, padded -> DP2": ("moe", 2, [*TP2, *SP, *EP2, *ETP1, *PADDED], 2, []),
}


@pytest.fixture(scope="module")
def uninterrupted(worlds: dict[int, World], models: dict[str, str], tokens: str) -> Callable[..., dict]:
    """Kind, flags -> what six steps of one process do."""

    @functools.cache
    def run(kind: str, *more: str) -> dict:
        return worlds[1].run("train", flags=[*BASE, "--data-path", tokens, "--load", models[kind], *more], steps=6)

    return run


@pytest.mark.parametrize("name", OTHER)
def test_another_layout_continues_to_rounding(
    name: str,
    worlds: dict[int, World],
    models: dict[str, str],
    tokens: str,
    uninterrupted: Callable[..., dict],
    tmp_path: Path,
) -> None:
    kind, size, extra, other_size, other_extra = OTHER[name]
    flags = [*BASE, "--data-path", tokens]
    whole = uninterrupted(kind, *(MUON if MUON[1] in extra else ()))
    for ckpt_format, how in (("torch", []), ("torch_dist", ["--async-save"])):
        save = str(tmp_path / ckpt_format)
        start = [*flags, *extra, "--load", models[kind], "--save", save, "--ckpt-format", ckpt_format, *how]
        worlds[size].run("train", flags=start, steps=3)
        rest = worlds[other_size].run("train", flags=[*flags, *other_extra, "--load", save], steps=3)
        assert rest["loss"] == pytest.approx(whole["loss"][3:], rel=1e-5), ckpt_format
        assert rest["grad_norm"] == pytest.approx(whole["grad_norm"][3:], rel=1e-5), ckpt_format


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_megatron_reads_the_model_part(
    kind: str, worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    """megatron_core.dist_checkpointing, on what a training at TP2 saved."""
    flags = [*BASE, "--data-path", tokens]
    start = [*flags, *TP2, "--load", models[kind], "--save", str(tmp_path), "--ckpt-format", "torch_dist"]
    worlds[2].run("train", flags=start, steps=1)
    load = [*flags, "--load", str(tmp_path)]
    read = worlds[1].run("megatron_reads", flags=load, folder=str(tmp_path / "iter_0000001"))
    assert read["parameters"] > 30
    assert read["iteration"] == 1


def test_finetune_and_no_load_optim_start_over(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    """From weights that a rank had only its share of when they were saved: the next step would have gathered them."""
    flags = [*BASE, "--data-path", tokens]
    start = [*flags, *ZERO, *OVERLAP, "--load", models["tied"], "--save", str(tmp_path)]
    worlds[2].run("train", flags=start, steps=3)
    resumed = worlds[1].run("train", flags=[*flags, "--load", str(tmp_path)], steps=1)
    finetuned = worlds[1].run("train", flags=[*flags, "--load", str(tmp_path), "--finetune"], steps=1)
    assert finetuned["loss"] != resumed["loss"], "another first batch"
    fresh = worlds[1].run("train", flags=[*flags, "--load", str(tmp_path), "--no-load-optim"], steps=2)
    assert fresh["loss"][0] == resumed["loss"][0]


def test_the_flags_say_what_the_schedule_is(
    worlds: dict[int, World], models: dict[str, str], tokens: str, uninterrupted: Callable[[str], dict], tmp_path: Path
) -> None:
    """A training that is made longer does not go on at the learning rate 0 at which it ended."""
    flags = [*BASE, "--data-path", tokens]
    start = ["--load", models["tied"], "--save", str(tmp_path), "--train-iters", "3"]
    ended = worlds[1].run("train", flags=flags + start, steps=3)["learning_rate"]
    whole = uninterrupted("tied")["learning_rate"]
    assert ended[1:] < whole[1:3]
    rest = worlds[1].run("train", flags=[*flags, "--load", str(tmp_path)], steps=3)
    assert rest["learning_rate"] == whole[3:]
    for more, word in (([], "lr_decay_steps 24 -> 48"), (["--train-iters", "3"], None)):
        said = worlds[1].run("resumed", flags=[*flags, *more, "--load", str(tmp_path)])["said"]
        assert [word in line for line in said if line.startswith("schedule: the flags decide")] == [True] * bool(word)


def test_another_training_is_not_resumed_in_silence(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    """The position counts samples, which another seed or length would repeat or skip."""
    flags = [*BASE, "--data-path", tokens]
    worlds[1].run("train", flags=[*flags, "--load", models["tied"], "--save", str(tmp_path)], steps=1)
    load = [*flags, "--load", str(tmp_path)]
    changes = {
        "seed": (["--seed", "7"], "seed 1234, now 7"),
        "seq_length": (["--seq-length", "64"], "seq_length 32, now 64"),
        "bf16": (["--bf16"], "bf16 False, now True"),
        "global_batch_size": (["--global-batch-size", "4"], "global_batch_size 8, now 4"),
        "rope_scaling": (["--rotary-seq-len-interpolation-factor", "2"], "rope_scaling plain RoPE, now"),
    }
    for name, (more, told) in changes.items():
        answer = worlds[2].run("resumed", flags=[*load, *more])
        assert told in answer["error"]
        assert answer["error"].endswith(f"--allow-changed {name}")
    more = ["--seed", "7", "--adam-beta2", "0.5", "--lr", "0.1", "--allow-changed", "seed"]
    allowed = worlds[1].run("resumed", flags=[*load, *more])
    assert (allowed["iteration"], allowed["error"]) == (1, None)
    warned = [line for line in allowed["said"] if line.startswith("resumed with another setting")]
    told = ("seed 1234, now 7", "adam_beta2 0.999, now 0.5", "lr 0.001, now 0.1")
    assert [text in line for text, line in zip(told, warned, strict=True)] == [True] * 3
    assert worlds[1].run("resumed", flags=[*load, "--seed", "7", "--finetune"])["iteration"] == 0
    same = worlds[2].run("resumed", flags=load)
    assert (same["iteration"], [line for line in same["said"] if "not compared" in line]) == (1, [])


@pytest.mark.parametrize(
    ("extra", "beside"),
    [(TP2, []), ([*ZERO, "--ckpt-format", "torch_dist"], ["--async-save"])],
    ids=["TP2", "distributed optimizer, async"],
)
def test_each_node_gets_the_whole_checkpoint(
    extra: list[str], beside: list[str], worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    """Two nodes, each with a disk of its own: the same files as on a shared one, from which anybody goes on."""
    flags = [*BASE, "--data-path", tokens, *extra]
    start = ["--load", models["tied"]]
    shared = ["--save", str(tmp_path / "shared")]
    whole = worlds[2].run("train", flags=[*flags, *start, *shared], steps=3, save_after=2)["loss"]
    own = ["--save", str(tmp_path / "nodeRANK"), "--save-per-node", *beside]
    worlds[2].run("train_per_node", flags=[*flags, *start, *own], steps=2)
    folders = [tmp_path / name for name in ("shared", "node0", "node1")]
    for folder in folders:
        assert (folder / "latest_checkpointed_iteration.txt").read_text() == "2"
    sums = [
        {path.relative_to(folder): path.read_bytes() for path in folder.glob("iter_*/**/*") if path.is_file()}
        for folder in folders
    ]
    assert len(sums[0]) >= 3
    assert sums[1] == sums[0]
    assert sums[2] == sums[0]
    rest = worlds[2].run("train_per_node", flags=[*flags, "--load", own[1], *own], steps=1)["loss"]
    assert rest == [pytest.approx(whole[2], rel=1e-6)]
    load = ["--load", str(tmp_path / "node1"), "--ckpt-step", "2"]
    alone = worlds[1].run("train", flags=[*flags[: len(BASE) + 2], *load], steps=1)["loss"]
    assert alone == [pytest.approx(whole[2], rel=1e-5)]


def test_a_folder_that_nodes_share_is_none_of_their_own(worlds: dict[int, World], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    assert worlds[2].run("own_folders", folders=[str(folder) for folder in folders]) == ""
    assert "is shared by the nodes; drop --save-per-node" in worlds[2].run("own_folders", folders=[str(tmp_path)] * 2)
    assert sorted(tmp_path.iterdir()) == folders
