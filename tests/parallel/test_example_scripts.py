"""Every script of examples/ does its work with a tiny model: those of devices on four processes, in their own layout.

Each parallel size above one becomes two, as many of them as four processes have room for. Losses, answers and scores
must be those of one process.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import quiz
import tiny
from pairs import write_pairs
from qwen3_npu import cli
from qwen3_npu.args.parallel import ParallelArgs
from scripts import SCRIPTS, Asked, ask, size_of
from worlds import World

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "checkpoint"))
import samples

from qwen3_npu.checkpoint.mapping.lora import Lora

SIZE, LONGEST = 4, 64
AXES = {  # kept in this order where not all find room
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "TP": "tensor_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}
ON_CPU = ["--device", "cpu", "--no-bf16"]
TIED = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b")


def kind_of(script: Path) -> str:
    """Which of the tiny models is like the script's."""
    size = size_of(script)
    if "a3b" in size or "a22b" in size:
        return "moe, seven layers" if "NOOP_LAYERS" in script.read_text() else "moe"
    return "tied" if size in TIED else "untied"


def scaled(asked: Asked) -> dict[str, str]:
    """The script's layout for four processes, as environment."""
    own = cli.parse("test", "", [ParallelArgs], argv=_flags_of(ParallelArgs, asked.flags)).groups[0]
    found = {axis: getattr(own, field) or 0 for axis, field in AXES.items()}
    choices = itertools.product(*[(2, 1) if size > 1 else (1,) for size in found.values()])
    chosen = max((c for c in choices if _fits(dict(zip(AXES, c, strict=True)), found["ETP"])), key=sum)
    sizes = dict(zip(AXES, chosen, strict=True))
    result = {axis: str(size) for axis, size in sizes.items() if found[axis]}
    if own.num_layers_per_virtual_pipeline_stage:
        result |= {"VPP": "2", "NOOP_LAYERS": "7"} if own.noop_layers else {"VPP": "1"}
    return result


def _fits(sizes: dict[str, int], own_etp: int) -> bool:
    etp = sizes["ETP"] if own_etp else sizes["TP"]
    experts = sizes["PP"] * sizes["EP"] * (etp if sizes["EP"] > 1 or own_etp else 1)
    return sizes["TP"] * sizes["PP"] * sizes["CP"] <= SIZE and experts <= SIZE


