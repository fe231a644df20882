"""Every script of examples/: its flags parse with the real parser, its layout is legal for model and devices."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from qwen3_npu import cli
from qwen3_npu.args import convert, preprocess
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.parallel import make_layout
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.checkpoint.binary.dtypes import BF16
from qwen3_npu.checkpoint.formats.huggingface import write_config
from qwen3_npu.distributed.layout import check_world_size
from qwen3_npu.model.sizes import SIZES
from qwen3_npu.training.prepare.plan import plan_training
from scripts import ROOT, SCRIPTS, Asked, ask, originals, size_of

ORIGINALS = {name: original for name, original in originals().items() if "gpt.py" in original.program}
# What decides memory and overlap; flags of theirs that change nothing here, or that ours set everywhere, are left out.
CARRIED = {
    "--swap-optimizer": False,
    "--swap-attention": False,
    "--reuse-fp32-param": False,
    "--moe-zero-memory": True,
    "--moe-alltoall-overlap-comm": False,
    "--use-ascend-coc": False,
    "--use-ascend-mc2": False,
    "--recompute-granularity": True,
    "--recompute-method": True,
    "--recompute-num-layers": True,
    "--manual-gc-interval": True,
}
PROGRAMS = {
    "pretrain": "pretrain_gpt.py",
    "tune": "pretrain_gpt.py",
    "dpo": "pretrain_gpt.py",
    "rm": "pretrain_gpt.py",
    "generate": "inference.py",
    "chat": "inference.py",
    "evaluate": "evaluation.py",
    "qwen3": "evaluation.py",  # qwen3_14b_full_ptd_eval_custom_dataset.sh
    "ckpt": "convert_ckpt.py",
    "data": "preprocess_data.py",
}


@pytest.fixture(scope="module")
def hf_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Size -> a folder with the config.json of that size."""
    root = tmp_path_factory.mktemp("hf")
    for size, arch in SIZES.items():
        (root / size).mkdir()
        write_config(arch, None, root / size, BF16)
    return {size: root / size for size in SIZES}


