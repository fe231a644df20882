"""The records of a training's metrics.jsonl that say where its time went. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3_npu import schema
from qwen3_npu.errors import UsageError

_TIMES = ("steps", "seconds", "mean", "most", "work", "host", "planned")


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """The steps since the record before, per step.

    Attributes:
        step: the last of them.
        seconds: of the wall clock.
        mean, most: of each kind: seconds of the mean rank; seconds of the rank with the most, and that rank.
        host: of each kind, what the host's clock said, where `mean` and `most` are of the device's events.
        facts: integers, names and shares that explain times: `training.reports.ledger.facts_of`, padding, imbalance.
        planned: `gains.gains`, of a training whose device was known.
    """

    step: int
    steps: int
    seconds: float
    mean: dict[str, float]
    most: dict[str, tuple[float, int]]
    facts: dict[str, object]
    host: dict[str, float] = dataclasses.field(default_factory=dict)
    planned: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)


def read(folder: Path) -> list[LedgerEntry]:
    """The records of a folder. Raises: UsageError: it has none, or they are damaged."""
    path = folder / "metrics.jsonl" if folder.is_dir() else folder
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give the --tensorboard-dir of a training")
    found: dict[int, LedgerEntry] = {}
    for number, line in enumerate(schema.read_small(path, 1 << 30).splitlines(), start=1):
        if b'"ledger"' in line:
            where = f"{path}, line {number}"
            outer = schema.record(schema.parse_json(line, where), where)
            entry = entry_of(outer.integer("step", least=0), outer.record("ledger"), f"{where}: ledger")
            found[entry.step] = entry  # after a resume a step comes again
    if not found:
        raise UsageError(f"{path} holds no record of a ledger; train with --tensorboard-dir and --ledger-interval")
    return [found[step] for step in sorted(found)]


def entry_of(step: int, record: schema.Record, where: str) -> LedgerEntry:
    """The entry that a record says. Raises: UsageError: it is damaged."""
    facts = {name: value for name, value in record.fields.items() if name not in _TIMES}
    host = _seconds(record.record("host"), where) if "host" in record.fields else {}
    most = {kind: _pair(pair, f"{where}: {kind}") for kind, pair in record.record("most").fields.items()}
    return LedgerEntry(
        step=step,
        steps=record.integer("steps", least=1),
        seconds=record.number("seconds", least=0.0),
        mean=_seconds(record.record("mean"), where),
        most={
            kind: (
                schema.number(pair[0], f"{where}: {kind}", least=0),
                schema.integer(pair[1], f"{where}: {kind}", least=0),
            )
            for kind, pair in most.items()
        },
        facts=facts,
        host=host,
        planned=_planned(record, where),
    )


def _planned(record: schema.Record, where: str) -> dict[str, tuple[str, float]]:
    fields = schema.record(record.fields.get("planned", {}), f"{where}: planned").fields
    found = {}
    for cause, pair in fields.items():
        name = f"{where}: {cause}"
        words, share = _pair(pair, name)
        found[cause] = schema.text(words, name), schema.number(share, name, least=0)
    return found


def _pair(value: object, where: str) -> Sequence[Any]:
    if len(found := schema.sequence(value, where)) != 2:
        raise UsageError(f"{where} is {schema.shown(value)}; a pair is expected")
    return found


def _seconds(record: schema.Record, where: str) -> dict[str, float]:
    return {kind: schema.number(value, f"{where}: {kind}", least=0) for kind, value in record.fields.items()}
