"""Any way of cutting the model computes what one process computes: gradients, losses and their norms, fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3_npu.parity.measure import largest_difference
from qwen3_npu.parity.rows import EP2, FULL, OVERLAP, PIECES, PP2, RING, SP, TP2, ZERO, ParityRow, rows
from worlds import World

STEPS, FEWER = 10, 3
LONG = ("TP2", "TP2 SP", "PP2", "PP2 VPP2", "DP2 distributed optimizer", "TP2 PP2")  # all STEPS; of others, FEWER
BASE = ["--seq-length", "32", "--global-batch-size", "8", "--micro-batch-size", "2", "--lr", "3e-3"]
BASE += ["--train-iters", str(STEPS), "--lr-decay-style", "cosine", "--lr-warmup-iters", "2"]
BASE += ["--device", "cpu", "--eval-iters", "0"]


class Baselines:
    """What one process computes, once per model."""

    def __init__(self, world: World, models: dict[str, str], tokens: str, folder: Path) -> None:
        self.world, self.models, self.tokens, self.folder = world, models, tokens, folder
        self.results: dict[str, dict] = {}

    def flags(self, kind: str) -> list[str]:
        balance = ["--moe-aux-loss-coeff", "0.02", "--moe-z-loss-coeff", "0.01"] if kind == "moe" else []
        return [*BASE, "--load", self.models[kind], "--data-path", self.tokens, *balance]

    def of(self, kind: str) -> dict:
        if kind not in self.results:
            file = self.folder / f"{kind}.npz"
            self.results[kind] = self.world.run("gradients", flags=self.flags(kind), steps=STEPS, file=str(file))
            self.results[kind]["gradients"] = dict(np.load(file))
        return self.results[kind]


@pytest.fixture(scope="module")
def baselines(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path_factory: pytest.TempPathFactory
) -> Baselines:
    return Baselines(worlds[1], models, tokens, tmp_path_factory.mktemp("gradients"))


# Packed rows are in test_finetuning.py. Grouped by world size, so that few processes are up at a time.
ROWS = sorted((row for row in rows() if not row.packed), key=lambda row: row.size)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_equals_one_process(row: ParityRow, worlds: dict[int, World], baselines: Baselines, tmp_path: Path) -> None:
    expected = baselines.of(row.model)
    assert expected["loss"][-1] < expected["loss"][0] - 0.05, "the baseline does not learn; the comparison says little"
    file = tmp_path / "gradients.npz"
    flags = [*baselines.flags(row.model), *row.flags]
    steps = STEPS if row.layout in LONG else FEWER
    got = worlds[row.size].run("gradients", flags=flags, steps=steps, file=str(file))
    for name in ("loss", "grad_norm"):
        assert len(got[name]) == steps
        assert got[name] == pytest.approx(expected[name][:steps], rel=1e-5)
    difference, where = largest_difference(dict(np.load(file)), expected["gradients"])
    assert difference <= 1e-5, where


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
@pytest.mark.parametrize("extra", [[], ["--lora-r", "4"], ["--loss-compute-mode", "chunk"], ["--recompute-norm"], FULL])
def test_modules_are_called_for_their_parameters(
    kind: str, extra: list[str], worlds: dict[int, World], baselines: Baselines
) -> None:
    """--overlap-param-gather waits for parameters in calls of the modules that own them."""
    assert worlds[1].run("uncalled", flags=[*baselines.flags(kind), *extra]) == []


def test_tp_ranks_draw_different_dropout_masks(worlds: dict[int, World], baselines: Baselines) -> None:
    first, second = worlds[2].run("dropout_masks", flags=baselines.flags("untied") + TP2)
    assert first != second
    again = worlds[2].run("dropout_masks", flags=baselines.flags("untied") + TP2)
    assert again == [first, second], "the seed decides the masks"
    other = worlds[2].run("dropout_masks", flags=[*baselines.flags("untied"), *TP2, "--seed", "7"])
    assert other != [first, second], "the seed is really applied"


def test_expert_load_does_not_depend_on_the_layout(worlds: dict[int, World], baselines: Baselines) -> None:
    """Two steps of 8 x 32 tokens to 2 experts each, counted once, whoever computes them and however often."""
    flags = baselines.flags("moe")
    expected = worlds[1].run("expert_load", flags=flags)
    tokens = expected.pop("tokens")
    assert len(tokens) == 4
    assert all(sum(layer) == 2 * 8 * 32 * 2 for layer in tokens)
    assert expected["dropped"] == 0
    assert 1 <= expected["balance_loss"] < 2
    for size, extra in ((4, TP2 + SP + EP2), (2, [*PP2, "--noop-layers", "0,5"]), (2, RING), (1, FULL)):
        found = worlds[size].run("expert_load", flags=[*flags, *extra])
        assert found.pop("tokens") == tokens
        assert found == pytest.approx(expected, rel=1e-5)


def test_choices_that_a_capacity_drops_are_counted(worlds: dict[int, World], baselines: Baselines) -> None:
    flags = [*baselines.flags("moe"), "--moe-expert-capacity-factor", "0.75", "--moe-aux-loss-coeff", "0"]
    found = worlds[1].run("expert_load", flags=flags)
    kept = sum(map(sum, found["tokens"]))
    assert found["dropped"] == pytest.approx(1 - kept / (4 * 2 * 8 * 32 * 2), rel=1e-6)
    assert found["dropped"] >= 0.25
    assert found["balance_loss"] is None


# Four stages of two chunks; half of the eight layers are no-op layers, and the second stage has no other.
VPP2 = ["--num-layers-per-virtual-pipeline-stage", "1", "--noop-layers", "1,3,5,7"]


@pytest.mark.parametrize("stages", [2, 4])
def test_stages_that_exchange_in_pairs_compute_the_same(
    stages: int, worlds: dict[int, World], baselines: Baselines, tmp_path: Path
) -> None:
    """As in batched calls: bit for bit; with virtual stages, which have no other way, to rounding.

    A rank without any weight saves and checks what it has, too.
    """
    flags = [*baselines.flags("untied"), "--pipeline-model-parallel-size", str(stages)]
    batched, pairs = (
        worlds[stages].run("train", flags=[*flags, "--p2p-communication", how], steps=2) for how in ("batched", "pairs")
    )
    assert pairs == batched
    assert pairs["loss"] == pytest.approx(baselines.of("untied")["loss"][:2], rel=1e-5)
    if stages == 4:
        checked = ["--save", str(tmp_path), "--state-check-interval", "1"]
        virtual = worlds[4].run("train", flags=[*flags, *VPP2, *checked], steps=2)
        assert virtual["loss"] == pytest.approx(pairs["loss"], rel=1e-5)


def test_a_residual_in_float32_travels_between_stages(worlds: dict[int, World], baselines: Baselines) -> None:
    """In bfloat16, so as near as the branches' own rounding lets it be."""
    flags = [*baselines.flags("untied"), "--bf16", "--fp32-residual-connection"]
    alone = worlds[1].run("train", flags=flags, steps=2)
    together = worlds[4].run("train", flags=[*flags, *TP2, *SP, *PP2, *FULL], steps=2)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-2)


