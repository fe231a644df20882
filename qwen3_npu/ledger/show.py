"""The ledger for people: a table, a stacked picture over steps, and why the training is slow. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen3_npu.ledger.picture import COLOURS, png, stacked_columns
from qwen3_npu.ledger.records import LedgerEntry
from qwen3_npu.ledger.why import explained, facts_line, total, why

_SHOWN = 0.005  # share of the time; smaller ones are left out of a line


def report(entries: Sequence[LedgerEntry], name: str, picture: Path) -> list[str]:
    """Lines for the console; the picture is written. Raises: OSError: it cannot be."""
    lines, order = _table(entries)
    picture.write_bytes(png(stacked_columns([entry.mean for entry in entries], order)))
    return [
        f"{name}: {sum(entry.steps for entry in entries)} steps to step {entries[-1].step}; {facts_line(entries)}",
        *lines,
        f"explained: {100 * explained(entries):.1f} % of the wall time",
        f"picture: {picture}, a column for each record, colours as above",
        why(entries),
    ]


def shares_line(seconds: float, mean: Mapping[str, float]) -> str:
    """Each kind's share of the time, the largest first."""
    shares = {kind: value / max(seconds, 1e-12) for kind, value in mean.items()}
    order = sorted((kind for kind in shares if shares[kind] >= _SHOWN), key=lambda kind: -shares[kind])
    return ", ".join(f"{kind} {100 * shares[kind]:.1f} %" for kind in order)


def _table(entries: Sequence[LedgerEntry]) -> tuple[list[str], list[str]]:
    """Lines of a table, and the kinds by size."""
    kinds, seconds = total(entries)
    steps = sum(entry.steps for entry in entries)
    order = sorted(kinds, key=lambda kind: -kinds[kind])
    lines = [f"{'kind':<18}{'share':>8}{'s/step':>12}  {'most, on rank':<20}colour"]
    for kind, (colour, *_) in zip(order, COLOURS * 3, strict=False):
        most = max((entry.most[kind] for entry in entries if kind in entry.most), default=(0.0, 0))
        lines.append(
            f"{kind:<18}{100 * kinds[kind] / seconds:>7.1f}%{kinds[kind] / steps:>12.5f}  "
            f"{f'{most[0]:.5f} s, {most[1]}':<20}{colour}"
        )
    return lines, order
