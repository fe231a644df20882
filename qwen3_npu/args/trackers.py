"""Flags of services that show the curves of a training."""

from __future__ import annotations

import dataclasses
import importlib.util

from qwen3_npu.cli import flag
from qwen3_npu.errors import UsageError


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
