"""Kills, resumes, wrong input: one clear line, nothing that looks whole."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lines import write_lines

from qwen3_npu.data.preprocess import output, pipeline
from qwen3_npu.data.text import encoder
from qwen3_npu.data.text.encoder import PROBES, Encoder, FastEncoder, open_encoder
from qwen3_npu.data.text.tokenizer import start_loading
from qwen3_npu.data.train.token_file import open_indexed
from qwen3_npu.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
PRETRAIN = ("--handler-name", "GeneralPretrainHandler")
ALPACA = ("--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block per few records, a part per block."""
    monkeypatch.setattr("qwen3_npu.data.read.lines.BLOCK_BYTES", 2048)
    monkeypatch.setattr(output, "PART_BYTES", 1)


def corpus(tmp_path: Path, count: int = 400) -> Path:
    records = [
        {"text": f"document {i} " * (i % 7 + 1), "instruction": f"q{i}", "output": "a" * (i % 9)} for i in range(count)
    ]
    return write_lines(tmp_path / "a.jsonl", records)


def files(folder: Path, start: str) -> dict[str, bytes]:
    """Contents; of records without the times of the files that they are of."""
    found = {p.name.removeprefix(start): p.read_bytes() for p in sorted(folder.glob(start + "*"))}
    return {n: re.sub(rb"\d{19}", b"time", c) if n.endswith(".record.json") else c for n, c in found.items()}


