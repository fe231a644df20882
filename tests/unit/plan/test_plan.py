"""Plans against transformers, hand computation and others' measurements; the search against the parser."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3_npu.args.rules.fit import fit_flags
from qwen3_npu.args.tools.plan import PlanArgs
from qwen3_npu.errors import UsageError
from qwen3_npu.model.sizes import SIZES
from qwen3_npu.plan.activations import layer_bytes
from qwen3_npu.plan.device import DEVICE_SPECS, GIB, find_device
from qwen3_npu.plan.from_args import setup_of
from qwen3_npu.plan.hiding.costs import collective_seconds, exchange_seconds
from qwen3_npu.plan.hiding.experts import exposed_by_turns
from qwen3_npu.plan.memory import in_flight, logit_bytes, stage_memory
from qwen3_npu.plan.parameters import lora_counts, stage_counts
from qwen3_npu.plan.search import search
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape, read_shape, shape_of
from qwen3_npu.plan.show.report import command
from qwen3_npu.plan.show.schedule import timeline
from qwen3_npu.plan.timing import step_time
from qwen3_npu.plan.verdict import PlanVerdict, remedies

ROOT = Path(__file__).resolve().parents[3]
MIB = 2**20


def one_rank(shape: Shape, **more: object) -> Setup:
    return Setup(layers=((shape.num_layers,),), seq_length=4096, **more)


@pytest.mark.parametrize("name", SIZES)
def test_weights_of_all_ranks_are_those_that_transformers_makes(name: str) -> None:
    """Independent: transformers builds the model on the meta device."""
    import torch
    import transformers

    from qwen3_npu.model.arch import to_hf_config

    config = to_hf_config(SIZES[name])
    kind = transformers.AutoConfig.for_model(
        config["model_type"], **{k: v for k, v in config.items() if k != "model_type"}
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(kind)
    expected = sum(parameter.numel() for parameter in model.parameters())
    shape = shape_of(SIZES[name])
    assert stage_counts(shape, one_rank(shape), 0).total == expected


def test_a_base_in_4_bits_is_planned_by_hand() -> None:
    """The linears of Qwen3-0.6B: 4 bits a weight and a float32 scale of 64; then the tied embedding, too."""
    shape = shape_of(SIZES["qwen3-0.6b"])
    linears = 28 * (1024 * (16 + 8 + 8) * 128 + 16 * 128 * 1024 + 3 * 1024 * 3072)
    plain, linear, both = (
        stage_memory(shape, one_rank(shape, lora_rank=16, quantized=some, quantized_ends=ends), 0).weights
        for some, ends in ((False, False), (True, False), (True, True))
    )
    assert plain - linear == linears * (2 - 0.5 - 4 / 64)
    assert linear - both == 151936 * 1024 * (2 - 0.5 - 4 / 64)
    # Scales in 8 bits, two numbers for 256 of them, and where a row's begin: q, k, v; o; gate, up; down.
    setup = one_rank(shape, lora_rank=16, quantized=True, double_quantized=True)
    double = linears * (0.5 + 1 / 64 + 8 / (64 * 256)) + 4 * 28 * (4096 + 1024 + 2 * 3072 + 1024)
    assert plain - stage_memory(shape, setup, 0).weights == pytest.approx(linears * 2 - double, rel=1e-12)


def test_32b_trains_on_one_device_of_64_gb_in_4_bits_only() -> None:
    flags = {"model": "qwen3-32b", "devices": 1, "device": "910B-64G", "lora_r": 16, "stage": "sft"}
    arch, device = SIZES["qwen3-32b"], DEVICE_SPECS["910B-64G"]
    assert search(shape_of(arch), arch, PlanArgs(**flags, qlora=True), device)
    with pytest.raises(UsageError, match="fits"):
        search(shape_of(arch), arch, PlanArgs(**flags), device)


def test_a_sharded_stage_holds_its_part_by_hand() -> None:
    shape = shape_of(SIZES["qwen3-30b-a3b"])
    setup = Setup(tensor=4, pipeline=2, expert=8, expert_tensor=1, data=4, layers=((24,), (24,)), seq_length=4096)
    h, d = 2048, 128
    attention = h * (32 + 2 * 4) * d // 4 + 32 * d * h // 4
    layer = attention + 2 * h + 2 * d + h * 128
    experts = 128 // 8 * 3 * h * 768
    counts = stage_counts(shape, setup, 0)
    assert counts.dense == 24 * layer + 151936 // 4 * h
    assert counts.expert == 24 * experts
    assert stage_counts(shape, setup, 1).dense == 24 * layer + 151936 // 4 * h + h


def test_adapters_by_hand() -> None:
    shape = shape_of(SIZES["qwen3-8b"])
    setup = one_rank(shape, lora_rank=16, lora_targets=("linear_qkv",))
    assert lora_counts(shape, setup, 0).dense == 36 * 16 * (4096 + (32 + 16) * 128)


def test_the_update_counts_where_activations_leave_it_no_room() -> None:
    shape = shape_of(SIZES["qwen3-8b"])
    setup = Setup(layers=((36,),), seq_length=16)
    memory = stage_memory(shape, setup, 0)
    largest = 4 * 151936 * 4096
    assert memory.total == pytest.approx(memory.static + largest)
    longer = stage_memory(shape, dataclasses.replace(setup, seq_length=4096), 0)
    assert longer.update == 0, "activations are gone when the update is made"


def test_latent_attention_and_later_tokens_by_hand() -> None:
    """DeepSeek-V3's first layers: 187.1 M weights of attention in each (its report, table of sizes, and arithmetic)."""
    shape = Shape(
        num_layers=2,
        hidden_size=7168,
        ffn_hidden_size=18432,
        num_attention_heads=128,
        num_query_groups=128,
        head_dim=56,
        vocab_size=129280,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_head_dim=128,
        qk_pos_emb_head_dim=64,
        v_head_dim=128,
        mtp_layers=1,
    )
    h, heads = 7168, 128
    compress = h * (512 + 64) + 512 + h * 1536 + 1536
    attention = compress + 1536 * heads * 192 + 512 * heads * 256 + heads * 128 * h
    layer = attention + 2 * h + 3 * h * 18432
    ends = 2 * 129280 * h + h
    later = layer + 2 * h * h + 3 * h
    assert stage_counts(shape, one_rank(shape), 0).total == 2 * layer + ends + later
    two = Setup(pipeline=2, layers=((1,), (1,)), seq_length=16)
    assert stage_counts(shape, two, 1).total == layer + 129280 * h + h + later + 129280 * h


