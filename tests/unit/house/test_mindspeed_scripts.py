"""The flags of MindSpeed-LLM's own Qwen3 scripts are taken as they are; those without effect alone are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable

import pytest

from qwen3_npu import cli
from qwen3_npu.args import convert, evaluation, inference, preprocess, pretrain
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.model import ModelArgs, shaped
from qwen3_npu.args.parallel import make_layout
from qwen3_npu.args.rules.switches import check_switches
from qwen3_npu.checkpoint.convert.run import target_layout
from qwen3_npu.distributed.layout import check_world_size
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch, to_hf_config
from qwen3_npu.model.sizes import SIZES
from qwen3_npu.numbers import number_list
from qwen3_npu.training.prepare.plan import plan_training
from scripts import ROOT, originals

TRAINING = (pretrain.GROUPS, FOREIGN_TRAINING)
CONVERT = (convert.ConvertArgs, convert.TargetArgs, convert.LoraConvertArgs, convert.LegacyConvertArgs)
PROGRAMS = {
    "pretrain_gpt.py": TRAINING,
    "posttrain_gpt.py": TRAINING,
    "convert_ckpt_v2.py": (CONVERT, convert.FOREIGN),
    "preprocess_data.py": (preprocess.GROUPS, preprocess.FOREIGN),
    "inference.py": (inference.GROUPS, inference.FOREIGN),
    "evaluation.py": (evaluation.GROUPS, evaluation.FOREIGN),
}
# The model of the 480b scripts, which is Qwen's but none of `SIZES`; from the config.json of Qwen3-Coder-480B-A35B.
CODER = dataclasses.replace(
    SIZES["qwen3-235b-a22b"],
    num_hidden_layers=62,
    hidden_size=6144,
    intermediate_size=8192,
    num_attention_heads=96,
    num_key_value_heads=8,
    num_experts=160,
    moe_intermediate_size=2560,
)
BASE = ["--train-iters", "2", "--lr", "1e-5", "--data-path", "x"]


SCRIPTS = originals()


def test_all_scripts_are_here() -> None:
    assert len(SCRIPTS) == 69
    assert all((ROOT / script.program).is_file() for script in SCRIPTS.values())


def arch_of(name: str) -> Qwen3Arch | None:
    """The published model that a script is for; None: its flags alone say it (Qwen3-Coder-480B)."""
    size = re.search(r"qwen3_(?:moe_)?([0-9a-z]+b)(?:_|$)", name)
    words = size[1].replace("point", ".") if size else "14b"  # conversions name no size: any that 8 stages divide
    return None if words == "480b" else next(SIZES[key] for key in SIZES if key.startswith(f"qwen3-{words}"))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Qwen3Arch], str]:
    """Folders with a model's config.json."""
    root = tmp_path_factory.mktemp("configs")

    @functools.cache
    def folder(arch: Qwen3Arch) -> str:
        made = root / f"{arch.num_hidden_layers}-{arch.hidden_size}"
        made.mkdir()
        (made / "config.json").write_text(json.dumps(to_hf_config(arch)))
        return str(made)

    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_are_taken_and_fit_the_scripts_model(name: str, configs: Callable[[Qwen3Arch], str]) -> None:
    """Parsed, and checked against the published sizes on as many processes as the script starts."""
    program, processes, argv = SCRIPTS[name]
    groups, foreign = PROGRAMS[program]
    arch = arch_of(name)
    parsed = cli.parse(program, "", groups, foreign, argv=argv)
    if groups is pretrain.GROUPS:
        args = pretrain.PretrainArgs(*parsed.groups)
        check_switches(args, parsed.given)
        assert args.lora.lora_r == (16 if "_lora_" in name else 0)
        assert args.data.is_preference == name.startswith("dpo")
        plan = plan_training(args._replace(model=ModelArgs(hf_dir=configs(arch) if arch else None)), processes)
        assert plan.arch.same_weights(arch or CODER)
        assert plan.data_parallel * plan.num_microbatches * args.train.micro_batch_size == plan.global_batch
    elif program in ("inference.py", "evaluation.py"):
        args = dict(zip(("model", "shape", "parallel"), parsed.groups, strict=False))
        noop = number_list(args["parallel"].noop_layers)
        shaped(args["shape"], arch, len(noop))
        check_world_size(
            make_layout(arch, args["parallel"], padded_vocab_size=args["shape"].padded_vocab_size), processes
        )
    elif program == "convert_ckpt_v2.py":
        target_layout(arch or CODER, parsed.groups[1])