def _flags_of(group: type, flags: list[str]) -> list[str]:
    """Those flags that belong to a group, with their values."""
    names = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(group)}
    found: list[str] = []
    belongs = False
    for word in flags:
        if word.startswith("--"):
            belongs = word in names
        if belongs:
            found.append(word)
    return found


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models by kind, adapters, and data."""
    root = tmp_path_factory.mktemp("given")
    archs = {kind: tiny.arch(kind, vocab_size=800) for kind in ("tied", "untied", "moe")}
    archs["moe, seven layers"] = dataclasses.replace(archs["moe"], num_hidden_layers=7)
    found = {kind: quiz.write_tokenizer(tiny.write_model(root / kind, arch)) for kind, arch in archs.items()}
    lora = Lora(16, 32.0, samples.ALL_TARGETS)
    found |= {f"{kind} lora": samples.write_adapter(root / f"{kind} lora", arch, lora) for kind, arch in archs.items()}
    reward = archs["untied"].as_reward()
    found["reward lora"] = samples.write_adapter(root / "reward lora", reward, lora)
    found["tokens"] = tiny.write_tokens(root / "text_document", vocab=800)
    found["instructions"] = tiny.write_instructions(root / "single", vocab=800)
    found["packs"] = tiny.write_instructions(root / "packs", vocab=800, pack=LONGEST)
    found["pairs"] = write_pairs(root / "pairs", count=12, vocab=800)
    found["mmlu"] = quiz.write_mmlu(root / "mmlu", 2)
    found["questions"] = root / "questions.jsonl"
    asked = [{"instruction": f"Is it {n}?", "output": "yes", "choices": ["yes", "no"]} for n in range(3)]
    found["questions"].write_text("".join(json.dumps(question) + "\n" for question in asked))
    return {name: str(path) for name, path in found.items()}


class Runner:
    """Runs what scripts ask for, in a world; the same again only once."""

    def __init__(self, worlds: dict[int, World], folder: Path) -> None:
        self.worlds, self.folder = worlds, folder
        self.folders: dict[tuple[int, tuple[str, ...]], Path] = {}

    def __call__(self, size: int, script: Path, environment: dict[str, str], *flags: str) -> Path:
        """The folder that the program wrote."""
        asked = ask(script, self.folder, *ON_CPU, *flags, **environment, OUTPUT_DIR="OUT", CKPT_SAVE_DIR="OUT")
        key = size, (asked.program, *asked.flags)
        if key not in self.folders:
            case = {
                "pretrain_gpt.py": "whole_training",
                "inference.py": "generation_cases.generated",
                "evaluation.py": "generation_cases.evaluated",
            }[asked.program]
            out = Path(tempfile.mkdtemp(dir=self.folder))
            flags = [flag.replace("OUT", str(out)) if flag.startswith("OUT") else flag for flag in asked.flags]
            self.worlds[size].run(case, flags=[flag for flag in flags if flag != "--dry-run"])
            self.folders[key] = out
        return self.folders[key]


@pytest.fixture(scope="module")
def run(worlds: dict[int, World], tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(worlds, tmp_path_factory.mktemp("scripts"))


# Scaled down they train like another script of their kind (model, stage, layout, recomputation); their own flags are
# parsed in tests/examples. EVERY=1 in the environment trains these, too.
LIKE_OTHERS = {
    "dpo_qwen3_8b_4K_full_ptd",
    "dpo_qwen3_8b_4K_lora_ptd",
    "rm_qwen3_8b_4K_full_ptd",
    "pretrain_qwen3_1point7b_4K_ptd",
    "pretrain_qwen3_4b_4K_ptd",
    "pretrain_qwen3_8b_4K_ptd_A3",
    "pretrain_qwen3_14b_4K_ptd_A3",
    "pretrain_qwen3_32b_4K_ptd_A3",
    "tune_qwen3_1point7b_4K_full_ptd",
    "tune_qwen3_4b_4K_full_ptd",
    "tune_qwen3_1point7b_4K_lora_ptd",
    "tune_qwen3_4b_4K_lora_ptd",
    "tune_qwen3_8b_4K_lora_ptd",
    "tune_qwen3_14b_4K_full_ptd",
    "tune_qwen3_32b_4K_full_ptd",
    "tune_qwen3_32b_4K_lora_ptd",
    "tune_qwen3_30b_a3b_4K_full_ptd",
    "tune_qwen3_235b_a22b_64K_full_pack_A3_ptd",
    "tune_qwen3_235b_a22b_128K_full_pack_A3_ptd",
}


def scripts(*starts: str) -> Any:
    """Runs a test with the scripts whose names start so."""
    found = [script for script in SCRIPTS if script.stem.startswith(starts)]
    if "EVERY" not in os.environ:
        found = [script for script in found if script.stem not in LIKE_OTHERS]
    return pytest.mark.parametrize("script", found, ids=lambda p: p.stem)


def both(run: Runner, script: Path, folder: Path, environment: dict[str, str], *flags: str) -> tuple[Path, Path]:
    """What the script writes in its layout, and on one process."""
    layout = scaled(ask(script, folder, **environment))
    alone = dict.fromkeys(AXES, "1") | {"VPP": "", "NOOP_LAYERS": ""}
    return run(SIZE, script, environment | layout, *flags), run(1, script, environment | alone, *flags)


def measured(folder: Path, name: str) -> list[float]:
    """A value of each step."""
    lines = map(json.loads, (folder / "tensorboard" / "metrics.jsonl").open())
    return [line[name] for line in lines if name in line]


@scripts("pretrain", "tune", "dpo", "rm")
def test_training(script: Path, run: Runner, given: dict[str, str], tmp_path: Path) -> None:
    model = given[kind_of(script)]
    environment = {"HF_DIR": model, "CKPT_LOAD_DIR": model, "SEQ_LENGTH": str(LONGEST), "TRAIN_ITERS": "3"}
    environment |= {"MBS": "1", "GBS": "4", "LR": "1e-3", "MIN_LR": "1e-4"}
    asked = ask(script, tmp_path, HF_DIR=model, CKPT_LOAD_DIR=model)
    packs = "--reset-attention-mask" in asked.flags
    data = "pairs" if script.stem.startswith(("dpo", "rm")) else "packs" if packs else "instructions"
    environment["DATA_PATH"] = given["tokens" if "pretrain" in script.stem else data]
    if "--recompute-method" in asked.flags:
        environment["RECOMPUTE"] = asked.flags[asked.flags.index("--recompute-method") + 1] + " 1"
    # With Adam's usual 1e-8 an update depends on the sign of gradients that are all but 0, which rounding decides.
    flags = ["--adam-eps", "1e-4"]
    if "--lora-r" in asked.flags:  # start from given updates: where A is drawn, it depends on the layout
        environment |= {"LORA_R": "48", "LORA_ALPHA": "96"}  # of q, k and v apart, 16 each
        adapter = "reward" if script.stem.startswith("rm") else kind_of(script)
        flags += ["--lora-load", given[f"{adapter} lora"]]
    layout, alone = both(run, script, tmp_path, environment, *flags)
    assert (layout / "latest_checkpointed_iteration.txt").read_text() == "3"
    for name in ("loss", "grad_norm"):
        found, expected = measured(layout, name), measured(alone, name)
        assert len(found) == 3
        assert found == pytest.approx(expected, rel=1e-5)


@scripts("generate")
def test_generation(script: Path, run: Runner, given: dict[str, str], tmp_path: Path) -> None:
    model = given[kind_of(script)]
    environment = {"HF_DIR": model, "CKPT_LOAD_DIR": model, "PREDICT_DATA": "Once upon a time", "MAX_NEW_TOKENS": "8"}
    layout, alone = both(run, script, tmp_path, environment)
    found, expected = (json.loads((f / "text_generation_result.jsonl").read_text()) for f in (layout, alone))
    assert found["tokens"] == expected["tokens"]
    assert 1 <= len(found["tokens"]) <= 8
    assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-5)


@scripts("evaluate", "qwen3_14b_full_ptd_eval")
def test_evaluation(script: Path, run: Runner, given: dict[str, str], tmp_path: Path) -> None:
    model = given[kind_of(script)]
    environment = {"HF_DIR": model, "CKPT_LOAD_DIR": model, "CKPT_LORA": given["untied lora"], "MATCH": "choice"}
    environment["DATA_PATH"] = given["questions" if "custom" in script.stem else "mmlu"]
    layout, alone = both(run, script, tmp_path, environment)
    found, expected = (json.loads((f / "results.json").read_text())["results"] for f in (layout, alone))
    for result in (found, expected):
        for task in result.values():
            del task["seconds"]
    assert found == expected


def test_conversions(given: dict[str, str], tmp_path: Path) -> None:
    """To Megatron's files and back, with and without an adapter."""

    def convert(name: str, **environment: str) -> None:
        (script,) = (s for s in SCRIPTS if s.stem == name)
        asked = ask(script, tmp_path, **environment)
        samples.ok(*asked.flags)

    def weights(folder: Path | str) -> dict[str, np.ndarray]:
        return load_file(Path(folder) / "model.safetensors")

    def same(folder: Path, other: Path | str) -> None:
        found, expected = weights(folder), weights(other)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], tensor) for name, tensor in expected.items())

    mcore, back, merged, merged_mcore = (str(tmp_path / n) for n in ("mcore", "back", "merged", "merged_mcore"))
    convert("ckpt_convert_qwen3_hf2mcore", HF_DIR=given["untied"], MCORE_DIR=mcore, TP="2", PP="2")
    convert("ckpt_convert_qwen3_mcore2hf", MCORE_DIR=mcore, HF_OUT_DIR=back)
    same(tmp_path / "back", given["untied"])
    lora = {"MCORE_DIR": mcore, "LORA_DIR": given["untied lora"]}
    convert("ckpt_convert_qwen3_mcore2hf_lora", **lora, HF_OUT_DIR=merged)
    convert("ckpt_convert_qwen3_mcore2mcore_lora", **lora, MERGED_DIR=merged_mcore, TP="1", PP="4")
    convert("ckpt_convert_qwen3_mcore2hf", MCORE_DIR=merged_mcore, HF_OUT_DIR=str(tmp_path / "merged_back"))
    same(tmp_path / "merged_back", merged)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(weights(merged)[name], weights(given["untied"])[name])
    for kind, middle, sizes in (
        ("moe", "", {"PP": "2", "EP": "2"}),
        ("moe, seven layers", "_235b", {"PP": "2", "EP": "4", "VPP": "2", "NOOP_LAYERS": "7"}),
    ):
        folder = {"MCORE_DIR": str(tmp_path / kind)}
        convert(f"ckpt_convert_qwen3_moe{middle}_hf2mcore", HF_DIR=given[kind], **folder, **sizes)
        convert(f"ckpt_convert_qwen3_moe{middle}_mcore2hf", **folder, HF_OUT_DIR=str(tmp_path / f"{kind} back"))
        same(tmp_path / f"{kind} back", given[kind])


