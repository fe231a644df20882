"""The table of docs/planning.md: what `plan` says of the layout of every training script of examples/.

python benchmarks/plan_scripts.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from qwen3_npu import cli  # noqa: E402
from qwen3_npu.args.foreign import FOREIGN_TRAINING  # noqa: E402
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs  # noqa: E402
from qwen3_npu.model.arch import to_hf_config  # noqa: E402
from qwen3_npu.model.sizes import SIZES  # noqa: E402
from qwen3_npu.plan.device import GIB  # noqa: E402
from qwen3_npu.plan.show.report import layout_words  # noqa: E402
from qwen3_npu.plan.verdict import PlanVerdict, remedies  # noqa: E402
from qwen3_npu.training.prepare.plan import plan_training  # noqa: E402
from scripts import SCRIPTS, ask, size_of  # noqa: E402


def main() -> None:
    print("| script | devices | layout | GiB | of the usable | step | tokens/s/device | MFU |\n" + "|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, arch in SIZES.items():
            (folder / size).mkdir()
            (folder / size / "config.json").write_text(json.dumps(to_hf_config(arch)))
        for script in SCRIPTS:
            if script.stem.startswith(("pretrain", "tune", "dpo")):
                print(_row(script, folder))


def _row(script: Path, folder: Path) -> str:
    model = str(folder / size_of(script))
    asked = ask(script, folder, HF_DIR=model, CKPT_LOAD_DIR=model, TOKENIZER_PATH=model)
    device = "910C-64G" if "A3" in script.stem else "910B-64G"
    words = [*asked.flags, "--plan-device", device]
    verdict = plan_training(
        PretrainArgs(*cli.parse("plan", "", GROUPS, FOREIGN_TRAINING, argv=words).groups), asked.world
    ).verdict
    assert verdict is not None
    columns = [
        script.stem,
        f"{asked.world} x {device}",
        layout_words(verdict),
        f"{verdict.peak / GIB:.1f}",
        _judgement(verdict),
        f"{verdict.time.total:.1f} s",
        f"{verdict.tokens_per_second:,.0f}",
        f"{100 * verdict.mfu:.0f} %",
    ]
    return "| " + " | ".join(columns) + " |"


def _judgement(verdict: PlanVerdict) -> str:
    if verdict.fits:
        return f"{(verdict.limit - verdict.peak) / GIB:.1f} GiB left"
    best = remedies(verdict, most=1)
    return f"does not fit; {best[0]}" if best else "does not fit"


if __name__ == "__main__":
    main()