def test_micro_batches_in_flight_are_those_of_the_schedules() -> None:
    """1F1B: PP - stage. Interleaved: 2 (PP - stage - 1) + (VPP - 1) PP + 1 chunks (arXiv:2104.04473)."""
    plain = Setup(pipeline=4, layers=((2,),) * 4, seq_length=16, num_microbatches=8)
    assert [in_flight(plain, stage) for stage in range(4)] == [4, 3, 2, 1]
    chunks = Setup(pipeline=4, layers=((1, 1),) * 4, seq_length=16, num_microbatches=8)
    assert [in_flight(chunks, stage) for stage in range(4)] == [11, 9, 7, 5]
    few = Setup(pipeline=4, layers=((2,),) * 4, seq_length=16, num_microbatches=2)
    assert in_flight(few, 0) == 2


@pytest.mark.parametrize(("stages", "chunks", "passes"), [(1, 1, 4), (4, 1, 8), (4, 2, 8), (2, 3, 6), (4, 1, 2)])
def test_a_timeline_of_stages_has_the_bubble_of_the_formula(stages: int, chunks: int, passes: int) -> None:
    """(PP - 1) / VPP micro-batches (arXiv:2104.04473); each stage runs every pass of every chunk once."""
    setup = Setup(pipeline=stages, layers=((1,) * chunks,) * stages, seq_length=16, num_microbatches=passes)
    found = timeline(setup, 1.0, 2.0)
    assert max(one.end for one in found) == pytest.approx(3 * (passes + (stages - 1) / chunks))
    assert len({one[:4] for one in found}) == len(found) == 2 * stages * chunks * passes


