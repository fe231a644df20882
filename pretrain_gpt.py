#!/usr/bin/env python3
"""Train a Qwen3 model with Megatron-Core, under torchrun or as a single process."""

from qwen3_npu import cli, log
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.args.rules.switches import check_switches
from qwen3_npu.distributed import environment


def main() -> None:
    rank, world_size, _ = environment.ranks()
    log.setup(rank, world_size)
    parsed = cli.parse("pretrain_gpt.py", __doc__, GROUPS, FOREIGN_TRAINING)
    args = PretrainArgs(*parsed.groups)
    from qwen3_npu.data.train.data_path import check_data
    from qwen3_npu.training.prepare import length
    from qwen3_npu.training.prepare.plan import plan_training
    from qwen3_npu.training.prepare.raw_data import prepared, raw_words
    from qwen3_npu.training.prepare.start import check_start
    from qwen3_npu.training.prepare.taught import start_line

    parsed.notes.extend(check_switches(args, parsed.given))
    plan = plan_training(args, world_size)
    if rank == 0:
        check_start(args, plan.arch)
    raw = raw_words(args) if args.runtime.dry_run else []
    if raw:
        parsed.notes.append(f"raw data: {' '.join(raw)} would be preprocessed")
        parsed.notes.extend(start_line(args, None))
        args = length.settled(args, plan.global_batch, None)
    else:
        asked = prepared(args)
        facts = check_data(
            asked.data,
            plan.arch.vocab_size,
            seq_length=asked.train.seq_length,
            scans=rank == 0,
            evaluates=asked.report.eval_iters > 0,
        )
        args = length.settled(asked, plan.global_batch, facts.samples)
        parsed.notes.extend(start_line(asked, facts))
        parsed.notes.extend(length.describe_length(asked, args.train.steps, plan.global_batch, facts))
    for line in plan.describe(args) + parsed.notes:
        log.info(line)
    if args.runtime.dry_run:
        return
    from qwen3_npu.platform import select_platform

    platform = select_platform(args.runtime.device, args.spikes.npu_asd)
    platform.activate()
    from qwen3_npu.distributed.failure import recorded
    from qwen3_npu.training.loop import run

    with recorded():
        run(platform, args, plan)


if __name__ == "__main__":
    cli.run("pretrain_gpt.py", main)
