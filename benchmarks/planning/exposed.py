"""The table of docs/planning.md: what communication of four scripts nothing hides, without and with what hides it.

python benchmarks/planning/exposed.py [SCRIPT...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from qwen3_npu import cli  # noqa: E402
from qwen3_npu.args.foreign import FOREIGN_TRAINING  # noqa: E402
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs  # noqa: E402
from qwen3_npu.model.arch import to_hf_config  # noqa: E402
from qwen3_npu.model.sizes import SIZES  # noqa: E402
from qwen3_npu.plan.device import DEVICE_SPECS  # noqa: E402
from qwen3_npu.platform import select_platform  # noqa: E402
from scripts import SCRIPTS, ask, size_of  # noqa: E402

NAMES = ("pretrain_qwen3_14b_4K_ptd", "pretrain_qwen3_32b_4K_ptd", "pretrain_qwen3_30b_a3b_4K_ptd")
NAMES += ("pretrain_qwen3_235b_a22b_4k_A3_ptd",)


def main(names: list[str]) -> None:
    platform = select_platform("cpu")
    platform.activate()
    from qwen3_npu.trace.hidden import hidden_table, played_ways

    with tempfile.TemporaryDirectory() as folder:
        for name in names or NAMES:
            script = next(script for script in SCRIPTS if script.stem == name)
            model = Path(folder, name)
            model.mkdir()
            (model / "config.json").write_text(json.dumps(to_hf_config(SIZES[size_of(script)])))
            asked = ask(script, Path(folder), HF_DIR=str(model), CKPT_LOAD_DIR=str(model))
            args = PretrainArgs(*cli.parse("exposed", "", GROUPS, FOREIGN_TRAINING, argv=asked.flags).groups)
            device = DEVICE_SPECS["910C-64G" if "A3" in name else "910B-64G"]
            print(f"{name}, {asked.world} x {device.name}", flush=True)
            ways = list(played_ways(platform, args, device, devices=asked.world, rank=0))
            print("\n".join(hidden_table(ways)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
