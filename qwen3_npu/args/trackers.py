"""Flags of what a training reports, and of services that show its curves."""

from __future__ import annotations

import dataclasses
import importlib.util

from qwen3_npu.cli import flag
from qwen3_npu.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """reports"""

    log_interval: int = flag(100, minimum=1, help="steps between log lines")
    eval_interval: int = flag(1000, minimum=1, help="steps between evaluations on the validation data")
    eval_iters: int = flag(100, minimum=0, help="global batches of one evaluation; 0: no evaluation")
    ledger_interval: int = flag(
        100,
        minimum=0,
        unit="steps",
        help="steps between records of the time by phase (python -m qwen3_npu.ledger); 0: none",
    )
    timing_log_level: int = flag(
        0,
        choices=[0, 1, 2],
        help="1, 2: print the share of time of each kind after each log line; records of the time are then made every "
        "--log-interval steps",
    )
    fingerprint_interval: int = flag(
        0,
        minimum=0,
        unit="steps",
        help="steps between fingerprints of kernels and layers (the first in step 1), in --tensorboard-dir; two runs "
        "are compared by python -m qwen3_npu.parity; 0: none",
    )
    fingerprint_format: str = flag(
        "passport",
        choices=["passport", "msprobe"],
        help="format of fingerprints; msprobe: dumps of every rank for msprobe compare (mindstudio-probe)",
    )
    tensorboard_dir: str | None = flag(None, metavar="DIR", help="folder of tensorboard events and metrics.jsonl")

    @property
    def ledger_steps(self) -> int:
        """Steps between records of where the time went; 0: none are made."""
        if self.timing_log_level:
            return self.log_interval
        return self.ledger_interval if self.tensorboard_dir else 0

    def __post_init__(self) -> None:
        if self.fingerprint_interval and self.tensorboard_dir is None:
            raise UsageError(
                f"--fingerprint-interval {self.fingerprint_interval} writes into --tensorboard-dir; give that, too"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackerArgs:
    """trackers, beside --tensorboard-dir"""

    wandb_project: str | None = flag(
        None, help="project of Weights & Biases that receives the curves; WANDB_MODE=offline needs no network"
    )
    wandb_exp_name: str | None = flag(None, help="name of this run there; default: wandb chooses one")
    wandb_save_dir: str | None = flag(None, metavar="DIR", help="folder of wandb's own files; default: wandb's")
    swanlab_project: str | None = flag(
        None, help="project of SwanLab that receives the curves; SWANLAB_MODE=offline needs no network"
    )
    mlflow_uri: str | None = flag(
        None,
        metavar="URI",
        help="tracking server or store of MLflow that receives the curves: http://.., sqlite:///FILE",
    )

    def __post_init__(self) -> None:
        if self.wandb_project is None and (self.wandb_exp_name or self.wandb_save_dir):
            raise UsageError("--wandb-exp-name and --wandb-save-dir need --wandb-project")

    def check_installed(self) -> None:
        """Raises: UsageError: a package that a flag needs is not installed."""
        wanted = {"wandb_project": "wandb", "swanlab_project": "swanlab", "mlflow_uri": "mlflow"}
        for field, package in wanted.items():
            if getattr(self, field) is not None and importlib.util.find_spec(package) is None:
                name = "mlflow-skinny" if package == "mlflow" else package
                raise UsageError(f"--{field.replace('_', '-')} needs the package {package}: pip install {name}")