def test_logits_by_hand() -> None:
    shape = shape_of(SIZES["qwen3-8b"])
    assert logit_bytes(shape, one_rank(shape)) == 4096 * 151936 * 6
    gradients = 2 * 2 * 4096 * 151936  # of the weight: the sum so far, and the next chunk's
    assert logit_bytes(shape, one_rank(shape, loss_chunk=1024)) == 1024 * 151936 * 6 + gradients


def test_a_recomputed_layer_keeps_its_input_only() -> None:
    shape = dataclasses.replace(shape_of(SIZES["qwen3-8b"]), num_layers=4)
    kept = [stage_memory(shape, one_rank(shape, recompute=n), 0).layers for n in (0, 1, 4)]
    one, token_bytes = layer_bytes(shape, one_rank(shape), False), 2 * 4096 * 4096
    assert kept == pytest.approx([4 * one, 3 * one + token_bytes, 4 * token_bytes])


def test_the_start_counts_where_many_ranks_share_the_optimizer() -> None:
    """8B on 1,024 ranks, 16 tokens: weights twice and gradients, by hand; 4 GiB more than weights and gradients."""
    shape = shape_of(SIZES["qwen3-8b"])
    setup = one_rank(shape, data=1024, distributed_optimizer=True)
    memory = stage_memory(shape, dataclasses.replace(setup, seq_length=16), 0)
    assert memory.total == 8 * stage_counts(shape, setup, 0).total
    assert stage_memory(shape, dataclasses.replace(setup, seq_length=16, data=2), 0).start == 0


def test_every_layout_found_is_legal_for_the_parser_and_ranked() -> None:
    args = PlanArgs(model="qwen3-30b-a3b", devices=16, seq_length=4096, global_batch_size=64)
    arch = SIZES["qwen3-30b-a3b"]
    found = search(shape_of(arch), arch, args, DEVICE_SPECS["910B-64G"])
    assert len(found) > 10
    rates = [one.verdict.tokens_per_second for one in found]
    assert rates == sorted(rates, reverse=True)
    assert all(one.verdict.fits for one in found)
    assert all(one.verdict.setup.devices == 16 for one in found)
    assert any(one.verdict.setup.expert == 8 for one in found)
    assert any(one.verdict.setup.swap_optimizer for one in found)
    assert any(one.verdict.setup.overlap_experts for one in found)
    for one in found:  # what was planned is what these flags say
        assert setup_of(one.args, fit_flags(one.args, arch, 16)) == one.verdict.setup


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen3_npu.plan", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_line_of_the_first_layout_is_one_that_training_accepts(tmp_path: Path) -> None:
    """The printed command goes through the training's own parser and checks."""
    from qwen3_npu import cli
    from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
    from qwen3_npu.training.prepare.plan import plan_training

    result = run("--model", "qwen3-235b-a22b", "--devices", "256", "--global-batch-size", "1024")
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout.strip().splitlines()[-1])
    flags = words[words.index("pretrain_gpt.py") + 1 :]
    args = PretrainArgs(*cli.parse("p", "d", GROUPS, {}, argv=[*flags, "--train-iters", "1", "--dry-run"]).groups)
    plan = plan_training(args, 256)
    assert plan.verdict is not None
    assert plan.verdict.fits
    rate = re.search(r"^ 1 .* ([\d,]+) +\d+ %$", result.stdout, re.M)
    assert rate is not None
    assert f"{plan.verdict.tokens_per_second:,.0f}" == rate[1]


