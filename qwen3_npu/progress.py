"""One progress line for long work: done, rate(s), time left. On a terminal it rewrites itself; in a log it repeats."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_UNITS = ("", "k", "M", "G", "T")


def human(number: float, unit: str = "") -> str:
    """`1234567, "B"` -> `"1.23 MB"`."""
    scale = 0
    while abs(number) >= 999.5 and scale < len(_UNITS) - 1:
        number /= 1000
        scale += 1
    digits = f"{number:.0f}" if scale == 0 and number == int(number) else f"{number:.3g}"
    return f"{digits} {_UNITS[scale]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """`3725` -> `"1:02:05"`, `65` -> `"1:05"`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts several quantities, e.g. documents, tokens and bytes. The first one determines the time left.

    Args:
        what: the first words of the line.
        total: final value of the first counter; None if unknown (no time left is shown then).
        counters: name -> unit; `total` belongs to the first one.
        every: seconds between lines where the output is not a terminal.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        counters: dict[str, str],
        *,
        every: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        self.what, self.total, self.counters = what, total, counters
        self.counts = dict.fromkeys(counters, 0.0)
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.every = 0.2 if self.terminal else every
        self.start = self.shown = time.monotonic()

    def add(self, **counts: float) -> None:
        """Count more; shows the line when it is time."""
        for name, count in counts.items():
            self.counts[name] += count
        now = time.monotonic()
        if now - self.shown >= self.every:
            self.shown = now
            self._show("\r" if self.terminal else "", "" if self.terminal else "\n")

    def line(self) -> str:
        """The present line."""
        elapsed = max(time.monotonic() - self.start, 1e-9)
        first = next(iter(self.counters))
        done = self.counts[first]
        parts = [f"{self.what}: {human(done, self.counters[first])}"]
        if self.total:
            parts[0] += f" of {human(self.total, self.counters[first])} ({100 * min(done / self.total, 1):.0f} %)"
        parts += [f"{human(self.counts[n] / elapsed, unit)}/s" for n, unit in self.counters.items()]
        if self.total and done and done < self.total:
            parts.append(f"{duration((self.total - done) * elapsed / done)} left")
        parts.append(f"{duration(elapsed)} elapsed")
        return ", ".join(parts)

    def _show(self, before: str, after: str) -> None:
        self.stream.write(f"{before}{self.line():<100}" if self.terminal else self.line())
        self.stream.write(after)
        self.stream.flush()

    def close(self) -> None:
        """The last line, with the final counts."""
        self._show("\r" if self.terminal else "", "\n")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self.terminal:
            self.stream.write("\n")