@pytest.mark.parametrize(
    "flags", [PRETRAIN, ALPACA, (*ALPACA, "--pack", "--seq-length", 64)], ids=["text", "sft", "pack"]
)
def test_resume_gives_the_same_bytes(
    flags: tuple, tmp_path: Path, run: Callable, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--input", corpus(tmp_path), *flags, "--workers", 2)
    run(*arguments, "--output-prefix", tmp_path / "whole")
    added = 0

    def dies(self: output.DatasetOutput, outputs: object, real: Callable = output.DatasetOutput.add) -> None:
        nonlocal added
        added += 1
        if added == 6:
            raise KeyboardInterrupt
        real(self, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(output.DatasetOutput, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments, "--output-prefix", tmp_path / "part")
    assert not list(tmp_path.glob("part*.idx")), "nothing looks whole"
    with next(tmp_path.glob("part*.bin.tmp")).open("ab") as file:
        file.write(b"bytes that came after the last finished part")
    run(*arguments, "--resume", "--output-prefix", tmp_path / "part")
    assert files(tmp_path, "part") == files(tmp_path, "whole")


def test_resume_refuses_other_data(
    tmp_path: Path, run: Callable, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = corpus(tmp_path)
    arguments = ("--input", source, *PRETRAIN, "--output-prefix", tmp_path / "o")
    with pytest.raises(UsageError, match="no part was finished"):
        run(*arguments, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(output.DatasetOutput, "publish", lambda self, made: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(*arguments)
    with pytest.raises(UsageError, match="--resume: inputs, tokenizer or flags changed"):
        run(*arguments, "--resume", "--append-eod")
    with source.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UsageError, match="--resume: inputs, tokenizer or flags changed"):
        run(*arguments, "--resume")
    run(*arguments)  # without it, everything anew
    assert len(open_indexed(tmp_path / "o_text_document")) == 401


def test_sigkill_leaves_nothing_that_looks_whole(tmp_path: Path, tiny_tokenizer: str, run: Callable) -> None:
    source = corpus(tmp_path, 20000)
    arguments = ["--input", str(source), *PRETRAIN, "--tokenizer-name-or-path", tiny_tokenizer]
    code = (
        "from qwen3_npu.data.preprocess import output; output.PART_BYTES = 1\n"
        "from qwen3_npu.data.read import lines; lines.BLOCK_BYTES = 8192\n"
        "import runpy; runpy.run_path('preprocess_data.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *arguments, "--output-prefix", str(tmp_path / "part")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = tmp_path / "part.unfinished.json"
    deadline = time.monotonic() + 60
    while not record.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert record.exists()
    assert not list(tmp_path.glob("part*.idx"))
    assert not list(tmp_path.glob("part*.bin"))
    subprocess.run([*command, "--resume"], cwd=ROOT, check=True, capture_output=True)
    run(*arguments, "--output-prefix", tmp_path / "whole")
    assert files(tmp_path, "part_") == files(tmp_path, "whole_")


def test_replacing_output_removes_the_old_index_first(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--input", corpus(tmp_path, 5), *PRETRAIN, "--output-prefix", tmp_path / "o")
    run(*arguments)
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(UsageError, match="cannot be written"):
        run(*arguments)
    assert not (tmp_path / "o_text_document.idx").exists()


def bad_commands(tmp_path: Path) -> list[tuple[list, str]]:
    """Command lines and a part of the one line that answers them."""
    good = write_lines(tmp_path / "good.jsonl", [{"text": "x"}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "cut.json").write_text('[{"text": "a"}, {"text": "b"')
    (tmp_path / "comma.json").write_text('[{"text": "a"} {"text": "b"}]')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"\x1f\x8b no")
    (tmp_path / "open.csv").write_text('text\n"never closed\n')
    (tmp_path / "utf.txt").write_bytes(b"ab\xff\n")
    (tmp_path / "mixed").mkdir()
    write_lines(tmp_path / "mixed" / "a.jsonl", [{"text": "x"}])
    (tmp_path / "mixed" / "b.csv").write_text("text\nx\n")
    return [
        (["--input", tmp_path / "no.jsonl", *PRETRAIN], "no such file"),
        (["--input", tmp_path / "*.xyz", *PRETRAIN], "no file matches"),
        (["--input", tmp_path / "empty.jsonl", *PRETRAIN], "the file is empty"),
        (["--input", tmp_path / "blank.jsonl", *PRETRAIN], "nothing to write; 0 records"),
        (["--input", tmp_path / "cut.json", *PRETRAIN], "breaks at element 2: not JSON"),
        (["--input", tmp_path / "comma.json", *PRETRAIN], "element 2: a comma is missing"),
        (["--input", tmp_path / "bad.parquet", *PRETRAIN], "cannot be read as parquet"),
        (["--input", tmp_path / "bad.jsonl.gz", *PRETRAIN], "cannot be read as jsonl"),
        (["--input", tmp_path / "open.csv", *PRETRAIN], "a quote is probably not closed"),
        (["--input", tmp_path / "utf.txt", *PRETRAIN], r"utf.txt:1: not UTF-8 \(byte 3\)"),
        (["--input", tmp_path / "mixed", *PRETRAIN], "several formats"),
        (["--input", good, "--handler-name", "GeneralPretrainHandlr"], "did you mean GeneralPretrainHandler"),
        (["--input", good, *PRETRAIN, "--json-keys", "txt"], r"good.jsonl:1: no column 'txt'; there is 'text'"),
        (["--input", good, *PRETRAIN, "--prompt-type", "qwen3"], "takes plain text"),
        (["--input", good, *PRETRAIN, "--pack", "--seq-length", 8], "--pack is for conversations"),
        (["--input", good, "--handler-name", "AlpacaStyleInstructionHandler"], "needs --prompt-type"),
        (["--input", good, *ALPACA, "--map-keys", "{prompt: x}"], "--map-keys .*not JSON"),
        (["--input", good, *ALPACA, "--map-keys", '["x"]'], "an object is expected"),
        (["--input", good, *ALPACA, "--map-keys", '{"promt": "x"}'], "did you mean prompt"),
        (["--input", good, *ALPACA, "--neat-pack"], "it needs --pack"),
        (["--input", good, *ALPACA, "--pack"], "--pack needs --seq-length"),
        (["--input", good, *ALPACA, "--enable-thinking", "yes"], "--enable-thinking yes"),
        (["--input", good, *ALPACA, "--tokenizer-name-or-path", tmp_path / "no"], "is not a folder"),
        (["--input", good, *PRETRAIN, "--hf-datasets-params", tmp_path / "no"], "--hf-datasets-params"),
    ]


def test_wrong_input_is_one_clear_line(tmp_path: Path, run: Callable) -> None:
    commands = bad_commands(tmp_path)
    before = sorted(tmp_path.iterdir())
    for command, words in commands:
        with pytest.raises(UsageError, match=words) as caught:
            run(*command, "--output-prefix", tmp_path / "o")
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before, command


def test_exit_status_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "preprocess_data.py", "--input", str(tmp_path / "no.jsonl"), *PRETRAIN]
    result = subprocess.run(
        [*command, "--output-prefix", str(tmp_path / "o")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "no such file" in result.stderr


def test_a_tokenizer_without_chat_tokens_is_refused(tmp_path: Path, run: Callable, tiny_tokenizer: str) -> None:
    config = json.loads((Path(tiny_tokenizer) / "tokenizer.json").read_text())
    config["added_tokens"] = [t for t in config["added_tokens"] if t["content"] == "<|endoftext|>"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(config))
    source = write_lines(tmp_path / "a.jsonl", [{"instruction": "q", "output": "a"}])
    arguments = ("--input", source, "--output-prefix", tmp_path / "o", "--tokenizer-name-or-path", tmp_path / "t")
    with pytest.raises(UsageError, match=r"no token <\|im_start\|>, which --prompt-type qwen3 needs"):
        run(*arguments, *ALPACA)
    with pytest.raises(UsageError, match="names no eos_token"):
        run(*arguments, *PRETRAIN, "--json-keys", "output", "--append-eod")
    with pytest.raises(UsageError, match="no chat template"):
        run(*arguments, *ALPACA[:2], "--prompt-type", "hf")


# ---------------------------------------------------------------------------------------- encoder


def test_a_library_that_disagrees_is_not_used(
    tiny_tokenizer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = open_encoder(start_loading(tiny_tokenizer, "tokenizers"))
    monkeypatch.setattr(FastEncoder, "_encode", lambda self, texts: reference.encode([t.strip() for t in texts]))
    caplog.set_level("INFO", "qwen3_npu")
    assert open_encoder(start_loading(tiny_tokenizer)).name == "tokenizers"
    assert "encodes ' ' differently" in caplog.text
    with pytest.raises(UsageError, match="--tokenizer-backend fastokens"):
        open_encoder(start_loading(tiny_tokenizer), forced=True)


def test_a_library_that_is_missing_is_said_aloud(
    tiny_tokenizer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    caplog.set_level("INFO", "qwen3_npu")
    assert open_encoder(start_loading(tiny_tokenizer)).name == "tokenizers"
    assert "not installed" in caplog.text


def test_batches_are_checked_on_the_way(tiny_tokenizer: str) -> None:
    pytest.importorskip("fastokens")
    fast = open_encoder(start_loading(tiny_tokenizer))
    assert isinstance(fast, FastEncoder)
    fast.encode(["one two", "three"])
    real = fast._encode
    fast._encode = lambda texts: encoder.Tokens(real(texts).ids[::-1], real(texts).lengths)  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="disagree on 'one two'"):
        _ = [fast.encode(["one two", "three"]) for _ in range(8)]


def test_texts_that_are_not_nfc_go_to_the_reference(tiny_tokenizer: str) -> None:
    pytest.importorskip("fastokens")
    fast = open_encoder(start_loading(tiny_tokenizer))
    assert isinstance(fast, FastEncoder)
    sent: list[str] = []
    reference = fast.reference.encode
    fast.reference.encode = lambda texts: sent.extend(texts) or reference(texts)  # type: ignore[method-assign,func-returns-value]
    texts = ["one", "cafe\u0301", "北京", "e\u0301e", ""]
    tokens = fast.encode(texts)
    assert set(sent) == {"one", "cafe\u0301", "e\u0301e"}, "those, and the spot check"
    parts = np.split(tokens.ids, np.cumsum(tokens.lengths[:-1]))
    assert [p.tolist() for p in parts] == [reference([t]).ids.tolist() for t in texts]


def test_real_tokenizers_agree(real_data: Path, real_encoder: Encoder) -> None:
    pytest.importorskip("fastokens")
    assert isinstance(real_encoder, FastEncoder)
    texts = [*PROBES, *(real_data / "sft" / "alpaca_zh_demo.json").read_text().splitlines()[:1000]]
    tokens, expected = real_encoder.encode(texts), real_encoder.reference.encode(texts)
    assert np.array_equal(tokens.ids, expected.ids)
    assert np.array_equal(tokens.lengths, expected.lengths)


def test_only_so_many_records_are_under_way() -> None:
    from concurrent.futures import ThreadPoolExecutor

    taken: list[int] = []
    items = (taken.append(i) or i for i in range(100))  # type: ignore[func-returns-value]
    with ThreadPoolExecutor(2) as pool:
        results = pipeline.in_order(pool, lambda i: i * i, items, 4)
        assert [next(results) for _ in range(3)] == [(0, 0), (1, 1), (2, 4)]
        assert len(taken) <= 3 + 4
        assert len(list(results)) == 97