@pytest.mark.parametrize(
    "request_words",
    [
        "--model qwen3-30b-a3b --devices 12 --global-batch-size 48",
        "--model qwen3-8b --stage kto",
        "--model qwen3-8b --stage orpo --pack",
        "--model qwen3-8b --stage rm --devices 6 --global-batch-size 24",
        "--model qwen3-32b --stage dpo --lora-r 16 --qlora",
        "--model qwen3-8b --device h100-80g --stage sft --lora-r 8",
    ],
)
def test_a_pasted_command_is_planned_as_the_search_planned_it(request_words: str) -> None:
    """Through the training's own parser and checks; as many processes as devices."""
    from qwen3_npu import cli
    from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
    from qwen3_npu.plan.__main__ import _model
    from qwen3_npu.training.prepare.plan import plan_training

    asked = cli.parse("p", "d", (PlanArgs,), {}, argv=request_words.split()).groups[0]
    device = find_device(asked.device)
    for found in search(*_model(asked), asked, device)[:3]:
        words = shlex.split(command(found.args, asked.devices, device.node))
        number = {name: int(words[words.index(name) + 1]) for name in ("--nproc-per-node", "--nnodes") if name in words}
        assert math.prod(number.values()) == asked.devices
        start = next(place for place, word in enumerate(words) if word.endswith("_gpt.py"))
        more = ["--train-iters", "1", "--dry-run", "--plan-device", asked.device]
        args = PretrainArgs(*cli.parse("p", "d", GROUPS, {}, argv=[*words[start + 1 :], *more]).groups)
        verdict = plan_training(args, asked.devices).verdict
        assert verdict is not None
        assert (verdict.setup, verdict.peak) == (found.verdict.setup, found.verdict.peak)
        assert verdict.time == found.verdict.time


def test_a_group_has_the_links_between_its_devices() -> None:
    """Atlas 800T A2: 28 GB/s between two of a node; a die of an A3 has its 196 GB/s to any other."""
    mesh, switch = DEVICE_SPECS["910B-64G"], DEVICE_SPECS["910C-64G"]
    assert [mesh.bandwidth(size, True) for size in (2, 4, 8)] == [28e9, 84e9, 196e9]
    assert switch.bandwidth(2, True) == 196e9
    assert mesh.bandwidth(2, False) == 25e9
    # 28 MB arrive in 1 ms, of 56 MB that two ranks hold together.
    whole = dataclasses.replace(mesh, transfer=1.0, latency=0.0)
    assert collective_seconds(whole, 2, 1, 56e6) == pytest.approx(1e-3)


def test_nodes_of_a_superpod_are_linked_and_those_of_two_are_not() -> None:
    """384 x 2 dies; a die of 32 keeps 1/32 of 620 MB, and sends the rest at 196 GB/s, or half of it at 25 GB/s."""
    pod, servers = DEVICE_SPECS["910C-64G"], DEVICE_SPECS["910C-64G-RoCE"]
    pod, servers = (
        dataclasses.replace(each, transfer=1.0, latency=0.0, network_latency=0.0) for each in (pod, servers)
    )
    assert exchange_seconds(pod, 32, 1, 620e6) == pytest.approx(620e6 * 31 / 32 / 196e9)
    assert exchange_seconds(servers, 32, 1, 620e6) == pytest.approx(310e6 / 25e9)
    assert collective_seconds(pod, 2, 384, 1e9) == pytest.approx(0.5e9 / 196e9)
    assert collective_seconds(pod, 2, 768, 1e9) == pytest.approx(0.5e9 / 25e9)


def test_two_passes_by_turns_played_by_hand() -> None:
    """The second one computes until 3, the first one until 4; the second one's exchange ends at 5, the other's at 7,
    since it waits for its way. The second one goes on from 5 to 8, the first one to 9: 10 and 12."""
    assert exposed_by_turns([(1.0, 2.0), (1.0, 2.0)], [(3.0, 2.0), (3.0, 2.0)]) == (5 - 4) + (12 - 9)


def test_the_reference_of_dpo_takes_a_forward_pass() -> None:
    """Of products alone it is a third of a training's, by hand: 2 of 6 FLOP for each weight and token."""
    shape, device = shape_of(SIZES["qwen3-8b"]), DEVICE_SPECS["910B-64G"]
    fast = dataclasses.replace(device, memory_bandwidth=1e30, attention=1e9, launch=0.0)
    time = step_time(shape, one_rank(shape, scored=True), fast)
    assert time.reference == pytest.approx(time.products / 3)
    assert step_time(shape, one_rank(shape), fast).reference == 0