def test_data(given: dict[str, str], tmp_path: Path) -> None:
    """Text and conversations to the files that trainings read."""
    sources = {
        "pretrain": {"text": "A river runs down to the sea."},
        "instruction": {"instruction": "Where does it run?", "input": "", "output": "Down to the sea."},
        "sharegpt": {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]},
    }
    started = []
    for script in (s for s in SCRIPTS if s.stem.startswith("data_convert")):
        kind = next(k for k in ("sharegpt", "pretrain", "instruction") if k in script.stem)
        source = tmp_path / f"{kind}.jsonl"
        source.write_text((json.dumps(sources[kind]) + "\n") * 4)
        environment = {"INPUT": str(source), "OUTPUT_PREFIX": str(tmp_path / script.stem), "WORKERS": "1"}
        environment |= {"TOKENIZER_PATH": given["moe"], "SEQ_LENGTH": "128"}
        program = Path(__file__).resolve().parents[2] / "preprocess_data.py"
        command = [sys.executable, str(program), *ask(script, tmp_path, **environment).flags]
        started.append((script.stem, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
    assert len(started) == 6
    for name, process in started:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
        written = {p.name.removeprefix(name) for p in tmp_path.glob(f"{name}_*.idx")}
        packed = {f"_packed_{part}_document.idx" for part in ("input_ids", "attention_mask", "labels")}
        # One script's name begins another's.
        expected = {"_text_document.idx"} if "pretrain" in name else packed
        assert expected <= written, written