def parse(asked: Asked) -> None:
    """With the real parser; raises where the program would."""
    if asked.program == "pretrain_gpt.py":
        args = PretrainArgs(*cli.parse("test", "", GROUPS, FOREIGN_TRAINING, argv=asked.flags).groups)
        plan_training(args, asked.world)
    elif asked.program == "convert_ckpt.py":
        groups = (convert.ConvertArgs, convert.TargetArgs, convert.LoraConvertArgs, convert.LegacyConvertArgs)
        cli.parse("test", "", groups, convert.FOREIGN, argv=asked.flags)
    elif asked.program == "preprocess_data.py":
        cli.parse("test", "", preprocess.GROUPS, preprocess.FOREIGN, argv=asked.flags)
    else:
        module = importlib.import_module(f"qwen3_npu.args.{Path(asked.program).stem}")
        parsed = cli.parse("test", "", module.GROUPS, module.FOREIGN, argv=asked.flags)
        size = Path(asked.flags[asked.flags.index("--hf-dir") + 1]).name
        (parallel,) = (group for group in parsed.groups if type(group).__name__ == "ParallelArgs")
        check_world_size(make_layout(SIZES[size], parallel), asked.world, 1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_flags_and_layout(script: Path, hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    folder = str(hf_dirs[size_of(script)])
    asked = ask(script, tmp_path, HF_DIR=folder, CKPT_LOAD_DIR=folder, TOKENIZER_PATH=folder)
    parse(asked)
    assert asked.program == PROGRAMS[script.stem.split("_")[0]]
    if "A3" in script.stem:
        assert asked.world % 16 == 0  # dies of a server
    if script.stem in ORIGINALS:
        ours, theirs = (
            {
                flag: flags[flags.index(flag) + 1] if has_value else ""
                for flag, has_value in CARRIED.items()
                if flag in flags
            }
            for flags in (asked.flags, ORIGINALS[script.stem].flags)
        )
        assert ours == theirs


def test_the_check_sees_an_illegal_layout(hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    script = ROOT / "examples" / "qwen3" / "pretrain_qwen3_8b_4K_ptd.sh"
    folder = str(hf_dirs["qwen3-8b"])
    asked = ask(script, tmp_path, HF_DIR=folder, CKPT_LOAD_DIR=folder, TP="3")
    with pytest.raises(ValueError, match="3 does not divide the 8 KV heads"):
        parse(asked)
    with pytest.raises(SystemExit):
        parse(asked._replace(flags=[*asked.flags, "--no-such-flag"]))


def test_an_empty_checkpoint_folder_means_random_weights(hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    folder = str(hf_dirs["qwen3-8b"])
    asked = ask(ROOT / "examples/qwen3/pretrain_qwen3_8b_4K_ptd.sh", tmp_path, HF_DIR=folder, CKPT_LOAD_DIR="")
    parse(asked)
    assert "--from-scratch" in asked.flags
    assert "--load" not in asked.flags
    asked = ask(ROOT / "examples/qwen3/tune_qwen3_8b_4K_full_ptd.sh", tmp_path, HF_DIR=folder, CKPT_LOAD_DIR="")
    with pytest.raises(ValueError, match="--from-scratch and --finetune contradict"):
        parse(asked)


@pytest.mark.parametrize("stage", ["orpo", "simpo", "kto", "rm"])
def test_the_dpo_scripts_train_other_losses(stage: str, hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    folder = str(hf_dirs["qwen3-8b"])
    for kind in ("full", "lora"):
        script = ROOT / f"examples/qwen3/dpo_qwen3_8b_4K_{kind}_ptd.sh"
        asked = ask(script, tmp_path, HF_DIR=folder, CKPT_LOAD_DIR=folder, STAGE=stage, MBS="2")
        parse(asked)
        assert asked.flags[asked.flags.index("--stage") + 1] == stage


def test_a_copied_script_says_what_is_missing(tmp_path: Path) -> None:
    for script in SCRIPTS:
        copy = tmp_path / script.name
        copy.write_text(script.read_text())
    ran = subprocess.run(["bash", str(copy)], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" in ran.stderr
    assert all("set EXAMPLES" in script.read_text() for script in SCRIPTS)


def test_every_size_has_its_scripts() -> None:
    names = {p.stem for p in SCRIPTS}
    for size in ("0point6b", "1point7b", "4b", "8b", "14b", "32b", "30b_a3b", "235b_a22b"):
        for kind in ("pretrain", "full", "lora"):
            assert any(f"qwen3_{size}_" in n and (n.startswith(kind) or f"_{kind}" in n) for n in names), (size, kind)


def test_a_script_says_nothing_of_its_own(tmp_path: Path) -> None:
    """The sizes are in the scripts, everything else is in recipes.sh."""
    for script in SCRIPTS:
        if "recipes.sh" in script.read_text():
            lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
            assert len(lines) <= 7, script


def launch_nodes(tmp_path: Path, hosts: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`examples/launch_nodes.sh` with hosts that are this machine; the script tells what it was given."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/usr/bin/env bash\nhost=$1; shift\ncd /; HOST_NAME=$host exec bash -c "$*"\n')
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text(hosts)
    job = tmp_path / "job.sh"
    job.write_text(
        'echo "$NODE_RANK/$NNODES $MASTER_ADDR ${DATA_PATH:-} $GBS in $PWD: $*"\n'
        'if [ "${FAILS:-}" = "$HOST_NAME" ]; then exit 7; fi\n'
        'if [ -n "${FAILS:-}" ]; then sleep 60; echo late; fi\n'
    )
    command = ["bash", str(ROOT / "examples" / "launch_nodes.sh"), "hosts", "job.sh", *arguments]
    env = os.environ | {"SSH": str(ssh), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=50)


def test_all_nodes_are_started(tmp_path: Path) -> None:
    hosts = "a slots=8\n# spare\nb\n"
    result = launch_nodes(tmp_path, hosts, "--lr", "1 2", DATA_PATH="0.3 x 0.7 y", GBS="64")
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [
        f"a: 0/2 a 0.3 x 0.7 y 64 in {tmp_path}: --lr 1 2",
        f"b: 1/2 a 0.3 x 0.7 y 64 in {tmp_path}: --lr 1 2",
    ]


def test_variables_of_the_page_on_npus_go_along(tmp_path: Path) -> None:
    tables = (ROOT / "docs/npu.md").read_text().split("## Environment")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in tables.splitlines() if line.startswith("| ")]
    names = [name.strip() for row in rows for name in row.split(",") if name.strip() not in ("variable", "MANUAL_GC")]
    assert len(names) > 20
    ssh = tmp_path / "ssh.sh"
    ssh.write_text('#!/usr/bin/env bash\necho "$*"\n')
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("a\n")
    command = ["bash", str(ROOT / "examples/launch_nodes.sh"), str(tmp_path / "hosts"), str(SCRIPTS[0])]
    env = os.environ | dict.fromkeys(names, "7") | {"SSH": str(ssh)}
    said = subprocess.run(command, capture_output=True, text=True, env=env, timeout=50).stdout
    assert [name for name in names if f"'{name}=7'" not in said] == []


def test_a_failing_node_stops_the_others(tmp_path: Path) -> None:
    result = launch_nodes(tmp_path, "a\nb\n", FAILS="b")
    assert result.returncode == 7
    assert "late" not in result.stdout
    assert launch_nodes(tmp_path, "# nobody\n").returncode == 2


# What MindSpeed-LLM's scripts of the same names say (commit c77308a): CPU_AFFINITY_CONF, STREAMS_PER_DEVICE,
# HCCL_CONNECT_TIMEOUT where it is not 3600, --manual-gc-interval.
_ORIGINALS = {
    "pretrain_qwen3_0point6b_4K_ptd": ("2", "", "", ""),
    "pretrain_qwen3_14b_4K_ptd": ("", "", "", ""),
    "tune_qwen3_32b_256K_full_pack_A3_ptd": ("1", "", "6000", ""),
    "tune_qwen3_32b_32K_full_pack_A3_ptd": ("1", "", "6000", ""),
    "pretrain_qwen3_235b_a22b_4k_A3_ptd": ("1", "", "", ""),
    "pretrain_qwen3_30b_a3b_4K_ptd": ("", "", "", "15"),
    "tune_qwen3_235b_a22b_128K_full_pack_A3_ptd": ("1", "32", "", "10"),
    "tune_qwen3_235b_a22b_256K_full_pack_A3_ptd": ("1", "32", "", "10"),
    "tune_qwen3_235b_a22b_64K_full_pack_A3_ptd": ("1", "32", "", "10"),
    "tune_qwen3_235b_a22b_32K_lora_pack_A2_ptd": ("1", "", "", "10"),
    "tune_qwen3_235b_a22b_4K_full_pack_A3_ptd": ("1", "", "", ""),
    "tune_qwen3_30b_a3b_256K_full_pack_A3_ptd": ("1", "", "6000", "50"),
    "tune_qwen3_30b_a3b_32K_full_pack_A+X_ptd": ("1", "", "", "50"),
    "tune_qwen3_30b_a3b_32K_full_pack_A3_ptd": ("1", "", "", "50"),
}


def test_scripts_bind_processes_and_collect_garbage_as_the_originals_do(tmp_path: Path) -> None:
    echo = tmp_path / "python"
    names = ("CPU_AFFINITY_CONF", "STREAMS_PER_DEVICE", "HCCL_CONNECT_TIMEOUT")
    shown = ",".join(f"${{{name}:-}}" for name in names)
    echo.write_text(f'#!/usr/bin/env bash\necho "{shown} $@"\n')
    echo.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(echo), "DRY_RUN": "1"}
    paths = {path.stem: path for path in SCRIPTS}
    for name, (affinity, streams, timeout, interval) in _ORIGINALS.items():
        said = subprocess.run(["bash", paths[name]], capture_output=True, text=True, env=environment, cwd=tmp_path)
        line = said.stdout.splitlines()[0]
        assert line.split(" ")[0] == f"{affinity},{streams},{timeout}", name
        assert (f"--manual-gc --manual-gc-interval {interval}" in line) == bool(interval), name
    mine = environment | {"CPU_AFFINITY_CONF": "0", "MANUAL_GC": "7"}
    path = paths["tune_qwen3_30b_a3b_32K_full_pack_A3_ptd"]
    said = subprocess.run(["bash", path], capture_output=True, text=True, env=mine, cwd=tmp_path)
    assert said.stdout.startswith("0,,")
    assert "--manual-gc-interval 7" in said.stdout
