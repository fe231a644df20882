"""A chat on a terminal: what goes wrong in a turn ends the turn, not the chat."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import quiz
import tiny
from qwen3_npu import cli
from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs
from qwen3_npu.inference.chat.screen import Screen
from qwen3_npu.inference.engine import Engine
from qwen3_npu.inference.plan import plan_inference
from qwen3_npu.platform import select_platform


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = tiny.arch(vocab_size=800, max_position_embeddings=2048)
    return quiz.write_tokenizer(tiny.write_model(tmp_path_factory.mktemp("model") / "hf", arch))


class User(threading.Thread):
    """Types on the other end of a terminal: each text once the one before it has been answered as expected."""

    def __init__(self, master: int, typed: list[tuple[bytes, bytes]]) -> None:
        super().__init__(daemon=True)
        self.master, self.typed, self.seen, self.failed = master, typed, b"", ""

    def run(self) -> None:
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        for awaited, text in self.typed:
            start, limit = time.monotonic(), 20
            mark = getattr(self, "mark", 0)
            while awaited not in self.seen[mark:]:
                time.sleep(0.005)
                if time.monotonic() - start > limit:
                    self.failed = f"{awaited!r} did not come"
                    text = b"\x03/exit\n"
                    break
            self.mark = mark + self.seen[mark:].find(awaited) + len(awaited)
            while text:
                text = text[os.write(self.master, text) :]

    def _read(self) -> None:
        while True:
            try:
                self.seen += os.read(self.master, 65536)
            except OSError:
                return


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """stdin and stdout are a terminal; the other end of it."""
    master, slave = os.openpty()
    with open(slave, "w", encoding="utf-8", closefd=False) as out, open(slave, encoding="utf-8") as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        monkeypatch.setattr(sys, "stdout", out)
        yield master
    os.close(master)


def talk(process: Any, model: Path, *flags: object) -> None:
    from qwen3_npu.inference.run import generate

    words = ["--load", str(model), "--device", "cpu", "--task", "chat", "--prompt-type", "qwen3", "--temperature", "0"]
    args = InferenceArgs(*cli.parse("test", "", GROUPS, FOREIGN, argv=[*words, *map(str, flags)]).groups)
    plan = plan_inference(args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=1)
    generate(select_platform("cpu"), process, args, plan)


def recorded(monkeypatch: pytest.MonkeyPatch, decode: Callable[[list[int]], str]) -> list[str]:
    """The texts that the model is given."""
    prompts: list[str] = []
    generate = Engine.generate

    def noted(self: Engine, requests: Any, *rest: Any) -> None:
        prompts.extend(decode(request.tokens) for request in requests)
        generate(self, requests, *rest)

    monkeypatch.setattr(Engine, "generate", noted)
    return prompts


def test_a_chat_survives_what_users_do(process: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = recorded(monkeypatch, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    long = "the lighthouse keeper " * 200  # more than a terminal's line of 4,095 bytes
    asked = b"\nYou: "
    with terminal(monkeypatch) as master:
        user = User(
            master,
            [
                (asked, b"bad \xff byte\n"),
                (b"(not sent: byte 0xff at 5 is not UTF-8", b""),
                (asked, b"word " * 9000 + b"\n"),
                (b"(not sent: the message makes", b""),
                (asked, "\u5317x\x7f\u4eac wrong\x17\x1b[A?\n".encode()),
                (b"qwen3_npu: ", b""),
                (asked, long.encode() + b"\n"),
                (b"qwen3_npu: ", b"\x03typed ahead\n"),
                (b"(stopped)", b""),
                (asked, b""),
                (b"qwen3_npu: ", b"\x03"),
                (b"(stopped)", b""),
                (asked, long.encode() + b"\n"),
                (b"is full: the oldest", b""),
                (b"qwen3_npu: ", b"\x03"),
                (asked, b"/exit\n"),
            ],
        )
        user.start()
        talk(process, model, "--max-new-tokens", 300)
    assert not user.failed, user.seen.decode("utf-8", "replace")[-3000:]
    questions = [prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0] for prompt in prompts]
    assert questions == ["\u5317\u4eac ?", long.strip(), "typed ahead", long.strip()]
    assert long.strip() in prompts[2], "a stopped answer is part of the conversation"
    assert prompts[3].count(long.strip()) == 1, "the oldest turns went"


def test_piped_lines_are_read_whole(
    process: Any, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = recorded(monkeypatch, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    text = b"caf\xc3\xa9 \xff\n\n" + "caf\u00e9 \u5317\r\n".encode() + b"x " * 500 + b"\n" + b"last"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="ascii"))
    talk(process, model, "--max-new-tokens", 2, "--history-turns", 1)
    questions = [prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0] for prompt in prompts]
    assert questions == ["caf\u00e9 \u5317", "x " * 499 + "x", "last"]
    assert prompts[2].count("<|im_start|>user\n") == 2
    shown = capsys.readouterr().out
    assert "byte 0xff at 7 is not UTF-8" in shown
    assert shown.count("--history-turns") == 1
    assert "after 2 tokens: --max-new-tokens" in shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_model_cannot_steer_the_terminal() -> None:
    hostile = "a\x1b[2Jb\x07\x9b31m\u202ec\r\n\td\U0001f468\u200d\U0001f469"
    for out, expected in (
        (Terminal(), "a\\x1b[2Jb\\x07\\x9b31m\\u202ec\\r\n\td\U0001f468\u200d\U0001f469"),
        (io.StringIO(), hostile),
    ):
        screen = Screen(out, hidden=False)
        screen.write(hostile)
        assert expected in out.getvalue()


def test_thoughts_that_the_prompt_opens_are_hidden() -> None:
    """A Thinking-2507 answer holds </think> only."""
    answer = "let me see\n</think>\n\nyes"
    for hidden, expected in ((True, "qwen3_npu: yes\n"), (False, f"qwen3_npu: <think>{answer}\n")):
        out = io.StringIO()
        screen = Screen(out, hidden=hidden, opened=True)
        for letter in answer:
            screen.write(letter)
        screen.end()
        assert out.getvalue() == expected
