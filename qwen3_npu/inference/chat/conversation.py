"""A chat on the console. Answers appear while they are generated. An error in a turn ends that turn only."""

from __future__ import annotations

import os
import sys

from qwen3_npu import console
from qwen3_npu.args.inference import InferenceArgs
from qwen3_npu.data.text.conversation import ASSISTANT, THINK, USER, Message, without_thought
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.chat.keyboard import Keyboard
from qwen3_npu.inference.chat.screen import Screen
from qwen3_npu.inference.engine import Engine, Request
from qwen3_npu.inference.runner import Runner
from qwen3_npu.inference.sampling import sampling_of
from qwen3_npu.inference.text import TextStream, Writer

EXIT, CLEAR = ("/exit", "q", "quit", "exit"), ("/clear", "clear", "new")
_HELP = "Type a message; /clear forgets the conversation, /exit ends it, Ctrl-C ends an answer."


def chat(runner: Runner, writer: Writer, args: InferenceArgs, keyboard: Keyboard) -> None:
    """Ask and answer until /exit or the end of the input. Rank 0 has the console; every process calls this."""
    conversation = _Conversation(runner, writer, args, keyboard)
    conversation.say(_HELP)
    for turn in range(sys.maxsize):
        said = runner.agreed(conversation.ask() if conversation.is_main else None)
        if said is None or said in EXIT:
            return
        if said in CLEAR:
            conversation.history.clear()
        else:
            conversation.answer(turn, said)


class _Conversation:
    """One chat.

    Attributes:
        history: messages so far, without the thoughts: question, answer, question, answer ..
        forgets: whether the user was told that --history-turns limits it.
    """

    def __init__(self, runner: Runner, writer: Writer, args: InferenceArgs, keyboard: Keyboard) -> None:
        self.runner, self.writer, self.flags, self.keyboard = runner, writer, args.generate, keyboard
        self.is_main, self.alone = runner.world.rank == 0, runner.world.size == 1
        weights, flags = args.weights, args.generate
        self.engine = Engine(runner, slots=1, kv_cache=weights.use_kv_cache, prefix_cache=weights.prefix_cache)
        self.sampling = sampling_of(flags, args.runtime.seed, sample=flags.temperature != 0)
        # Without a terminal no other process has to be told of Ctrl-C.
        self.asks_others = not self.alone and runner.agreed(keyboard.terminal)
        self.history: list[Message] = []
        self.forgets = False

    def say(self, text: str) -> None:
        """Print a line for the user."""
        if self.is_main:
            console.show(text)

    def ask(self) -> str | None:
        """Read a message of the user; None at the end of the input."""
        while True:
            try:
                line = self.keyboard.line("\nYou: ")
            except UnicodeDecodeError as error:
                self.say(
                    f"(not sent: byte {error.object[error.start]:#04x} at {error.start + 1} is not UTF-8; try again)"
                )
                continue
            except KeyboardInterrupt:
                line = None
            if line is None or line.strip():
                return line if line is None else line.strip()

    def answer(self, turn: int, said: str) -> None:
        """Answer a message, or tell the user why it is not sent."""
        question = Message(USER, said)
        try:
            text, tokens = self._prompt(question)
        except UsageError as error:  # a template that refuses the conversation
            self.say(f"(not sent: {error})")
            return
        positions = self.runner.plan.positions
        if len(tokens) >= positions:
            self.say(f"(not sent: the message makes {len(tokens)} tokens, and the model has {positions} positions)")
            return
        request = Request(turn, tokens, self.flags.max_new_tokens)
        opened = text.rstrip().endswith(THINK)
        answer = Message(ASSISTANT, (THINK if opened else "") + self._generate(request, opened))
        if request.finish == "length":
            limit = (
                "the model has no more positions" if request.limit < self.flags.max_new_tokens else "--max-new-tokens"
            )
            self.say(f"(the answer ends here, after {request.limit} tokens: {limit})")
        # The template leaves earlier thoughts out; a text without them keeps the next prompt short everywhere.
        self.history += [question, _without_thought(answer)]
        most = 2 * self.flags.history_turns
        if len(self.history) > most:
            del self.history[: len(self.history) - most]
            if not self.forgets:
                self.say(
                    f"(from here on only the last {most // 2} questions and answers are remembered: --history-turns)"
                )
                self.forgets = True

    def _prompt(self, question: Message) -> tuple[str, list[int]]:
        """Text and tokens of the conversation; its oldest turns are dropped until there is room for an answer."""
        positions = self.runner.plan.positions
        room = positions - min(self.flags.max_new_tokens, positions // 4)
        dropped = 0
        while True:
            text = self.writer.text([*self.history, question])
            tokens = self.writer.tokens(text)
            if len(tokens) <= room or not self.history:
                break
            del self.history[:2]
            dropped += 1
        if dropped:
            self.say(f"(the context of {positions} positions is full: the oldest {dropped} turns are forgotten)")
        return text, tokens

    def _generate(self, request: Request, opened: bool) -> str:
        stream = TextStream(self.writer.encoder, self.runner.plan.eos, self.flags.stop or ())
        screen = None
        if self.is_main:
            out = sys.stdout or open(os.devnull, "w", encoding="utf-8")
            screen = Screen(out, hidden=self.flags.hide_thinking, opened=opened)
        stopped = False

        def on_token(request: Request) -> bool:
            nonlocal stopped
            piece = stream.add(request.tokens[-1])
            if screen is not None:
                screen.write(piece)
            stopped = self.is_main and self.keyboard.interrupted()
            if self.asks_others:
                stopped = self.runner.told(stopped)
            return stream.stopped or stopped

        with self.keyboard.answering(alone=self.alone):
            # One copy of the model answers; the others serve its experts.
            self.engine.generate([request] if self.runner.data_rank == 0 else [], self.sampling, on_token)
        rest = stream.rest()
        if screen is not None:
            screen.write(rest)
            screen.end()
            if stopped:
                self.say("(stopped)")
        return self.runner.agreed(stream.text)


def _without_thought(answer: Message) -> Message:
    """The answer without thoughts; of an answer that was stopped inside a thought, the text before it."""
    found = without_thought(answer)
    return found._replace(content=found.content.partition(THINK)[0])
