"""Every file at every boundary: what is not understood ends in one line and exit status 2, whatever lies there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import samples

import quiz
import tiny
from qwen3_npu import cli
from qwen3_npu.args import inference
from qwen3_npu.checkpoint.mapping.lora import Lora
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.plan import plan_inference

ARCH = tiny.arch(vocab_size=800)
ITERATION = "iter_0000001"
DAMAGE: dict[str, bytes | object] = {
    "a list": b"[1]",
    "null": b"null",
    "empty": b"",
    "a pickle": b"\x80\x04\xff\x00",
    "latin-1": '{"a": "\xe9"}'.encode("latin-1"),
    "nested": b'{"added_tokens": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "an object": b"{}",
    "other types": [{}],
    "NaN": float("nan"),
    "huge": 10**400,
    "a folder": os.mkdir,
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: os.symlink("/nonexistent/x", path),
}
# Folder -> its files that are read.
FILES = {
    "hf": "config.json generation_config.json tokenizer_config.json tokenizer.json model.safetensors",
    "sharded": "model.safetensors.index.json integrity.json",
    "mg": "config.json latest_checkpointed_iteration.txt integrity.json mp_rank_00/model_optim_rng.pt",
    "dist": ".metadata metadata.json common.pt __0_0.distcp",
    "peft": "adapter_config.json adapter_model.safetensors qwen3_npu_prompts.json",
}
# Every kind for every file takes minutes: EVERY=1 in the environment. Else each file meets every fourth and a pipe.
SHARE = 1 if os.environ.get("EVERY") else 4
CASES = [(folder, file) for folder, files in FILES.items() for file in files.split()]
# What must be understood by whom: weights are read later than a plan, other files by one of both.
READ = {
    "asked": [case for case in CASES if case[1].endswith("_config.json") and case[0] == "hf"],
    "converted": [case for case in CASES if case[1].endswith(".json") and not case[1].startswith(("gen", "tok"))],
}
READ["asked"] += [("hf", "config.json"), ("hf", "tokenizer.json"), ("mg", "latest_checkpointed_iteration.txt")]
READ["asked"] += [("peft", "qwen3_npu_prompts.json")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("every_file")
    quiz.write_tokenizer(samples.write_floats(root / "hf", ARCH))
    (root / "hf" / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 7}')
    samples.to_mg(root / "hf", root / "mg")
    samples.to_mg(root / "hf", root / "dist", "--ckpt-format", "torch_dist")
    samples.to_hf(root / "mg", root / "sharded", "--max-shard-size", 0.0005)
    samples.write_adapter(root / "peft", ARCH, Lora(4, 8.0, samples.ALL_TARGETS), shared_a=True)
    (root / "peft" / "qwen3_npu_prompts.json").write_text('{"prompt_type": "qwen3"}')
    return root


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """A pipe is never waited for."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def damaged(source: Path, folder: Path, file: str, kind: str) -> Path:
    """A copy of a folder with another thing in a file's place; without seals, so that it is read."""
    shutil.copytree(source, folder)
    path = folder / file
    if not path.exists() and (folder / ITERATION / file).exists():
        path = folder / ITERATION / file
    if file != "integrity.json":
        for seal in folder.rglob("integrity.json"):
            seal.unlink()
    what, before = DAMAGE[kind], path.read_bytes()
    path.unlink()
    if callable(what):
        what(path)
    elif isinstance(what, bytes):
        path.write_bytes(what)
    elif file.endswith(".json"):
        path.write_text(json.dumps(dict.fromkeys(json.loads(before), what)))
    else:
        path.write_bytes(before[: len(before) // 2])
    return folder


def refusal(*words: object) -> str:
    """What inference.py says before it starts; empty: nothing."""
    argv = [*map(str, words), "--prompt", "hi", "--device", "cpu"]
    args = inference.InferenceArgs(*cli.parse("", "", inference.GROUPS, inference.FOREIGN, argv=argv).groups)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            plan_inference(args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=1)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("folder", "file"), CASES)
def test_whatever_lies_there_is_one_line(folder: str, file: str, folders: Path, tmp_path: Path) -> None:
    taken: dict[str, list[str]] = {"converted": [], "asked": []}
    first = CASES.index((folder, file)) % SHARE
    for kind in dict.fromkeys([*list(DAMAGE)[first::SHARE], "a pipe"]):
        bad = damaged(folders / folder, tmp_path / kind, file, kind)
        flags: tuple[object, ...] = ("--load-dir", bad, "--load-model-type", "hf", "--save-model-type", "mg")
        ask: tuple[object, ...] = ("--load", bad, "--tokenizer-name-or-path", bad)
        if folder in ("mg", "dist"):
            flags = ("--load-dir", bad, "--load-model-type", "mg", "--save-model-type", "hf")
            ask = ("--load", bad, "--tokenizer-name-or-path", folders / "hf")
        elif folder == "peft":
            flags = ("--load-dir", folders / "hf", "--lora-load", bad, "--no-lora-check")
            ask = ("--load", folders / "hf", "--lora-load", bad, "--tokenizer-name-or-path", folders / "hf")
        ran = samples.run(*flags, "--save-dir", tmp_path / "out", "--overwrite")
        assert ran.code in (0, 2), (kind, ran.out, ran.err)
        if ran.code:
            lines = [line for line in ran.err.splitlines() if "error:" in line]
            assert len(lines) == 1, (kind, ran.err)
            assert "Traceback" not in ran.err, kind
        line = refusal(*ask)
        assert "\n" not in line, (kind, line)
        assert len(line) < 500, (kind, line)
        taken["converted"] += [kind] * (ran.code == 0)
        taken["asked"] += [kind] * (not line)
    for program, read in READ.items():
        if (folder, file) in read:  # a file of defaults may say nothing, or be missing
            assert set(taken[program]) <= {"an object", "a link to nothing"}, taken
