"""Show the samples that a training has left out after spikes. Learned tokens are green, or between brackets."""

from pathlib import Path

from qwen3_npu import cli, log
from qwen3_npu.args.tools.quarantine import QuarantineArgs
from qwen3_npu.errors import UsageError


def _numbers(ids: list[int]) -> str:
    return " ".join(map(str, ids)) + " "


def main() -> None:
    log.setup()
    (args,) = cli.parse("qwen3_npu.data", __doc__, [QuarantineArgs]).groups
    import numpy as np

    from qwen3_npu.data.preprocess.check import show_sample
    from qwen3_npu.data.text.encoder import open_encoder
    from qwen3_npu.data.text.tokenizer import start_loading
    from qwen3_npu.data.train import quarantine
    from qwen3_npu.data.train.token_record import IGNORED

    folder = Path(args.show_quarantine)
    if not folder.exists():
        raise UsageError(f"--show-quarantine {folder} does not exist; give the --save of a training")
    entries = quarantine.read(folder)
    decode = (
        open_encoder(start_loading(args.tokenizer_name_or_path)).decode if args.tokenizer_name_or_path else _numbers
    )
    for one in entries:
        title = f"step {one.step}, {one.action}: {one.file}, sample {one.sample}, token {one.offset}; {one.reason}"
        ids = np.array(one.ids)
        show_sample(title, ids, np.where(np.array(one.learned) > 0, ids, IGNORED), decode)
    log.info(f"{folder}: {len(entries)} samples in quarantine")


if __name__ == "__main__":
    cli.run("qwen3_npu.data", main)
