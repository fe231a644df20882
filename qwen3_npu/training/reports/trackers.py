"""Curves for Weights & Biases, SwanLab and MLflow. A tracker that fails or is slow does not delay the training.

Each tracker runs in its own thread. The training only puts numbers into a queue. The packages of the requested trackers
are imported in these threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from qwen3_npu import log
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.args.trackers import TrackerArgs

_WAITING = 10_000  # records that may wait for a slow tracker; further ones are counted as lost
_LAST = 30.0  # seconds that the end of a training waits for a tracker
Values = dict[str, float]
RunSettings = Mapping[str, object]


class Tracker(Protocol):
    """The interface of a service."""

    def log(self, step: int, values: Values) -> None:
        """Send numbers of one step; a step may be sent again with further numbers."""

    def close(self) -> None:
        """Finish: everything is sent, or on disk in offline mode."""


class _Wandb:
    def __init__(self, args: TrackerArgs, config: RunSettings) -> None:
        module = importlib.import_module("wandb")
        self.run = module.init(
            project=args.wandb_project, name=args.wandb_exp_name, dir=args.wandb_save_dir, config=dict(config)
        )

    def log(self, step: int, values: Values) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Swanlab:
    def __init__(self, args: TrackerArgs, config: RunSettings) -> None:
        self.run = importlib.import_module("swanlab").init(project=args.swanlab_project, config=dict(config))

    def log(self, step: int, values: Values) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    EXPERIMENT = "qwen3_npu"

    def __init__(self, args: TrackerArgs, config: RunSettings) -> None:
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


_KINDS: dict[str, tuple[str, Callable[[TrackerArgs, RunSettings], Tracker]]] = {
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
        """Wait for queued records, up to a timeout, and log lost ones."""
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


def open_trackers(args: TrackerArgs, config: RunSettings) -> list[Tracked]:
    """The trackers that the flags name.

    Args:
        config: settings of the run that the services show.
    """

    def tracked(name: str, make: Callable[[TrackerArgs, RunSettings], Tracker]) -> Tracked:
        return Tracked(name, lambda: make(args, config))

    return [tracked(*kind) for field, kind in _KINDS.items() if getattr(args, field) is not None]


def settings(args: PretrainArgs) -> dict[str, object]:
    """All flags of a training that have a value, by name."""
    found = {name: value for group in args for name, value in dataclasses.asdict(group).items()}
    return {name: value for name, value in found.items() if value not in (None, [], "")}


def finite(values: Mapping[str, float]) -> Values:
    """The finite numbers, which every service accepts."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
