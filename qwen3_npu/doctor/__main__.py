"""Check this machine (with --hostfile also others) for what trainings need; exit status 1 on a blocker."""

from qwen3_npu import cli
from qwen3_npu.args.tools.doctor import DoctorArgs
from qwen3_npu.doctor.checks import diagnose
from qwen3_npu.doctor.findings import print_findings
from qwen3_npu.doctor.hosts import look_at_hosts
from qwen3_npu.doctor.machine import machine_facts


def main() -> int:
    (args,) = cli.parse("qwen3_npu.doctor", __doc__, [DoctorArgs]).groups
    findings = diagnose(machine_facts(args))
    if args.hostfile:
        findings += look_at_hosts(args)
    return print_findings(findings)


if __name__ == "__main__":
    cli.run("qwen3_npu.doctor", main)
