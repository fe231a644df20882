"""The time of a training by phase: a table, a stacked picture over steps, and the reason why it is slow."""

import shutil
import subprocess
import sys
from pathlib import Path

from qwen3_npu import cli, log
from qwen3_npu.args.tools.ledger import LedgerArgs
from qwen3_npu.errors import UsageError
from qwen3_npu.ledger.records import read

_RECORDING = "_ascend_pt"  # folders of torch_npu's profiler end so


def main() -> None:
    log.setup()
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words = ["--run-dir", *words]
    (args,) = cli.parse("qwen3_npu.ledger", __doc__, [LedgerArgs], argv=words).groups
    from qwen3_npu.ledger.show import report

    folder = Path(args.run_dir)
    picture = Path(args.picture) if args.picture else (folder if folder.is_dir() else folder.parent) / "ledger.png"
    try:
        lines = report(read(folder), str(folder), picture)
    except OSError as error:
        raise UsageError(f"--picture {picture} cannot be written: {error.strerror}") from None
    for line in lines:
        log.info(line)
    if args.profile_path:
        _msprof(Path(args.profile_path), folder if folder.is_dir() else folder.parent)


def _msprof(folder: Path, output: Path) -> None:
    """Call the vendor's analysis of a --profile recording. Raises: UsageError: there is none, or it fails."""
    program = shutil.which("msprof-analyze")
    if program is None:
        raise UsageError("--profile-path: msprof-analyze is not installed; pip install msprof-analyze")
    recordings = [folder] if folder.name.endswith(_RECORDING) else sorted(folder.glob(f"*{_RECORDING}"))
    if not recordings:
        raise UsageError(
            f"--profile-path {folder} holds no recording of an NPU (*{_RECORDING}); give --profile-save-path"
        )
    # Of one rank it wants the recording's own folder, of several the one that holds them.
    which = recordings[0] if len(recordings) == 1 else folder
    words = [program, "advisor", "all", "-d", str(which), "-o", str(output), "-l", "en"]
    status = subprocess.run(words, check=False).returncode
    if status:
        raise UsageError(f"--profile-path {folder}: msprof-analyze ended with status {status}; it says why above")
    log.info(f"msprof-analyze: its reports of {which}: mstt_advisor_*.html in {output}, .xlsx in {output / 'log'}")


if __name__ == "__main__":
    cli.run("qwen3_npu.ledger", main)
