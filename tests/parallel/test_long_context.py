"""What a training makes of rotary embedding goes into its checkpoints, where the next command reads it."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from worlds import World

FLAGS = ["--seq-length", "96", "--train-iters", "1", "--lr", "1e-3", "--eval-iters", "0", "--device", "cpu"]
FLAGS += ["--global-batch-size", "4"]
YARN = ["--rope-scaling-type", "yarn", "--rope-scaling-factor", "4", "--beta-fast", "32", "--beta-slow", "1"]
YARN += ["--rope-scaling-original-max-position-embeddings", "512", "--rope-scaling-mscale", "1.0"]


def test_yarn_by_flags_needs_no_flag_again(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    flags = [*FLAGS, "--data-path", tokens]
    first = worlds[1].run("train", flags=[*flags, "--load", models["untied"], "--save", str(save), *YARN], steps=1)
    plain = worlds[1].run("train", flags=[*flags, "--load", models["untied"]], steps=1)
    assert first["loss"] != plain["loss"], "YaRN must matter"
    config = AutoConfig.from_pretrained(save)
    assert config.max_position_embeddings == 2048
    assert {**config.rope_parameters, "rope_theta": 0} == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 0,
    }
    # The first loss of another training on the same weights: the same with the flags, from config.json, and, without
    # that, from the arguments that are saved with the weights.
    again = [*flags, "--load", str(save), "--finetune"]
    losses = [worlds[1].run("train", flags=[*again, *more], steps=1)["loss"] for more in (YARN, [])]
    (save / "config.json").unlink()
    losses.append(worlds[1].run("train", flags=again, steps=1)["loss"])
    assert losses[1:] == losses[:1] * 2


def test_more_positions_are_in_the_exported_config(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    flags = [*FLAGS, "--data-path", tokens, "--load", models["tied"], "--save", str(tmp_path), "--seq-length", "1024"]
    worlds[1].run("train", flags=[*flags, "--max-position-embeddings", "1024"], steps=1)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.max_position_embeddings == 1024
    assert config.rope_parameters["rope_type"] == "default"
