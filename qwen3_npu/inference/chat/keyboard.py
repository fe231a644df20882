"""Input of a user in a chat: lines of any length in UTF-8, and Ctrl-C during an answer.

A terminal's own line editing truncates a line after 4,095 bytes (termios(3), canonical mode) and drops what is typed or
pasted beyond it. So the terminal passes single keys here, and this module handles the editing keys.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator
from types import FrameType

from qwen3_npu import console

_INTERRUPT, _END, _KILL, _WORD = b"\x03", b"\x04", b"\x15", b"\x17"  # Ctrl-C, Ctrl-D, Ctrl-U, Ctrl-W
_ERASE = (b"\x7f", b"\x08")
# Keys as they arrive: an escape sequence (arrows ..., which do nothing), one control character, or text.
_KEYS = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.)?|[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\x08\x0a-\x1f\x7f]+", re.DOTALL)


class Keyboard:
    """Lines from a pipe or a file.

    Attributes:
        terminal: whether the lines come from a terminal.
    """

    terminal = False

    def __init__(self) -> None:
        self.stopped = False

    def line(self, prompt: str) -> str | None:
        """The next line without its line end; None at the end of the input.

        Raises:
            UnicodeDecodeError: it is not UTF-8.
        """
        console.show(prompt, "")
        read = self._read()
        return None if read is None else read.decode("utf-8")

    def _read(self) -> bytes | None:
        stream = getattr(sys.stdin, "buffer", None)
        if stream is None:  # there is no stdin, or it has no bytes
            return None if sys.stdin is None else sys.stdin.readline().encode("utf-8", "surrogateescape") or None
        line: bytes = stream.readline()
        return line.rstrip(b"\r\n") if line else None

    def interrupted(self) -> bool:
        """Whether the user asked to stop since `answering` began."""
        return self.stopped

    @contextlib.contextmanager
    def answering(self, *, alone: bool) -> Iterator[None]:
        """In this context Ctrl-C ends the answer and not the program.

        Args:
            alone: there is only this process. (With several processes, a signal to one of them ends all.)
        """
        self.stopped = False
        if not alone or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self.stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class TerminalKeyboard(Keyboard):
    """Lines from a terminal whose settings are changed (see `keyboard`)."""

    terminal = True

    def __init__(self, descriptor: int, screen: int) -> None:
        """Args: screen: descriptor to echo on."""
        super().__init__()
        self.descriptor, self.screen, self.waiting, self.closed = descriptor, screen, b"", False

    def _read(self) -> bytes | None:
        line = b""
        while True:
            if not self.waiting and not self._fill():
                return line or None
            key = _KEYS.match(self.waiting)
            assert key is not None
            self.waiting = self.waiting[key.end() :]
            pressed = key.group()
            if pressed in (b"\n", b"\r"):
                self._echo(b"\n")
                return line
            if pressed in (_INTERRUPT, _END) and not line:
                self._echo(b"\n")
                return None
            if (pressed[0] >= 0x20 and pressed != b"\x7f") or pressed[:1] == b"\t":
                line += pressed
                self._echo(pressed)
            elif pressed in (*_ERASE, _KILL, _WORD, _INTERRUPT):
                line = self._shortened(line, pressed)

    def _shortened(self, line: bytes, key: bytes) -> bytes:
        if key in _ERASE:
            left = re.sub(rb"[^\x80-\xbf][\x80-\xbf]*\Z|[\x80-\xbf]\Z", b"", line)  # one character of UTF-8
        else:
            left = re.sub(rb"[^ ]* *\Z", b"", line) if key == _WORD else b""
        gone = line[len(left) :].decode("utf-8", "replace")
        width = sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in gone if not unicodedata.combining(c))
        self._echo(b"\b \b" * width)
        return left

    def _fill(self) -> bool:
        """Wait for keys; False at the end of the terminal."""
        try:
            found = os.read(self.descriptor, 65536)
        except OSError:  # the terminal is gone
            found = b""
        self.closed = not found
        self.waiting += found
        return bool(found)

    def _echo(self, text: bytes) -> None:
        with contextlib.suppress(OSError):
            while text:
                text = text[os.write(self.screen, text) :]

    def interrupted(self) -> bool:
        # Not select(): it takes no descriptor above 1023.
        keys = select.poll()
        keys.register(self.descriptor, select.POLLIN)
        while not self.closed and keys.poll(0) and self._fill():
            pass
        _, key, after = self.waiting.rpartition(_INTERRUPT)
        if key:
            self.waiting, self.stopped = after, True
        return self.stopped


@contextlib.contextmanager
def keyboard() -> Iterator[Keyboard]:
    """A context with the user's lines. The terminal passes single keys in it, so lines of any length work. Enter it
    before slow work, so that text typed ahead is complete, too.
    """
    try:
        import termios
    except ImportError:  # not a Unix
        yield Keyboard()
        return
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
        screen = os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NOCTTY)
    except (OSError, ValueError, AttributeError, termios.error):  # not a terminal
        yield Keyboard()
        return

    def single_keys(*signal_and_frame: object) -> None:
        changed = termios.tcgetattr(descriptor)
        changed[3] &= ~(termios.ICANON | termios.ECHO)
        changed[6][termios.VINTR] = b"\0"  # Ctrl-C comes as a key: under torchrun the signal would end all processes
        changed[6][termios.VMIN], changed[6][termios.VTIME] = 1, 0
        termios.tcsetattr(descriptor, termios.TCSANOW, changed)

    single_keys()
    main = threading.current_thread() is threading.main_thread()
    # After Ctrl-Z and fg the terminal has the shell's settings.
    handler = signal.signal(signal.SIGCONT, single_keys) if main else None
    try:
        yield TerminalKeyboard(descriptor, screen)
    finally:
        if main:
            signal.signal(signal.SIGCONT, handler)
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
        os.close(screen)
