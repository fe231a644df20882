"""A training that is resumed is compared with what it was begun with."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_npu import log
from qwen3_npu.args.preference import PreferenceArgs
from qwen3_npu.args.rules.resume import FINE, REASONS, REFUSED, WARNED
from qwen3_npu.args.training import OptimizerArgs, TrainArgs
from qwen3_npu.checkpoint.training.compare import check_resumed
from qwen3_npu.errors import UsageError

# What a checkpoint may say, and another value of each; Megatron's names.
SAVED: dict[str, Any] = {
    "stage": "pt",
    "seed": 1234,
    "seq_length": 4096,
    "data_digest": ["0123456789abcdef0123456789abcdef"],
    "data_weights": "by size",
    "split": "969, 30, 1",
    "shuffle": True,
    "freeze_include": [],
    "freeze_exclude": [],
    "global_batch_size": 64,
    "reset_attention_mask": False,
    "reset_position_ids": False,
    "eod_mask_loss": False,
    "rotary_base": 1e6,
    "norm_epsilon": 1e-6,
    "rope_scaling": "plain RoPE",
    "moe_router_topk": 8,
    "norm_topk_prob": True,
    "bf16": True,
    "qlora": False,
    "optimizer": "adam",
    "qlora_embedding": False,
    "qlora_double_quant": False,
}
NOW = SAVED | {"split": "969,30,1"}
OTHERS: dict[str, Any] = {
    "stage": "sft",
    "seed": 1,
    "seq_length": 8192,
    "data_digest": ["fedcba9876543210fedcba9876543210"],
    "data_weights": [0.3, 0.7],
    "split": "99,1,0",
    "shuffle": False,
    "freeze_include": ["*.embed_tokens.*"],
    "freeze_exclude": ["*norm*"],
    "global_batch_size": 128,
    "reset_attention_mask": True,
    "reset_position_ids": True,
    "eod_mask_loss": True,
    "rotary_base": 1e4,
    "norm_epsilon": 1e-5,
    "rope_scaling": "YaRN",
    "moe_router_topk": 4,
    "norm_topk_prob": False,
    "bf16": False,
    "qlora": True,
    "optimizer": "muon",
    "qlora_embedding": True,
    "qlora_double_quant": True,
}
# Told, as `(the reason)` says.
TOLD = {
    "adam_beta1": (0.8, "updates follow the flags"),
    "adam_eps": (1e-6, "updates follow the flags"),
    "loss_normalization": ("micro-batch", "another loss"),
    "dpo_beta": (0.5, "another loss"),
    "lr": (1e-3, "learning rate and weight decay follow the flags"),
    "lr_decay_style": ("cosine", "learning rate and weight decay follow the flags"),
    "lora_dropout": (0.1, "other random numbers"),
    "prompt_type": ("qwen", "written in another way"),
}


def said_by(saved: dict[str, Any], now: dict[str, Any], *allowed: str) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.setup()
    log.LOGGER.handlers[:] = [handler]
    try:
        check_resumed(saved, now, allowed, "iter_3")
        return said
    finally:
        log.setup()


def test_nothing_is_said_of_what_is_the_same_nor_of_the_layout() -> None:
    assert SAVED.keys() == REFUSED.keys() == OTHERS.keys()
    assert (
        said_by(SAVED | {"tensor_model_parallel_size": 2, "micro_batch_size": 1}, NOW | {"micro_batch_size": 2}) == []
    )


@pytest.mark.parametrize("name", OTHERS)
def test_a_change_that_repeats_or_skips_or_is_another_model_is_refused(name: str) -> None:
    now = NOW | {name: OTHERS[name]}
    with pytest.raises(UsageError) as refused:
        said_by(SAVED, now)
    text = str(refused.value)
    assert f"{name} " in text
    assert f"--finetune to start at step 0 with its weights, or --allow-changed {name}" in text
    assert "\n" not in text
    (line,) = said_by(SAVED, now, name)
    assert name in line
    assert "allowed" in line


@pytest.mark.parametrize("name", TOLD)
def test_another_setting_of_the_optimizer_is_told(name: str) -> None:
    value, why = TOLD[name]
    (line,) = said_by(SAVED | {name: 0.123}, NOW | {name: value})
    assert f"{name} 0.123, now {value} (" in line
    assert why in line


def test_every_argument_that_is_saved_has_its_rule() -> None:
    """A new flag of the training cannot be forgotten: it is refused, told of or said to be fine."""
    every = {field.name for group in (TrainArgs, OptimizerArgs, PreferenceArgs) for field in dataclasses.fields(group)}
    ruled = [*REFUSED, *WARNED, *FINE]
    assert every - set(ruled) == set()
    assert len(ruled) == len(set(ruled))
    assert {*REFUSED.values(), *WARNED.values(), *FINE.values()} == REASONS.keys()
    changed = {name: "another" for name in FINE}
    assert said_by(SAVED | dict.fromkeys(FINE, "one"), NOW | changed) == []


def test_all_refusals_are_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"--allow-changed seed seq_length$"):
        said_by(SAVED, NOW | {"seed": 5, "seq_length": 7, "adam_beta1": 0.8})


def test_what_a_checkpoint_of_another_program_does_not_say_is_said_once() -> None:
    saved = {name: value for name, value in SAVED.items() if name not in ("data_digest", "shuffle")}
    (line,) = said_by(saved | {"stage": None}, NOW)
    assert line == "not compared with iter_3, which does not say them: stage, data_digest, shuffle"


def test_data_of_the_same_shape_with_other_tokens_have_another_digest(tmp_path: Path) -> None:
    from qwen3_npu.training.checkpoints.facts import data_digest

    def write(name: str, count: int, place: int, suffix: str = "") -> str:
        tokens = np.zeros(count, np.int32)
        tokens[place] = 7
        tokens.tofile(tmp_path / f"{name}{suffix}.bin")
        (tmp_path / f"{name}{suffix}.idx").write_bytes(b"the same")
        return str(tmp_path / name)

    assert data_digest(write("a", 100, 3)) == data_digest(write("b", 100, 3)) != data_digest(write("c", 100, 4))
    sft = "_packed_labels_document"
    assert data_digest(write("d", 9, 1, sft)) != data_digest(write("e", 9, 2, sft))
    large = 2**23
    assert len({data_digest(write("f", large + n, place)) for n, place in ((0, 0), (0, large - 1), (1, 0))}) == 3