def test_a_search_over_1024_devices_answers_at_once_without_torch() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "sys.argv = 'plan --model qwen3-235b-a22b --devices 1024 --global-batch-size 2048 --json'.split()\n"
        "from qwen3_npu.plan.__main__ import main; main()\n"
        "assert 'torch' not in sys.modules; print(time.process_time() - start, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert len(json.loads(result.stdout)) == 10, result.stderr
    assert float(result.stderr.split()[-1]) < 2, "seconds of processor time"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "qwen3-8b", "--device", "910B"], "--device 910B is not known"),
        (["--model", "qwen3-8b", "--device-memory", "lots"], "--device-memory lots: a number of bytes"),
        (["--model", "qwen3-235b-a22b", "--devices", "4"], "nothing fits 4 x 910B-64G: the smallest layout needs"),
        (["--devices", "4"], "give one of --model, --hf-dir and --shape-json"),
        (["--model", "qwen3-8b", "--trace", "--inference"], "--trace runs a training step"),
        (["--model", "qwen3-8b", "--device-table", "missing.json"], "missing.json cannot be opened"),
    ],
)
def test_bad_requests_are_one_line(flags: list[str], message: str) -> None:
    result = run(*flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_what_is_said_to_fit_fits() -> None:
    arch = SIZES["qwen3-32b"]
    args = PlanArgs(model="qwen3-32b", devices=4, seq_length=32768, global_batch_size=64)
    with pytest.raises(UsageError, match=r"it fits with --lora-r 16, or --devices (\d+)") as error:
        search(shape_of(arch), arch, args, DEVICE_SPECS["910B-64G"])
    devices = int(str(error.value).split()[-1])
    more, half = (dataclasses.replace(args, devices=number) for number in (devices, devices // 2))
    assert search(shape_of(arch), arch, more, DEVICE_SPECS["910B-64G"])
    with pytest.raises(UsageError, match="nothing fits"):
        search(shape_of(arch), arch, half, DEVICE_SPECS["910B-64G"])


def test_a_remedy_has_the_effect_that_it_promises() -> None:
    shape = shape_of(SIZES["qwen3-32b"])
    setup = Setup(
        tensor=8,
        pipeline=2,
        data=1,
        layers=((32,), (32,)),
        seq_length=32768,
        num_microbatches=8,
        sequence_parallel=True,
    )
    verdict = PlanVerdict(shape, setup, DEVICE_SPECS["910B-64G"])
    assert not verdict.fits
    first = remedies(verdict)[0]
    assert "--recompute-num-layers" in first.words
    count = int(first.words.split()[-1])
    changed = PlanVerdict(shape, dataclasses.replace(setup, recompute=count), DEVICE_SPECS["910B-64G"])
    assert verdict.peak - changed.peak == pytest.approx(first.saved)
    assert changed.fits


def test_any_decoder_can_be_described(tmp_path: Path) -> None:
    """Llama-2 7B has 6,738,415,616 weights (its paper's 6.7 billion; transformers counts the same)."""
    path = tmp_path / "llama.json"
    sizes = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32}
    path.write_text(json.dumps(sizes | {"vocab_size": 32000}))
    shape = read_shape(path)
    assert stage_counts(shape, one_rank(shape), 0).total == 6_738_415_616
    path.write_text(json.dumps(sizes | {"vocab_size": 32000, "layers": 3}))
    with pytest.raises(UsageError, match="'layers' is not understood"):
        read_shape(path)


def test_what_a_cluster_taught_changes_the_plan(tmp_path: Path) -> None:
    from qwen3_npu.plan.device import learn

    line = {"planned_step_seconds": 2.0, "measured_step_seconds": 4.0, "planned_bytes": 10 * GIB}
    line |= {"measured_bytes": 11 * GIB, "device": "910B-64G"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n" + json.dumps(line) + "\n")
    learn(tmp_path, tmp_path / "table.json")
    before, after = find_device("910B-64G"), find_device("910B-64G", str(tmp_path / "table.json"))
    assert after.product == pytest.approx(before.product / 2)
    assert after.reserve == pytest.approx(before.reserve + GIB)


def test_the_checks_of_a_launch_take_no_time() -> None:
    shape = shape_of(SIZES["qwen3-235b-a22b"])
    setup = Setup(tensor=1, pipeline=4, expert=32, expert_tensor=1, data=64, layers=((24,),) * 4, seq_length=4096)
    start = time.process_time()
    PlanVerdict(shape, setup, DEVICE_SPECS["910B-64G"])
    assert time.process_time() - start < 0.1
