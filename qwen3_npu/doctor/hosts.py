"""The other hosts of a job, over ssh: reachable, clocks, the shared folder."""

from __future__ import annotations

import shlex
import subprocess
import time
import uuid
from pathlib import Path

from qwen3_npu.args.tools.doctor import DoctorArgs
from qwen3_npu.doctor.findings import BLOCKER, OK, WARNING, Finding
from qwen3_npu.errors import UsageError

_MOST_SKEW = 5.0  # seconds; logs stay comparable and files of a checkpoint do not seem to come from the future


def read_hostfile(path: str) -> list[str]:
    """Hosts, one per line; text after a host (slots=8) and # comments are ignored.

    Raises:
        UsageError: no such file, or no host in it.
    """
    if not Path(path).is_file():
        raise UsageError(f"--hostfile {path}: no such file")
    lines = [line.split("#")[0].split() for line in Path(path).read_text().splitlines()]
    hosts = [words[0] for words in lines if words]
    if not hosts:
        raise UsageError(f"--hostfile {path}: no host in it")
    return hosts


def look_at_hosts(args: DoctorArgs) -> list[Finding]:
    """Findings about every host of --hostfile."""
    shared = Path(args.shared_dir) if args.shared_dir else None
    if shared and not shared.is_dir():
        raise UsageError(f"--shared-dir {shared}: no such folder on this host")
    token = shared / f".qwen3_npu_doctor_{uuid.uuid4().hex}" if shared else None
    try:
        if token:
            token.touch()
        return [finding for host in read_hostfile(args.hostfile or "") for finding in _host(host, args, token)]
    finally:
        if token:
            token.unlink(missing_ok=True)


def _host(host: str, args: DoctorArgs, token: Path | None) -> list[Finding]:
    remote = "date +%s.%N" + (f"; test -e {shlex.quote(str(token))} && echo shared || echo apart" if token else "")
    before = time.time()
    try:
        result = subprocess.run([*shlex.split(args.ssh), host, remote], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return [Finding(BLOCKER, host, "no answer within 30 s", "check the network and the host's name")]
    took = time.time() - before
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        return [Finding(BLOCKER, host, last, f"make `{args.ssh} {host}` work without a password (ssh-copy-id)")]
    words = result.stdout.split()
    skew = float(words[0]) - (before + took / 2)
    findings = [Finding(OK, host, f"reachable in {took:.1f} s, clock {skew:+.1f} s")]
    if abs(skew) > _MOST_SKEW + took:
        findings = [Finding(WARNING, host, f"its clock is {skew:+.0f} s off", "synchronise the clocks (chrony, ntp)")]
    if token and words[1] == "apart":
        text = f"does not see {token.parent} as this host does"
        findings.append(Finding(BLOCKER, host, text, "mount the same folder on every host"))
    return findings
