"""The metrics of /metrics in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

import collections
import threading

_HELP = {
    "requests": ("counter", "requests by endpoint and HTTP status"),
    "prompt_tokens": ("counter", "tokens of prompts"),
    "cached_prompt_tokens": ("counter", "tokens of prompts that were found in the cache"),
    "generated_tokens": ("counter", "tokens of answers"),
    "dropped_answers": ("counter", "answers that nobody waited for any more"),
    "first_token_seconds": ("summary", "time from a request to its first piece of an answer"),
    "request_seconds": ("summary", "time from a request to the end of its answers"),
    "running": ("gauge", "answers that are being made"),
    "waiting": ("gauge", "answers that wait for a slot"),
    "slots": ("gauge", "answers that can be made at the same time"),
    "context_tokens": ("gauge", "longest prompt with its answer"),
}
_PREFIX = "qwen3_npu_"


class Metrics:
    """Thread-safe counters.

    Attributes:
        running, waiting, slots, context, cached: as of the engine's last pass.
    """

    def __init__(self, slots: int, context: int) -> None:
        self.slots, self.context = slots, context
        self.running = self.waiting = self.cached = 0
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._totals: collections.Counter[str] = collections.Counter()
        self._sums: dict[str, list[float]] = {name: [0, 0.0] for name, (kind, _) in _HELP.items() if kind == "summary"}

    def answered(self, endpoint: str, status: int) -> None:
        """Count an answered request."""
        with self._lock:
            self._requests[endpoint, status] += 1

    def add(self, name: str, count: int) -> None:
        """Increase a counter."""
        with self._lock:
            self._totals[name] += count

    def took(self, name: str, seconds: float) -> None:
        """Add a value to a summary."""
        with self._lock:
            self._sums[name][0] += 1
            self._sums[name][1] += seconds

    def text(self) -> str:
        """All metrics as text."""
        with self._lock:
            values: dict[str, list[tuple[str, float]]] = {
                name: [(f"{name}_total", self._totals[name])] for name, (kind, _) in _HELP.items() if kind == "counter"
            }
            values["cached_prompt_tokens"] = [("cached_prompt_tokens_total", self.cached)]
            values["requests"] = [
                (f'requests_total{{endpoint="{endpoint}",status="{status}"}}', count)
                for (endpoint, status), count in sorted(self._requests.items())
            ]
            for name, (count, seconds) in self._sums.items():
                values[name] = [(f"{name}_count", count), (f"{name}_sum", seconds)]
        gauges = {"running": self.running, "waiting": self.waiting, "slots": self.slots, "context_tokens": self.context}
        values |= {name: [(name, value)] for name, value in gauges.items()}
        lines = []
        for name, (kind, text) in _HELP.items():
            full = f"{_PREFIX}{name}" + ("_total" if kind == "counter" else "")
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
            lines += [f"{_PREFIX}{key} {value:.10g}" for key, value in values[name]]
        return "\n".join(lines) + "\n"
