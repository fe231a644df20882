"""The time of a training by phase: a table, a stacked picture over steps, and the reason why it is slow."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen3_npu import cli, log
from qwen3_npu.args.tools.ledger import LedgerArgs
from qwen3_npu.errors import UsageError
from qwen3_npu.ledger.picture import COLOURS, png, stacked
from qwen3_npu.ledger.records import LedgerEntry, read
from qwen3_npu.ledger.why import explained, facts_line, total, why


def table(entries: Sequence[LedgerEntry]) -> tuple[list[str], list[str]]:
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


def main() -> None:
    log.setup()
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words = ["--run-dir", *words]
    (args,) = cli.parse("qwen3_npu.ledger", __doc__, [LedgerArgs], argv=words).groups
    folder = Path(args.run_dir)
    entries = read(folder)
    lines, order = table(entries)
    steps = sum(entry.steps for entry in entries)
    log.info(f"{folder}: {steps} steps to step {entries[-1].step}; {facts_line(entries)}")
    for line in lines:
        log.info(line)
    log.info(f"explained: {100 * explained(entries):.1f} % of the wall time")
    picture = Path(args.picture) if args.picture else (folder if folder.is_dir() else folder.parent) / "ledger.png"
    try:
        picture.write_bytes(png(stacked([entry.mean for entry in entries], order)))
    except OSError as error:
        raise UsageError(f"--picture {picture} cannot be written: {error.strerror}") from None
    log.info(f"picture: {picture}, a column for each record, colours as above")
    log.info(why(entries))
    if args.profile_path:
        _msprof(args.profile_path)


def _msprof(folder: str) -> None:
    """Call the vendor's analysis of a --profile recording, if it is installed."""
    program = shutil.which("msprof-analyze")
    if program is None:
        raise UsageError("--profile-path: msprof-analyze is not installed; pip install msprof-analyze")
    subprocess.run([program, "advisor", "all", "-d", folder], check=False)


if __name__ == "__main__":
    cli.run("qwen3_npu.ledger", main)