HIDDEN = {"in 4 pieces": {}, "in 1": {"pieces": 1}, "frozen": {"frozen": True}}


@pytest.mark.parametrize("name", HIDDEN)
def test_products_that_hide_communication_are_those_of_whole_matrices(name: str, worlds: dict[int, World]) -> None:
    """Forward, and the gradients of the input and of both weights; collectives end when they are waited for."""
    assert max(worlds[2].run("overlap_cases.differences", **HIDDEN[name]).values()) < 1e-6


# What is wrong in the products, and what of theirs shows it.
WRONG_PRODUCTS = {
    "pieces in another order": ("out[:, number])", "out[:, pieces - 1 - number])", "output"),
    "a piece is not waited for": ("            self.works[number].wait()\n", "", "output"),
    "a sum is not waited for": ("    for work in works:\n", "    for work in works[1:]:\n", "gradient of x"),
    "a piece dropped": ("ranks * rows, batch, -1)", "ranks * rows, batch, -1) * (number > 0)", "gradient of x"),
    "rows of another rank": (
        ".transpose(0, 1).contiguous()",
        ".transpose(0, 1).flip(1).contiguous()",
        "gradient of the second weight",
    ),
    "all pieces but the last one left out": (
        "functools.reduce(torch.add, parts)",
        "parts[-1]",
        "gradient of the second weight",
    ),
    "the second gather is not waited for": (
        "(gathered,) = ctx.again.arrived(lambda: None)",
        "gathered = ctx.again.whole",
        "gradient of the first weight",
    ),
}


