"""pretrain_gpt.py with a rank that fails in its second step."""

import os

import pretrain_gpt
from qwen3_npu import cli


def main() -> None:
    from qwen3_npu.platform import select_platform

    select_platform("cpu").activate()
    from qwen3_npu.training.loop import Trainer

    plain = Trainer.step

    def step(self: Trainer) -> object:
        if os.environ["RANK"] == "1" and self.position.iteration == 1:
            raise RuntimeError("memory of this device is broken")
        return plain(self)

    Trainer.step = step
    pretrain_gpt.main()


if __name__ == "__main__":
    cli.run("pretrain_gpt.py", main)
