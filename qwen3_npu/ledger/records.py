"""The records of time by phase in a training's metrics.jsonl. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qwen3_npu import schema
from qwen3_npu.errors import UsageError

_TIMES = ("steps", "seconds", "mean", "most", "work", "host", "planned")


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """Times of the steps since the previous record, per step.

    Attributes:
        step: the last of these steps.
        seconds: wall-clock time.
        mean, most: kind -> seconds of the mean rank; kind -> (seconds, rank) of the rank with the most.
        host: kind -> seconds by the host's clock, if `mean` and `most` come from the device's events.
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
    """The records in a folder. Raises: UsageError: it has none, or they are damaged."""
    path = folder / "metrics.jsonl" if folder.is_dir() else folder
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give the --tensorboard-dir of a training")
    found: dict[int, LedgerEntry] = {}
    for number, line in enumerate(schema.read_small(path, 1 << 30).splitlines(), start=1):
        if b'"ledger"' in line:
            where = f"{path}, line {number}"
            outer = schema.record(schema.parse_json(line, where), where)
            entry = entry_of(outer.integer("step", least=0), outer.record("ledger"), f"{where}: ledger")
            found[entry.step] = entry  # a step may come twice after a resume; the later record counts
    if not found:
        raise UsageError(f"{path} holds no record of a ledger; train with --tensorboard-dir and --ledger-interval")
    return [found[step] for step in sorted(found)]


def entry_of(step: int, record: schema.Record, where: str) -> LedgerEntry:
    """The entry of a record. Raises: UsageError: it is damaged."""
    facts = {name: value for name, value in record.fields.items() if name not in _TIMES}
    host = _seconds(record.record("host"), where) if "host" in record.fields else {}
    most = {kind: schema.pair(pair, f"{where}: {kind}") for kind, pair in record.record("most").fields.items()}
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
        words, share = schema.pair(pair, name)
        found[cause] = schema.text(words, name), schema.number(share, name, least=0)
    return found


def _seconds(record: schema.Record, where: str) -> dict[str, float]:
    return {kind: schema.number(value, f"{where}: {kind}", least=0) for kind, value in record.fields.items()}