@pytest.mark.parametrize("name", WRONG_PRODUCTS)
def test_wrong_products_are_noticed(name: str, worlds: dict[int, World]) -> None:
    old, new, noticed_by = WRONG_PRODUCTS[name]
    found = worlds[2].run("overlap_cases.differences", change=(old, new))
    assert not found[noticed_by] < 1e-3


def test_hidden_communication_keeps_no_more_for_backward(worlds: dict[int, World], baselines: Baselines) -> None:
    flags = [*baselines.flags("untied"), *TP2, *SP]
    plain, hidden = (worlds[2].run("activation_bytes", flags=[*flags, *more]) for more in ([], PIECES))
    assert [one["kept"] for one in hidden] == [one["kept"] for one in plain]


HIDDEN_IN = {
    "LoRA": ("untied", ["--lora-r", "4"]),
    "bias, recomputed norms": ("qwen2", ["--recompute-norm", "--recompute-activation-function"]),
}


@pytest.mark.parametrize("name", HIDDEN_IN)
def test_hidden_communication_changes_no_training(name: str, worlds: dict[int, World], baselines: Baselines) -> None:
    kind, extra = HIDDEN_IN[name]
    flags = [*baselines.flags(kind), *TP2, *SP, *extra]
    plain, hidden = (worlds[2].run("train", flags=[*flags, *more], steps=2) for more in ([], PIECES))
    assert hidden["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert hidden["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


MUON = ["--optimizer", "muon", "--muon-extra-scale-factor", "0.2", "--muon-use-nesterov"]
MUON_ON = {
    "TP2 SP PP2": ("untied", 4, [*TP2, *SP, *PP2]),
    "TP4 above the KV heads": ("few", 4, ["--tensor-model-parallel-size", "4"]),
    "TP2 EP2, distributed optimizer": ("moe", 4, [*TP2, *SP, *EP2, *ZERO]),
    "EP2 DP4, distributed optimizer, overlapped": ("moe", 4, [*EP2, *ZERO, *OVERLAP]),
    "CP2, distributed optimizer": ("untied", 2, [*RING, *ZERO]),
}


@pytest.mark.parametrize("name", MUON_ON)
def test_muon_learns_the_same_on_every_layout(name: str, worlds: dict[int, World], baselines: Baselines) -> None:
    kind, size, layout = MUON_ON[name]
    flags = [*baselines.flags(kind), *MUON]
    alone = worlds[1].run("train", flags=flags, steps=3)
    together = worlds[size].run("train", flags=[*flags, *layout], steps=3)
    assert abs(alone["loss"][2] - alone["loss"][0]) > 0.02, "hardly an update: the comparison says little"
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


def test_a_rank_holds_its_share_of_the_state_of_muon(worlds: dict[int, World], baselines: Baselines) -> None:
    """12 bytes of a weight, 8 of one that is in a matrix of a layer."""
    from safetensors.numpy import load_file

    weights = load_file(Path(baselines.models["untied"], "model.safetensors"))
    expected = sum((8 if ".layers." in name and w.ndim == 2 else 12) * w.size for name, w in weights.items())
    flags = [*baselines.flags("untied"), *MUON, "--bf16"]
    assert worlds[1].run("state_bytes", flags=flags) == [expected]
    shares = worlds[4].run("state_bytes", flags=[*flags, *ZERO])
    assert sum(shares) == expected
    assert max(shares) < 0.31 * expected
