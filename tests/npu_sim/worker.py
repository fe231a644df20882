"""One process of a world of simulated NPUs; its environment is `wheel.environment()`."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import warnings
from pathlib import Path

if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch_npu")
    faulthandler.enable()  # the stub ends the process where something is not emulated; this says from where
    stdout = os.dup(1)
    os.dup2(2, 1)  # torch_npu prints at import; what the tests read is answers only
    import sim

    sim.install()
    os.dup2(stdout, 1)
    path = Path(__file__).resolve().parents[1] / "parallel" / "support" / "worker.py"
    spec = importlib.util.spec_from_file_location("parallel_worker", path)
    parallel_worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parallel_worker)
    parallel_worker.main("npu", ("cases", "npu_cases"))
