"""Training on simulated NPUs equals training on the CPU: losses and gradient norms, fp32."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tiny
from pairs import write_pairs
from worlds import CaseFailed, World

STEPS = 3
FLAGS = ["--seq-length", "32", "--global-batch-size", "2", "--lr", "3e-3", "--train-iters", str(STEPS)]
FLAGS += ["--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--eval-iters", "0"]

TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]
EP2 = ["--expert-model-parallel-size", "2"]
ZERO = ["--use-distributed-optimizer"]
ULYSSES = ["--context-parallel-size", "2", "--context-parallel-algo", "ulysses_cp_algo"]
RING = ["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
SWAPPED = ["--swap-attention", "--swap-modules", "input_norm,self_attention,post_attention_norm"]

BALANCED = ["--moe-aux-loss-coeff", "0.02"]
CAPACITY = ["--moe-expert-capacity-factor", "1.0"]
YARN = ["--rope-scaling-type", "yarn", "--rope-scaling-factor", "4"]
YARN += ["--rope-scaling-original-max-position-embeddings", "16"]

# What is computed, apart from how: kind of model and flags.
TRAININGS = {
    "dense": ("untied", []),
    "packed": ("untied", ["--reset-attention-mask", "--reset-position-ids", *YARN]),
    "LoRA": ("untied", ["--lora-r", "4"]),
    "MoE": ("moe", BALANCED),
    "MoE packed LoRA": (
        "moe",
        [*BALANCED, "--reset-attention-mask", "--reset-position-ids", "--lora-r", "4", "--global-batch-size", "4"],
    ),
    "MoE that drops": ("moe", [*BALANCED, *CAPACITY, "--moe-z-loss-coeff", "1e-3"]),
    "MoE that drops, padded": ("moe", [*BALANCED, "--stage", "sft", *CAPACITY]),
    "MoE that drops late tokens": ("moe", [*BALANCED, *CAPACITY, "--moe-token-drop-policy", "position"]),
    "tied in chunks": ("tied", ["--loss-compute-mode", "chunk", "--loss-chunk-size", "8"]),
    "Muon": ("untied", ["--optimizer", "muon"]),
    "PiSSA DoRA": ("moe", ["--lora-r", "4", "--lora-init", "pissa", "--use-dora"]),
    "QLoRA": ("wide", ["--lora-r", "4", "--qlora", "--qlora-embedding"]),
    "MoE QLoRA": ("wide moe", [*BALANCED, "--lora-r", "4", "--qlora", "--qlora-double-quant"]),
    "DPO": ("untied", ["--stage", "dpo", "--seq-length", "64"]),
    "LoRA that drops": (
        "moe",
        [*BALANCED, "--lora-r", "4", "--lora-dropout", "0.3", "--hidden-dropout", "0.1", "--attention-dropout", "0.2"],
    ),
}
CASES = {
    "dense: one device": ("dense", 1, []),
    "dense: full recompute": ("dense", 1, FULL),
    "packed: one device": ("packed", 1, []),
    "LoRA: one device": ("LoRA", 1, []),
    "MoE: one device": ("MoE", 1, []),
    "dense: TP2 SP": ("dense", 2, TP2),
    "dense: PP2 VPP2, activations swapped": ("dense", 2, [*PP2, *VPP, *SWAPPED, "--recompute-num-layers", "1"]),
    "dense: CP2 ulysses": ("dense", 2, ULYSSES),
    "dense: DP2 distributed optimizer, overlapped": (
        "dense",
        2,
        [*ZERO, "--overlap-grad-reduce", "--overlap-param-gather"],
    ),
    "packed: CP2 ring": ("packed", 2, RING),
    "MoE: EP2, exchange hidden": ("MoE", 2, [*EP2, "--moe-alltoall-overlap-comm"]),
    "LoRA: TP2 SP, selective recompute, swapped": (
        "LoRA",
        2,
        [*TP2, "--swap-attention", "--recompute-granularity", "selective"],
    ),
    "MoE: EP2 distributed optimizer, swapped": (
        "MoE",
        2,
        [*EP2, *ZERO, "--swap-optimizer", "--swap-optimizer-times", "3", *SWAPPED],
    ),
    "MoE: TP2 SP": ("MoE", 2, TP2),
    "MoE: CP2 ring": ("MoE", 2, RING),
    "MoE packed LoRA: EP2, passes interleaved": ("MoE packed LoRA", 2, [*EP2, "--moe-fb-overlap"]),
    "MoE: gathered": ("MoE", 2, [*EP2, "--moe-token-dispatcher-type", "allgather"]),
    "MoE that drops: EP2": ("MoE that drops", 2, EP2),
    "MoE that drops, padded: EP2": ("MoE that drops, padded", 2, EP2),
    "MoE that drops: EP2, full experts": ("MoE that drops", 2, [*EP2, "--moe-pad-expert-input-to-capacity"]),
    "MoE that drops late tokens: one device": ("MoE that drops late tokens", 1, []),
    "MoE that drops late tokens: one device, full experts": (
        "MoE that drops late tokens",
        1,
        ["--moe-pad-expert-input-to-capacity"],
    ),
    "tied in chunks: norms and activation again": (
        "tied in chunks",
        1,
        ["--recompute-norm", "--recompute-activation-function", "--deterministic"],
    ),
    "Muon: TP2 SP": ("Muon", 2, TP2),
    "PiSSA DoRA: one device": ("PiSSA DoRA", 1, []),
    "QLoRA: TP2 SP": ("QLoRA", 2, TP2),
    "MoE QLoRA: EP2 distributed optimizer, swapped": (
        "MoE QLoRA",
        2,
        [*EP2, *ZERO, "--swap-optimizer", *SWAPPED, "--moe-zero-memory", "level0"],
    ),
    "DPO: one device": ("DPO", 1, []),
}


class Trainings:
    """The flags of a training, and what the CPU computes for it.

    LoRA's random updates differ between devices: such a training goes on from a checkpoint.
    """

    def __init__(self, world: World, models: dict[str, str], tokens: str, folder: Path) -> None:
        self.world, self.models, self.folder = world, models, folder
        self.data = {"pt": tokens, "dpo": write_pairs(folder / "pairs")}
        self.data["sft"] = str(tiny.write_instructions(folder / "sft"))
        self.results: dict[str, dict] = {}

    def flags(self, name: str) -> list[str]:
        kind, extra = TRAININGS[name]
        stage = extra[extra.index("--stage") + 1] if "--stage" in extra else "pt"
        flags = [*FLAGS, "--data-path", self.data[stage], *extra]
        if "--lora-r" not in extra or "pissa" in extra:
            return [*flags, "--load", self.models[kind]]
        start = self.folder / name
        if not start.exists():
            self.world.run("train", flags=[*flags, "--load", self.models[kind], "--save", str(start)], steps=1)
        if "--qlora" in extra:  # an adapter alone is saved
            return [*flags, "--load", self.models[kind], "--lora-load", str(start)]
        return [*flags, "--load", str(start), "--no-load-rng"]

    def on_cpu(self, name: str) -> dict:
        if name not in self.results:
            self.results[name] = self.world.run("train", flags=self.flags(name), steps=STEPS)
        return self.results[name]


@pytest.fixture(scope="module")
def trainings(
    cpu_world: World, models: dict[str, str], tokens: str, tmp_path_factory: pytest.TempPathFactory
) -> Trainings:
    return Trainings(cpu_world, models, tokens, tmp_path_factory.mktemp("starts"))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_cpu(name: str, npu_worlds: dict[int, World], trainings: Trainings) -> None:
    training, size, extra = CASES[name]
    expected = trainings.on_cpu(training)
    got = npu_worlds[size].run("train", flags=trainings.flags(training) + extra, steps=STEPS)
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("extra", [[], ["--lora-r", "4"]], ids=["full", "LoRA"])
def test_a_training_with_fused_products_equals_the_plain_one(
    extra: list[str], npu_worlds: dict[int, World], trainings: Trainings, tokens: str, tmp_path: Path
) -> None:
    """MC2, in float32: a gather and a scatter of each pair of linears forward, and the other way round back.

    The gradient of a column-parallel weight needs the gathered input: its scatter is in pieces. With adapters it is
    not, and the first layer's input has no gradient.
    """
    arch = tiny.arch(num_hidden_layers=2, hidden_size=256, intermediate_size=512, head_dim=64)
    flags = [*FLAGS, "--data-path", tokens, "--load", str(tiny.write_model(tmp_path / "wide", arch)), *extra]
    if extra:  # the update of an adapter's beginning is drawn by the device
        trainings.world.run("train", flags=[*flags, "--save", str(tmp_path / "start")], steps=1)
        flags = [*flags[:-4], "--load", str(tmp_path / "start"), "--no-load-rng", *extra]
    expected = trainings.world.run("train", flags=flags, steps=STEPS - 1)
    got = npu_worlds[2].run("fused_training", flags=[*flags, *TP2, "--use-ascend-mc2"], steps=STEPS - 1)
    passes = 2 * 2 * (STEPS - 1)  # layers, micro-batches
    assert got["calls"] == [4 * passes, 4 * passes - 2 * (STEPS - 1) if extra else 2 * passes]
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_stages_that_exchange_in_pairs_compute_the_same(npu_worlds: dict[int, World], trainings: Trainings) -> None:
    """As in batched calls: bit for bit."""
    flags = [*trainings.flags("dense"), *PP2]
    batched, pairs = (
        npu_worlds[2].run("train", flags=[*flags, "--p2p-communication", how], steps=2) for how in ("batched", "pairs")
    )
    assert pairs == batched
    assert pairs["loss"] == pytest.approx(trainings.on_cpu("dense")["loss"][:2], rel=1e-5)


def test_the_trainings_differ(npu_worlds: dict[int, World], trainings: Trainings) -> None:
    """Else the comparisons would say less than they seem to."""
    names = {training for training, _, _ in CASES.values()}
    losses = {name: trainings.on_cpu(name)["loss"][2] for name in names}  # the first update has no learning rate
    assert len(set(losses.values())) == len(names), losses


def test_what_is_dropped_is_dropped_alike(npu_worlds: dict[int, World], trainings: Trainings, tmp_path: Path) -> None:
    """With the masks of the device the CPU computes the same; what is computed again in backward drops the same."""
    flags, steps, masks = trainings.flags("LoRA that drops"), 2, str(tmp_path / "masks.npz")
    found = npu_worlds[1].run("dropout_cases.noted", flags=flags, steps=steps, file=masks)
    passes, layers = 2 * steps, 4
    linears = 4  # of a layer: qkv, projection, and two of all experts
    assert found.pop("drawn") == {
        "0.1": passes * (1 + 2 * layers),
        "0.2": passes * layers,
        "0.3": passes * linears * layers,
    }
    assert npu_worlds[1].run("train", flags=[*flags, *FULL], steps=steps) == found
    on_cpu = [*flags, "--kernels", "reference"]
    expected = trainings.world.run("dropout_cases.replayed", flags=on_cpu, steps=steps, file=masks)
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize(
    ("size", "extra"),
    [(1, []), (2, [*EP2, *ZERO, "--swap-optimizer"])],
    ids=["one device", "EP2 distributed optimizer, swapped"],
)
def test_a_resumed_training_continues(
    size: int, extra: list[str], npu_worlds: dict[int, World], trainings: Trainings, tmp_path: Path
) -> None:
    """Saved on the NPU and resumed there: as without the interruption, bit for bit; and the CPU can go on from it."""
    flags, world = trainings.flags("MoE") + extra, npu_worlds[size]
    world.run("train", flags=[*flags, "--save", str(tmp_path)], steps=STEPS - 1)
    rest = world.run("train", flags=[*flags, "--load", str(tmp_path)], steps=1)
    expected = trainings.on_cpu("MoE")["loss"][-1]
    assert rest["loss"] == pytest.approx([expected], rel=1e-5)
    flags = [*trainings.flags("MoE"), "--load", str(tmp_path), "--no-load-rng"]
    on_cpu = trainings.world.run("train", flags=flags, steps=1)
    assert on_cpu["loss"] == pytest.approx([expected], rel=1e-5)


def test_bfloat16_learns(npu_worlds: dict[int, World], trainings: Trainings) -> None:
    losses = npu_worlds[1].run("train", flags=[*trainings.flags("MoE"), "--bf16"], steps=STEPS)["loss"]
    assert losses == pytest.approx(trainings.on_cpu("MoE")["loss"], rel=5e-3)


def test_torch_npus_operations_serve(npu_worlds: dict[int, World], trainings: Trainings) -> None:
    """The comparisons above would hold with plain torch on the device, too."""
    world = npu_worlds[1]
    before = world.run("operation_calls")
    world.run("train", flags=trainings.flags("MoE"), steps=1)
    calls = {name: count - before.get(name, 0) for name, count in world.run("operation_calls").items()}
    layers, micro_batches = 4, 2
    passes = layers * micro_batches
    expected = {
        "npu_fusion_attention": passes,
        "npu_fusion_attention_grad": passes,
        "npu_rms_norm": 3 * passes + micro_batches,  # before attention, of queries and keys, and the last
        "npu_add_rms_norm": passes,  # before the MLP
        "npu_rotary_mul": 2 * 2 * passes,  # forward and back
        "npu_swiglu": passes,
        "npu_grouped_matmul": 2 * 3 * passes,  # forward, gradients of input and weight
        "npu_moe_token_permute_with_routing_map": passes,
        "_npu_moe_token_unpermute_with_routing_map": passes,
    }
    assert {name: calls.get(name) for name in expected} == expected


def test_a_whole_training_with_everything_around_it(
    npu_worlds: dict[int, World], trainings: Trainings, tmp_path: Path
) -> None:
    """Reports, evaluation, asynchronous checkpoints of torch_dist, the profiler, and an exit at a step."""
    plain = [*trainings.flags("MoE"), "--split", "50,50,0"]
    flags = [*plain, *EP2, *ZERO, "--save", str(tmp_path / "saved"), "--save-interval", "2"]
    flags += ["--ckpt-format", "torch_dist", "--async-save", "--exit-interval", "2", "--log-interval", "1"]
    flags += ["--eval-interval", "1", "--eval-iters", "1", "--ledger-interval", "1"]
    flags += ["--tensorboard-dir", str(tmp_path / "board"), "--profile", "--profile-save-path", str(tmp_path / "prof")]
    flags += ["--profile-step-start", "1", "--profile-step-end", "2", "--spike-guard", "skip"]
    npu_worlds[2].run("whole_training", flags=flags)
    rows = [json.loads(line) for line in (tmp_path / "board" / "metrics.jsonl").open()]
    losses = [row["loss"] for row in rows if "grad_norm" in row]
    assert losses == pytest.approx(trainings.world.run("train", flags=plain, steps=2)["loss"], rel=1e-5)
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_the_platform_knows_its_device(npu_worlds: dict[int, World], tmp_path: Path) -> None:
    assert npu_worlds[1].run("platform_facts", folder=str(tmp_path)) == {
        "name": "Ascend910B1",
        "peak": 354e12,
        "total": 64 * 2**30,
        "allocated": True,
        "profilers": True,
        "float64": False,
        "type": "torch.cuda.FloatTensor",
    }


def test_watch_ledger_and_state_check_serve(
    npu_worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    """A slow rank is named over HCCL, events of the device divide the steps, a flipped bit is found."""
    flags = [*FLAGS, "--data-path", tokens, "--load", models["untied"], "--train-iters", "8", *TP2]
    flags += ["--tensorboard-dir", str(tmp_path), "--ledger-interval", "4", "--state-check-interval", "1"]
    flags += ["--hang-timeout", "1", "--on-hang", "report"]
    ended = npu_worlds[2].run("spike_cases.watched_training", flags=flags, save=str(tmp_path))
    assert ended["steps"] == 4
    assert ended["said"].startswith("step 5: silent corruption: on rank 1, exp_avg_sq of ")
    verdict = (tmp_path / "logs" / "hang_step_3" / "verdict.txt").read_text()
    assert re.search(r"^rank 1 \(.*, device 1\) never entered \w+ #\d+ of group \w+ \(2 ranks; 1 wait", verdict)
    assert "in other since" in verdict
    assert "spike_cases.py" in verdict
    assert "(read_slowly)" in verdict
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (record,) = [line["ledger"] for line in lines if "ledger" in line]
    by_device, by_host = record["mean"], record["host"]
    assert {"forward", "backward", "optimizer", "wait tp"} <= by_host.keys()
    assert "host" in by_device, "the simulated device is done when it is told: it waits for the host"
    assert {"wait tp", "data"} <= by_device.keys()
    assert sum(by_device.values()) == pytest.approx(sum(by_host.values()), rel=1e-3)


def test_a_spike_is_left_out_as_on_the_cpu(
    npu_worlds: dict[int, World], cpu_world: World, tokens: str, tmp_path: Path
) -> None:
    arch = tiny.arch(num_hidden_layers=1)
    flags = [*FLAGS, "--load", str(tiny.write_model(tmp_path / "model", arch)), "--data-path", tokens]
    flags += ["--train-iters", "24", "--global-batch-size", "4", "--micro-batch-size", "4"]
    flags += ["--lr-decay-style", "constant", "--spike-guard", "skip"]
    found = []
    for world, extra in ((npu_worlds[1], [*ZERO, "--swap-optimizer"]), (cpu_world, [])):
        (save := tmp_path / str(len(found))).mkdir()
        rubbish = list(range(21 * 4, 22 * 4))
        found.append(
            world.run("spike_cases.spiked", flags=[*flags, *extra, "--save", str(save)], rubbish=rubbish, gone=[])
        )
    assert (found[0]["spikes"], found[0]["stopped"]) == ([22], None)
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-5)


def test_float64_is_refused(npu_worlds: dict[int, World], trainings: Trainings) -> None:
    with pytest.raises(CaseFailed, match="--moe-router-dtype fp64: npu has no float64; use fp32"):
        npu_worlds[1].run("train", flags=[*trainings.flags("MoE"), "--moe-router-dtype", "fp64"], steps=1)


STREAMS = {
    "swapped": ("untied", ["--swap-attention", "--swap-modules", "input_norm,self_attention,post_attention_norm"]),
    "optimizer on the host": ("untied", [*ZERO, "--swap-optimizer", "--swap-optimizer-times", "4"]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_wait_for_each_other(name: str, npu_worlds: dict[int, World], trainings: Trainings) -> None:
    kind, extra = STREAMS[name]
    flags = [*FLAGS, "--load", trainings.models[kind], "--data-path", trainings.data["pt"], "--bf16", *extra]
    assert npu_worlds[1].run("sim.sanitizer.complaints", flags=flags, steps=2) == {}