def said(*flags: str) -> tuple[pretrain.PretrainArgs, list[str]]:
    parsed = cli.parse("pretrain_gpt.py", "", *TRAINING, argv=[*BASE, *flags])
    args = pretrain.PretrainArgs(*parsed.groups)
    return args, check_switches(args, parsed.given)


def test_targets_switch_lora_on() -> None:
    args, notes = said("--lora-target-modules", "linear_qkv")
    assert (args.lora.lora_r, args.lora.lora_target_modules) == (16, ["linear_qkv"])
    assert any("--lora-r 16" in note for note in notes)
    assert len(said("--lora-r", "4")[0].lora.lora_target_modules) == 4


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora-alpha", "16"],
        ["--lora-fusion"],
        ["--moe-token-drop-policy", "probs"],
        ["--moe-aux-loss-coeff", "0.1", "--moe-router-load-balancing-type", "none"],
        ["--loss-chunk-size", "1024"],
        ["--context-parallel-algo", "megatron_cp_algo"],
        ["--lr-wsd-decay-iters", "5"],
        ["--hf-save-dir", "x"],
        ["--ckpt-step", "3"],
        ["--allow-changed", "seed"],
        ["--profile-level", "level1"],
        ["--pad-to-multiple-of", "2"],
        ["--manual-gc-interval", "5"],
        ["--run_mode", "train"],
        ["--spec", "my.own.spec"],
    ],
)
def test_a_flag_without_effect_is_refused(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=re.escape(flags[0])):
        said(*flags)


def test_a_start_says_what_differs() -> None:
    assert any("--lr-warmup-iters 5 is above" in note for note in said("--lr-warmup-iters", "5")[1])


TP2 = ("--tensor-model-parallel-size", "2")
NOTED = ("--fingerprint-interval", "5", "--tensorboard-dir", "x")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coc-parallel-num", "8"], "--coc-parallel-num: no effect without --use-ascend-coc, --use-ascend-mc2 or"),
        (["--use-mc2", "--use-ascend-coc"], "--use-ascend-mc2 and --use-ascend-coc are two ways to do the same"),
        (["--tp-comm-overlap", *TP2], "--tp-comm-overlap needs --sequence-parallel; add it, or use --use-ascend-coc"),
        (["--use-ascend-coc", *TP2, "--qlora", "--lora-r", "4"], "--use-ascend-coc with --qlora"),
        (
            ["--moe-fb-overlap", "--moe-expert-capacity-factor", "1"],
            "--moe-fb-overlap with --moe-expert-capacity-factor",
        ),
        (["--moe-fb-overlap", "--swap-attention"], "--moe-fb-overlap with --swap-attention"),
        (["--moe-fb-overlap", *NOTED], "--moe-fb-overlap with --fingerprint-interval"),
        (["--moe-fb-overlap", "--moe-token-dispatcher-type", "allgather"], "--moe-fb-overlap needs --moe-token-dispa"),
        (
            ["--moe-fb-overlap", "--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
            "--moe-fb-overlap with --pipeline-model-parallel-size 2 needs --num-layers-per-virtual-pipeline-stage",
        ),
    ],
)
def test_communication_that_cannot_be_hidden_as_asked(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        said(*flags)


def test_communication_is_hidden_as_asked_or_the_start_says_why_not() -> None:
    """MindSpeed: -1 and 2 switch COC on, 0 and 1 do not, one piece is none; its 8B script asks for it at TP1."""
    asked, notes = said("--use-ascend-coc", *TP2)
    assert (asked.overlap.asked, asked.overlap.coc_parallel_num, notes) == ("--use-ascend-coc", 4, [])
    for off in (["--coc-mode", "0"], ["--coc-mode", "1"], ["--coc-parallel-num", "1"]):
        asked, notes = said("--use-ascend-coc", *TP2, *off)
        assert asked.overlap.asked is None
        assert "--use-ascend-coc: off" in notes[0]
    assert "--use-ascend-mc2: no effect with --tensor-model-parallel-size 1" in said("--use-ascend-mc2")[1][0]
    assert "--moe-fb-overlap: no effect with --expert-model-parallel-size 1" in said("--moe-fb-overlap")[1][0]
