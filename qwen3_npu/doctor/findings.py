"""The findings, and their output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

OK, WARNING, BLOCKER = "ok", "warning", "BLOCKER"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: OK, WARNING (trainings start) or BLOCKER (trainings fail or are wrong).
        about: topic, in a word or two.
        text: the finding.
        remedy: what to do; empty if there is nothing to do.
    """

    level: str
    about: str
    text: str
    remedy: str = ""


def print_findings(findings: Sequence[Finding]) -> int:
    """Print the findings, remedies under them. Returns: the exit status, 1 if there is a blocker."""
    width = max(len(f.about) for f in findings)
    for finding in findings:
        print(f"{finding.level:<8} {finding.about:<{width}}  {finding.text}")
        if finding.remedy:
            print(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    blockers, warnings = (sum(f.level == level for f in findings) for level in (BLOCKER, WARNING))
    print(f"{len(findings)} checks, {blockers} blockers, {warnings} warnings")
    return 1 if blockers else 0
