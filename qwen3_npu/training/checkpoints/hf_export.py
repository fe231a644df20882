"""Hugging Face directories of a training's checkpoints, written by a background process.

The checkpoint on disk is converted as by convert_ckpt.py, so all nodes must share the folder. LoRA adapters are merged
into their model.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from qwen3_npu import log
from qwen3_npu.args.convert import HF, MEGATRON, ConvertArgs, LegacyConvertArgs, LoraConvertArgs, TargetArgs
from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint.folders import iteration_name
from qwen3_npu.checkpoint.formats.open import find
from qwen3_npu.errors import UsageError


def _convert(args: ConvertArgs, lora: LoraConvertArgs, reason: Connection) -> None:
    """Main function of the process; it sends the reason of a failure to the training, which logs it."""
    log.setup(rank=1)  # this rank prints only warnings; the training logs the rest
    os.nice(10)
    from qwen3_npu.checkpoint.convert.run import convert

    try:
        convert(args, TargetArgs(), lora, LegacyConvertArgs())
    except (UsageError, OSError) as error:
        reason.send(str(error))
        raise SystemExit(1) from None


class HfExport:
    """Writes one directory at a time. Only rank 0 does anything."""

    def __init__(self, args: CheckpointArgs, lora: LoraArgs, rank: int) -> None:
        self.args, self.lora, self.works = args, lora, rank == 0
        self.process: BaseProcess | None = None
        self.reason: Connection | None = None  # the exporting process sends its reason for a failure here
        self.folder = Path()
        self.failures = 0  # directories that could not be written

    def due(self, iteration: int, is_last: bool) -> bool:
        """Whether a directory of this step is due."""
        interval = self.args.save_hf_interval
        return bool(interval and iteration % interval == 0) or (self.args.enable_mg2hf_convert and is_last)

    def start(self, iteration: int) -> None:
        """Start to convert the (complete) checkpoint of this step. The previous directory must be finished."""
        if not self.works:
            return
        self.folder = Path(self.args.hf_save_dir or str(self.args.save)) / f"mg2hf_iteration{iteration}"
        saved = Path(str(self.args.save)) / iteration_name(iteration)
        base, kind, lora = saved, MEGATRON, LoraConvertArgs(lora_check=False)
        if self.lora.lora_ckpt_filter:
            base = Path(str(self.args.load))
            found = find(base, self.args.ckpt_step)
            assert found is not None, "it was loaded"
            base, kind = found.folder, found.kind
            lora = LoraConvertArgs(lora_check=False, lora_load=str(saved))
        elif self.lora.on:
            lora = LoraConvertArgs(lora_check=False, lora_r=self.lora.lora_r)
        args = ConvertArgs(
            load_model_type=kind,
            save_model_type=HF,
            load_dir=str(base),
            save_dir=str(self.folder),
            hf_cfg_dir=str(self.args.save),
            jobs=1,
            overwrite=True,
        )
        try:
            self.reason, said = multiprocessing.Pipe(duplex=False)
            self.process = multiprocessing.get_context("spawn").Process(target=_convert, args=(args, lora, said))
            self.process.start()
            said.close()
        except OSError as error:
            self.process = None
            self._failed(f"no process for it could be started: {error.strerror}")
            return
        log.info(f"writing: {self.folder} (Hugging Face) in the background")

    def finish(self) -> None:
        """Wait for the directory that is being written. A failure is a warning, and the training continues."""
        if self.process is None or self.reason is None:
            return
        self.process.join()
        code, self.process = self.process.exitcode, None
        if code:
            try:
                self._failed(self.reason.recv())
            except EOFError:
                self._failed(f"its process ended with {code}")
        else:
            log.info(f"saved: {self.folder} (Hugging Face)")

    def _failed(self, reason: str) -> None:
        self.failures += 1
        log.warning(
            f"{self.folder} could not be written ({reason}); the checkpoints are complete, the training continues, and "
            f"convert_ckpt.py can write it later ({self.failures} such directories so far)"
        )
