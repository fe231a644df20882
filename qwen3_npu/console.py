"""Standard output for people. Unsupported characters are escaped; if it is closed or full, the program continues."""

from __future__ import annotations

import contextlib
import os
import sys

from qwen3_npu.errors import printable

# Line ends, tabs, and the joiners that emoji, Persian and Indic scripts are written with.
_KEPT = "\n\t\u200c\u200d"


def escape_output() -> None:
    """Let stdout and stderr escape the characters that their encoding lacks (LANG=C), instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(OSError, ValueError):  # closed, or data wait in it
                reconfigure(errors="backslashreplace")


def escaped(text: str) -> str:
    """The text for a terminal, without characters that move the cursor, change colours or title, or reorder text."""
    return printable(text, _KEPT)


def show(text: str, end: str = "\n") -> None:
    """Write text and flush. On a terminal, control characters are escaped; elsewhere the text stays as it is."""
    if sys.stdout is None:  # the process was started without a stdout
        return
    try:
        sys.stdout.write((escaped(text) if sys.stdout.isatty() else text) + end)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        give_up(error)


def give_up(error: BaseException) -> None:
    """Handle an unwritable stdout: warn once on stderr, and drop all further output."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"warning: standard output cannot be written ({reason}); further output is not shown there\n")
    # The descriptor is replaced, since Python writes the rest of the stream's buffer there at the end.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
