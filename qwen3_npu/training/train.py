"""The loop over the steps of a training, with reports, evaluations and checkpoints between them."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from qwen3_npu import log
from qwen3_npu.training.reports.ledger import Ledger, facts_of
from qwen3_npu.training.reports.profiling import Profiling
from qwen3_npu.training.spikes.rollback import corrupted
from qwen3_npu.watch import here

if TYPE_CHECKING:
    from qwen3_npu.training.loop import Trainer


def train(trainer: Trainer) -> None:
    """All steps up to --train-iters."""
    args, last = trainer.args, trainer.args.train.steps
    if trainer.position.iteration >= last:
        log.info(f"nothing to do: step {trainer.position.iteration} of --train-iters {last} is reached")
        return
    reporter = trainer.reporter()
    if args.train.manual_gc:
        gc.disable()
    first = trainer.position.iteration + 1
    profiling = Profiling(trainer.platform, args.profile, trainer.world.rank, first=first, last=last)
    interval = args.report.ledger_steps
    ledger = Ledger(interval, facts_of(args, trainer.plan) if interval else {}, trainer.world.device)
    stop: str | None = None
    if trainer.spikes.rolls_back and trainer.position.iteration not in trainer.saver.own:
        with here.during("save"):
            trainer.saver.save(trainer.position)  # a rollback in the first steps needs a checkpoint
    while trainer.position.iteration < last and stop is None:
        profiling.before(trainer.position.iteration + 1)
        before, result = trainer.position, trainer.step()
        if trainer.position.iteration <= before.iteration:
            reporter.went_back(before.iteration + 1, trainer.position.iteration)
            continue
        iteration = trainer.position.iteration
        if is_due := reporter.is_due(iteration):
            with here.during("optimizer"):
                trainer.platform.synchronize()  # the line needs its numbers; this wait belongs to the steps
        with here.during("report"):
            load = trainer.expert_load() if is_due else None
            reporter.step(iteration, result, load)
        if args.train.manual_gc_interval and iteration % args.train.manual_gc_interval == 0:
            gc.collect()
        if args.report.eval_iters and (iteration % args.report.eval_interval == 0 or iteration == last):
            with here.during("eval"), reporter.paused():
                trainer.evaluate(reporter)
        stop = trainer.exits.reason(iteration, result.wishes)
        profiling.after(iteration, last=iteration == last or stop is not None)
        due = args.checkpoint.save_interval and iteration % args.checkpoint.save_interval == 0
        export = trainer.export.due(iteration, is_last=iteration == last)
        saves = bool(args.checkpoint.save and (due or export or stop or iteration == last))
        if not _check_state(trainer, saves=saves):
            reporter.went_back(iteration, trainer.position.iteration)
            continue
        if saves:
            with here.during("save"), reporter.paused():
                _save(trainer, export=export)
        record = ledger.step(iteration, result.tally, load, last=iteration == last or stop is not None)
        if record is not None:
            with here.during("report"):
                reporter.ledger(iteration, record)
    with here.during("report"):
        reporter.close()
    with here.during("save"):
        trainer.saver.close()
        trainer.export.finish()
    if stop is not None:
        log.info(f"stopped after step {trainer.position.iteration} of {last}: {stop}")


def _check_state(trainer: Trainer, *, saves: bool) -> bool:
    """Run the state check if it is due. False after a rollback. Raises: Stopped: the training must end."""
    interval, iteration = trainer.args.spikes.replica_check_interval, trainer.position.iteration
    is_due = trainer.replicas is not None and (saves or iteration % interval == 0)
    if not is_due and not (saves and trainer.state is not None):
        return True
    with here.during("check"):
        problem = trainer.replicas.compare() if trainer.replicas is not None and is_due else None
        if problem is None and trainer.state is not None and saves:
            problem = trainer.state.problem()
    if problem is None:
        return True
    trainer.go_back(corrupted(trainer.spikes, problem, iteration))
    return False


def _save(trainer: Trainer, *, export: bool) -> None:
    trainer.export.finish()  # the export may be reading a checkpoint that saving would remove
    trainer.saver.save(trainer.position)
    trainer.spikes.keep_history()
    if export:
        trainer.saver.finish()
        if not trainer.saver.failed:
            trainer.export.start(trainer.position.iteration)
