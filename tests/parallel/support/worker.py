"""One process of a test world: runs the cases that the tests send, one after the other.

Started once per world and kept: joining processes and importing megatron costs ten seconds, a case less than two.
Reads a JSON line {"case": name, "arguments": {...}, "result": path} from stdin; answers "ok" or "error" on stdout.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))


def main(device: str = "cpu", modules: tuple[str, ...] = ("cases",)) -> None:
    """Serve the functions of these modules as cases."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the code prints goes to the log with stderr
    faulthandler.enable()
    import torch

    torch.set_num_threads(1)
    from qwen3_npu.args.parallel import RuntimeArgs
    from qwen3_npu.platform import select_platform

    platform = select_platform(device)
    platform.activate()
    from qwen3_npu.distributed.launch import process_group

    with process_group(platform, RuntimeArgs(distributed_timeout_minutes=2)) as world:
        answers.write("ready\n")
        for line in sys.stdin:
            request = json.loads(line)
            try:
                # "train", or of another file "generation_cases.greedy".
                module, _, name = request["case"].rpartition(".")
                places = [importlib.import_module(file) for file in ([module] if module else modules)]
                case = next(getattr(place, name) for place in places if hasattr(place, name))
                result = case(platform, world, **request["arguments"])
            except BaseException:
                answers.write(json.dumps({"error": traceback.format_exc()}) + "\n")
                raise
            gc.collect()  # models and process groups live in cycles, and each group has threads
            if not gc.get_freeze_count():
                gc.freeze()  # the libraries are there now; looking through them takes 0.3 s each time
            if world.rank == 0:
                Path(request["result"]).write_text(json.dumps(result))
            answers.write(json.dumps({"ok": True}) + "\n")


if __name__ == "__main__":
    main()
