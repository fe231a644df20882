"""Every number on a command line is finite, and within what its flag can mean."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from qwen3_npu import cli
from qwen3_npu.args import convert, evaluation, inference, preprocess, pretrain
from qwen3_npu.args.tools.doctor import DoctorArgs
from qwen3_npu.args.tools.parity import ParityArgs
from qwen3_npu.args.tools.plan import PlanArgs

PROGRAMS = {
    "pretrain_gpt.py": pretrain.GROUPS,
    "inference.py": inference.GROUPS,
    "evaluation.py": evaluation.GROUPS,
    "preprocess_data.py": preprocess.GROUPS,
    "convert_ckpt.py": (convert.ConvertArgs, convert.TargetArgs, convert.LoraConvertArgs, convert.LegacyConvertArgs),
    "doctor": (DoctorArgs,),
    "parity": (ParityArgs,),
    "plan": (PlanArgs,),
}
NEGATIVE = {"length_penalty", "profile_ranks", "coc_mode"}  # -1 means something there
# Flag -> values that float takes and the formula behind the flag does not.
IMPOSSIBLE = {
    "lr_warmup_fraction": ["1"],
    "adam_beta1": ["1"],
    "adam_beta2": ["1", "2"],
    "adam_eps": ["0"],
    "attention_dropout": ["1", "1.5"],
    "hidden_dropout": ["1"],
    "lora_dropout": ["1"],
    "lora_alpha": ["0"],
    "epochs": ["0"],
    "moe_expert_capacity_factor": ["0"],
    "rotary_base": ["0"],
    "norm_epsilon": ["0"],
    "beta_fast": ["0"],
    "beta_slow": ["0"],
    "low_freq_factor": ["0"],
    "rope_scaling_factor": ["0.5"],
    "dpo_beta": ["0"],
    "dpo_label_smoothing": ["0.5"],
    "top_p": ["0", "1.1"],
    "repetition_penalty": ["0"],
    "length_penalty": ["-1e300", "1e300"],
    "distributed_timeout_minutes": ["0", "1e300"],
    "max_shard_size": ["0", "1e300"],
    "seed": [str(2**32)],
    "num_layers": ["0"],
}


def numbers(groups: tuple[type, ...]) -> dict[str, type]:
    """Flag -> int or float; also of lists, and of flags that may be None."""
    found: dict[str, type] = {}
    for group in groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            kinds = {hints[field.name], *typing.get_args(hints[field.name])}
            if number := kinds & {int, float} or kinds & {list[int]}:
                found[field.name] = float if float in number else int
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_number_has_a_range(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.build_parser(program, "", PROGRAMS[program], {})
    for name, kind in numbers(PROGRAMS[program]).items():
        bad = ["nan", "inf", "-inf", "1e400", "-1e400", "x", "", *IMPOSSIBLE.get(name, [])]
        bad += [] if name in NEGATIVE else ["-1"]
        bad += ["1.5", str(2**63)] if kind is int else []
        for value in bad:
            with pytest.raises(SystemExit) as end:
                parser.parse_args([f"{cli.option(name)}={value}"])
            first, *rest = capsys.readouterr().err.splitlines()
            assert end.value.code == 2
            assert first.startswith(f"{program}: error: argument {cli.option(name)}"), (name, value)
            assert (value in first, len(rest)) == (True, 0), first


def test_the_table_names_flags_that_exist() -> None:
    every = {name for groups in PROGRAMS.values() for name in numbers(groups)}
    assert every >= {*IMPOSSIBLE, *NEGATIVE}
    assert len(every) > 90
