"""Curves for Weights & Biases, SwanLab and MLflow. One that fails, or is slow, does not hold a training up.

Each tracker lives in a thread of its own, from its start to its end: all that a training does is to put numbers into a
queue. Their packages are imported there, for those that were asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from qwen3_npu import log
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.args.trackers import TrackerArgs

_WAITING = 10_000  # records that may wait for a slow tracker; further ones are counted as lost
_LAST = 30.0  # seconds that the end of a training waits for a tracker
Values = dict[str, float]
Config = Mapping[str, Any]


class Tracker(Protocol):
    """What is asked of a service."""

    def log(self, step: int, values: Values) -> None:
        """Numbers of one step; of a step that comes again, further ones."""

    def close(self) -> None:
        """Everything is sent, or on the disk in offline modes."""


class _Wandb:
    def __init__(self, args: TrackerArgs, config: Config) -> None:
        module = importlib.import_module("wandb")
        self.run = module.init(
            project=args.wandb_project, name=args.wandb_exp_name, dir=args.wandb_save_dir, config=dict(config)
        )

    def log(self, step: int, values: Values) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Swanlab:
    def __init__(self, args: TrackerArgs, config: Config) -> None:
        self.run = importlib.import_module("swanlab").init(project=args.swanlab_project, config=dict(config))

    def log(self, step: int, values: Values) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    EXPERIMENT = "qwen3_npu"

    def __init__(self, args: TrackerArgs, config: Config) -> None:
        self.client = importlib.import_module("mlflow").MlflowClient(tracking_uri=args.mlflow_uri)
        found = self.client.get_experiment_by_name(self.EXPERIMENT)
        experiment = found.experiment_id if found else self.client.create_experiment(self.EXPERIMENT)
        self.run = self.client.create_run(experiment).info.run_id
        for name, value in config.items():
            self.client.log_param(self.run, name, value)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)


_KINDS: dict[str, tuple[str, Callable[[TrackerArgs, Config], Tracker]]] = {
    "wandb_project": ("wandb", _Wandb),
    "swanlab_project": ("swanlab", _Swanlab),
    "mlflow_uri": ("mlflow", _Mlflow),
}


class Tracked:
    """One tracker in its thread. A failure is logged once, counted, and logged again at the end."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.name, self.start = name, start
        self.lost = 0
        self.failed = False
        self.queue: queue.Queue[tuple[int, Values] | None] = queue.Queue(_WAITING)
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def log(self, step: int, values: Values) -> None:
        """Never waits, never raises."""
        if self.failed:
            self.lost += 1
            return
        try:
            self.queue.put_nowait((step, values))
        except queue.Full:
            self.lost += 1

    def close(self, seconds: float = _LAST) -> None:
        """Wait for what is on its way, for so long at most, and say what was lost."""
        if not self.failed:
            with contextlib.suppress(queue.Full):
                self.queue.put(None, timeout=seconds)
            self.thread.join(seconds)
            if self.thread.is_alive():
                self.lost += self.queue.qsize()
                log.warning(f"{self.name} is not done {seconds:g} s after the last step; it is not waited for")
        if self.lost:
            log.warning(f"{self.name}: {self.lost} records were not sent")

    def _work(self) -> None:
        try:
            tracker = self.start()
            while (item := self.queue.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except BaseException as error:  # whatever a service's library raises, SystemExit too
            self.failed = True
            self.lost += 1 + sum(item is not None for item in list(self.queue.queue))
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            log.warning(f"{self.name} has failed ({reason}); the training continues without")


def open_trackers(args: TrackerArgs, config: Config) -> list[Tracked]:
    """Those that the flags name.

    Args:
        config: what the services show as settings of the run.
    """

    def tracked(name: str, make: Callable[[TrackerArgs, Config], Tracker]) -> Tracked:
        return Tracked(name, lambda: make(args, config))

    return [tracked(*kind) for field, kind in _KINDS.items() if getattr(args, field) is not None]


def settings(args: PretrainArgs) -> dict[str, Any]:
    """All flags of a training by name, those without a value left out."""
    found = {name: value for group in args for name, value in dataclasses.asdict(group).items()}
    return {name: value for name, value in found.items() if value not in (None, [], "")}


def finite(values: Mapping[str, float]) -> Values:
    """What every service takes."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
