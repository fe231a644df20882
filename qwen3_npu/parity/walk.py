"""Compare two recordings in the order of computation: find the first operation that rounding does not explain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from qwen3_npu.errors import UsageError
from qwen3_npu.training.fingerprints.files import Recording
from qwen3_npu.training.fingerprints.gather import OTHER, TRAINING
from qwen3_npu.training.fingerprints.recorder import LAYER, Noted
from qwen3_npu.training.fingerprints.sketch import NUMBERS, difference

# A multiple of what rounding explains: another order of sums, or of rounding, is a few times it.
MARGIN = 8.0
_UNIT = {"fp32": 2.0**-22, "bf16": 2.0**-8}  # smaller differences are not judged: a few units in the last place
_NARROWER = _UNIT["fp32"] / _UNIT["bf16"]


class RecordPlace(NamedTuple):
    """The place of a record, from its name."""

    step: str
    micro_batch: str
    module: str
    operation: str
    way: str
    tensor: str

    def __str__(self) -> str:
        micro = f", micro-batch {self.micro_batch}" if self.micro_batch != "0" else ""
        where = f" in {self.module}" if self.module else ""
        name = "the output" if self.operation == LAYER else f"{self.way} of {self.operation}"
        return f"step {self.step}{micro}: {name}{where}, {self.tensor}"


class Breach(NamedTuple):
    """A record outside what rounding explains."""

    case: str
    place: RecordPlace
    what: str
    is_certain: bool  # the result is wrong for its own inputs, so the fault is in this operation


class Walked(NamedTuple):
    """Result of the comparison of one case: number of records, used part of the tolerance, findings in order."""

    records: int
    used: float
    findings: list[Breach]

    @property
    def first(self) -> Breach | None:
        """The first record that is wrong by its own inputs; else the first that differs."""
        certain = [finding for finding in self.findings if finding.is_certain]
        return next(iter(certain or self.findings), None)


def place_of(name: str) -> RecordPlace:
    """The place in a record's name. Raises: UsageError: it is no name of a record."""
    parts = name.removeprefix(OTHER).split("|")[-6:]
    if len(parts) != 6:
        raise UsageError(f"{name!r} is no name of a record")
    parts[3] = parts[3].split("#")[0]
    return RecordPlace(*parts)


def walk(case: str, found: Recording, expected: Recording) -> Walked:
    """Compare a case of tiny models: what was computed again by itself; layers, gradients, losses with the passport.

    Raises:
        UsageError: the recordings have different cases or models.
    """
    if case not in expected.cases:
        raise UsageError(f"the passport has no case {case}; it has {', '.join(expected.cases)}")
    here, there, dtype = found.cases[case], expected.cases[case], case.split()[-1]
    unit = _UNIT[dtype]
    findings, used, count = [], 0.0, 0
    index, explained = {name: i for i, name in enumerate(there.names)}, _explained(case, expected)
    if here.raised is None and (lost := explained.keys() - set(here.names)):
        raise UsageError(f"the passport is of other models: nothing here is {min(lost)}; record it anew")
    for name, row in zip(here.names, here.rows, strict=True):
        place, (value, rounding) = place_of(name), map(float, row[NUMBERS:])
        if is_certain := not math.isnan(rounding):
            what = "float64 with the same inputs"
        elif name in explained:
            what, rounding = "the passport", explained[name]
            value = difference(row[:NUMBERS], there.rows[index[name]][:NUMBERS])
        else:
            continue
        allowed, count = MARGIN * max(rounding, unit), count + 1
        used = max(used, value / allowed)
        if not value <= allowed:
            said = f"differs by {value:.1e} from {what}; rounding explains {allowed:.1e}"
            findings.append(Breach(case, place, said, is_certain))
    if here.raised is not None:
        name, _, said = here.raised.partition(": ")
        findings.append(Breach(case, _raised_at(name), f"failed: {said}", True))
    return Walked(count, used, findings)


def _raised_at(label: str) -> RecordPlace:
    parts = [*label.split("|"), "call"][:5]
    return place_of("|".join([*parts, "no result"]))


def _explained(case: str, passport: Recording) -> dict[str, float]:
    """The difference that rounding explains, up to each record: that of bf16 and float32 on the recording machine."""
    name, dtype = case.rsplit(" ", 1)
    narrow, wide = passport.cases[f"{name} bf16"], passport.cases[f"{name} fp32"]
    factor = 1.0 if dtype == "bf16" else _NARROWER
    exact = dict(zip(wide.names, wide.rows, strict=True))
    most: dict[tuple[str, str], float] = {}
    explained = {}
    for record, row in zip(narrow.names, narrow.rows, strict=True):
        place = place_of(record)
        if place.operation == LAYER and record in exact:
            key = place.step, place.way
            most[key] = max(most.get(key, 0.0), difference(row[:NUMBERS], exact[record][:NUMBERS]))
            explained[record] = factor * most[key]
    return explained


def walk_runs(found: Recording, expected: Recording, passport: Recording) -> Walked:
    """Compare a step of two real trainings: find the first record whose difference is more than rounding.

    Args:
        passport: gives the effect of rounding on each kind of operation.

    Raises:
        UsageError: their layouts or models differ.
    """
    if found.layout != expected.layout:
        raise UsageError(f"the two runs have other layouts: {found.layout}; {expected.layout}")
    here, there = found.cases[TRAINING], expected.cases[TRAINING]
    index = {name: i for i, name in enumerate(there.names)}
    # Some kernels add gradients of weights by themselves, in calls that others do not have.
    other = sorted(name for name in set(here.names) ^ set(there.names) if "|add_weight_gradient#" not in name)
    if other:
        raise UsageError(
            f"the two runs computed other things: {len(other)} records are in one of them, e.g. {other[0]}"
        )
    dtype = found.layout.split()[-1]
    usual, unit = _usual(passport, dtype), _UNIT[dtype]
    findings, used, before = [], 0.0, unit
    for name, row in zip(here.names, here.rows, strict=True):
        if name not in index:
            continue
        place = place_of(name)
        gap = difference(row[:NUMBERS], there.rows[index[name]][:NUMBERS])
        allowed = MARGIN * max(before, usual.get((place.operation, place.way), 0.0))
        used = max(used, gap / allowed)
        if not gap <= allowed:
            what = f"differs by {gap:.1e}, all before it by {before:.1e} at most"
            findings.append(Breach(TRAINING, place, what, False))
            break  # later operations have other inputs
        before = max(before, gap)
    return Walked(len(index.keys() & set(here.names)), used, findings)


def _usual(passport: Recording, dtype: str) -> dict[tuple[str, str], float]:
    """(operation, forward or backward) -> the largest difference that rounding explains, by the recomputation."""
    usual: dict[tuple[str, str], float] = {}
    for noted in _of_dtype(passport, dtype):
        for name, row in zip(noted.names, noted.rows, strict=True):
            place, rounding = place_of(name), float(row[-1])
            if math.isfinite(rounding):
                key = place.operation, place.way
                usual[key] = max(usual.get(key, 0.0), rounding)
    return usual


def _of_dtype(recording: Recording, dtype: str) -> Iterator[Noted]:
    return (noted for case, noted in recording.cases.items() if case.endswith(dtype))
