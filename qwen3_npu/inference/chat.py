"""A conversation on the console: answers appear while they are made, thoughts dimmed or hidden."""

from __future__ import annotations

import sys
from typing import TextIO

from qwen3_npu.args.inference import InferenceArgs
from qwen3_npu.data.text.conversation import ASSISTANT, END_THINK, THINK, USER, Message, without_thought
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.engine import Engine, Request
from qwen3_npu.inference.runner import Runner
from qwen3_npu.inference.sampling import Sampling
from qwen3_npu.inference.text import Stream, Writer

EXIT, CLEAR = ("/exit", "q", "quit", "exit"), ("/clear", "clear", "new")
_HELP = "Type a message; /clear forgets the conversation, /exit ends it."
_DIM, _PLAIN = "\033[2m", "\033[0m"


def chat(runner: Runner, writer: Writer, args: InferenceArgs) -> None:
    """Ask and answer until /exit or the end of the input. Rank 0 has the console.

    Raises:
        UsageError: there is no template to write conversations with.
    """
    if writer.args.template is None:
        raise UsageError("--task chat needs a template: --prompt-type qwen3 or --hf-chat-template")
    generate, weights = args.generate, args.weights
    engine = Engine(runner, slots=1, kv_cache=weights.use_kv_cache, prefix_cache=weights.prefix_cache)
    sampling = Sampling(
        generate.temperature > 0,
        generate.temperature or 1.0,
        generate.top_k,
        generate.top_p,
        generate.repetition_penalty,
        args.runtime.seed,
    )
    is_main = runner.world.rank == 0
    if is_main:
        print(_HELP)
    history: list[Message] = []
    for turn in range(sys.maxsize):
        said = runner.agreed(_ask() if is_main else None)
        if said is None or said in EXIT:
            return
        if said in CLEAR:
            history.clear()
            continue
        question = Message(USER, str(said))
        request = Request(turn, writer.tokens(writer.text([*history, question])), generate.max_new_tokens)
        stream = Stream(writer.encoder, runner.plan.eos, generate.stop or ())
        screen = Screen(sys.stdout, hidden=generate.hide_thinking) if is_main else None

        def on_token(request: Request, stream: Stream = stream, screen: Screen | None = screen) -> bool:
            piece = stream.add(request.tokens[-1])
            if screen is not None:
                screen.write(piece)
            return stream.stopped

        # One copy of the model answers; the others serve its experts.
        engine.generate([request] if runner.data_rank == 0 else [], sampling, on_token)
        rest = stream.rest()
        if screen is not None:
            screen.write(rest)
            screen.end()
        # The template leaves earlier thoughts out; a text without them keeps the next prompt short everywhere.
        answer = without_thought(Message(ASSISTANT, str(runner.agreed(stream.text))))
        history += [question, answer]
        del history[: max(len(history) - 2 * generate.history_turns, 0)]


def _ask() -> str | None:
    """A line from the user; None at the end of the input."""
    while True:
        try:
            line = input("\nYou: ").strip()
        except EOFError:
            return None
        if line:
            return line


class Screen:
    """Shows an answer; what stands between <think> and </think> is dimmed (off a terminal: marked) or not shown."""

    def __init__(self, out: TextIO, *, hidden: bool) -> None:
        self.out, self.hidden, self.colours = out, hidden, out.isatty()
        self.thinking = self.after_thought = False
        self.waiting = ""  # may be the beginning of a tag
        self._put("qwen3_npu: ")

    def write(self, piece: str) -> None:
        """Show more of the answer."""
        self.waiting += piece
        while True:
            tag = END_THINK if self.thinking else THINK
            before, found, after = self.waiting.partition(tag)
            if not found:
                break
            self._show(before)
            self.waiting = after
            self.thinking = not self.thinking
            if self.hidden:
                self.after_thought = not self.thinking
            else:
                self._put((_DIM if self.thinking else _PLAIN) if self.colours else tag)
        held = next((n for n in range(len(tag) - 1, 0, -1) if self.waiting.endswith(tag[:n])), 0)
        cut = len(self.waiting) - held
        self._show(self.waiting[:cut])
        self.waiting = self.waiting[cut:]

    def end(self) -> None:
        """The answer is over."""
        self._show(self.waiting)
        self._put((_PLAIN if self.colours else "") + "\n")

    def _show(self, text: str) -> None:
        if self.after_thought:  # the empty line that ends a hidden thought
            text = text.lstrip("\n")
        if text and not (self.thinking and self.hidden):
            self.after_thought = False
            self._put(text)

    def _put(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
