"""The same calls in the form that msProbe compares (`msprobe compare`, package mindstudio-probe).

    FOLDER/step1/rank0/dump.json         call -> its inputs and outputs: dtype, shape, largest, least, mean, norm
                      /construct.json    call -> the layer that it belongs to
                      /stack.json        calls -> the lines of code that made them

This is the form of its task "statistics", as mindstudio-probe 26.2 writes and reads it. A call is named
`Module.<module>.<operation>.forward.<number>`, its gradients the same with `backward`, the sums of weights' gradients
`Module.<module>.parameters_grad`.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qwen3_npu import log
from qwen3_npu.distributed import environment
from qwen3_npu.files import write_text
from qwen3_npu.training.fingerprints.exact import floats
from qwen3_npu.training.fingerprints.recorder import LAYER, NotedCall, StepRecorder

_FRAMES = 12  # innermost lines of a call
_PLACES = {"in": "input_args", "out": "output", "gradient of out": "input", "gradient of input": "output"}
_PLACES |= {"d_out": "input"}


def statistics(x: torch.Tensor) -> torch.Tensor:
    """Largest, least, mean and norm, float32 on x's device: nothing waits."""
    x = x.detach().float()
    if not x.numel():
        return torch.zeros(4, device=x.device)
    return torch.stack((x.amax(), x.amin(), x.mean(), x.norm()))


class MsprobeRecorder(StepRecorder):
    """Writes what this rank computed in a step; nothing is gathered.

    Args:
        folder: of the steps.
    """

    def __init__(self, due: Callable[[int], bool], folder: Path) -> None:
        self.folder = folder
        self._kinds: list[dict[str, object]] = []
        self._stacks: dict[str, list[str]] = {}
        super().__init__(due, lambda step, noted: None)

    def end(self) -> None:
        """As `StepRecorder.end`."""
        if self.is_open:
            self.is_open = self.is_live = False
            try:
                self._write(self.folder / f"step{self.step}" / f"rank{environment.ranks()[0]}")
            except OSError as error:
                log.warning(f"{self.folder} takes no dump: {error}")
            self._reset()

    def _reset(self) -> None:
        super()._reset()
        self._kinds, self._stacks = [], {}

    def _note(self, name: str, tensor: torch.Tensor, check: tuple[float, float] | None = None, **kind: bool) -> None:
        self._names.append(name)
        self._numbers.append(statistics(tensor))
        self._kinds.append(
            {
                "type": "torch.Tensor",
                "dtype": str(tensor.dtype),
                "shape": list(tensor.shape),
                "requires_grad": tensor.requires_grad,
            }
        )

    def _called(self, call: NotedCall, inputs: Sequence[object]) -> None:
        self._stacks[call.name] = [
            f"File {frame.filename}, line {frame.lineno}, in {frame.name}, \n {frame.line}"
            for frame in reversed(traceback.extract_stack(limit=_FRAMES + 2)[:-2])
        ]
        for number, tensor in enumerate(floats(inputs)):
            self._note(f"{call.name}|forward|in {number}", tensor)

    def _write(self, folder: Path) -> None:
        rows = torch.stack(self._numbers).cpu().tolist() if self._numbers else []
        data: dict[str, dict[str, object]] = {}
        for name, kind, row in zip(self._names, self._kinds, rows, strict=True):
            numbers = dict(zip(("Max", "Min", "Mean", "Norm"), row, strict=True))
            _place(data, name, {**kind, **numbers, "requires_grad": kind["requires_grad"]})
        construct = {call: _layer(call, data) for call in data}
        stacks: dict[str, list[str]] = {_call(name, "forward"): lines for name, lines in self._stacks.items()}
        dump = {"task": "statistics", "level": "mix", "framework": "pytorch", "dump_data_dir": None, "data": data}
        by_lines: dict[tuple[str, ...], list[str]] = {}
        for call, lines in stacks.items():
            by_lines.setdefault(tuple(lines), []).append(call)
        stack = {str(i): [calls, list(lines)] for i, (lines, calls) in enumerate(by_lines.items())}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("construct", construct), ("stack", stack), ("dump", dump)):
            write_text(folder / f"{name}.json", json.dumps(content, indent=1))


def _call(label: str, way: str) -> str:
    """A call's name. Args: label: `step|micro-batch|module|operation#call`."""
    _, _, module, operation = label.split("|")
    name, _, number = operation.partition("#")
    return f"Module.{module or 'model'}.{name}.{way}.{int(number) - 1}"


def _place(data: dict[str, dict[str, Any]], name: str, tensor: dict[str, object]) -> None:
    label, way, what = name.rsplit("|", 2)
    if "|sum#" in label:  # the gradient of a weight, summed up
        module, _, leaf = label.split("|")[2].rpartition(".")
        data.setdefault(f"Module.{module}.parameters_grad", {})[leaf] = [tensor]
        return
    empty: dict[str, object] = {"input_args": [], "input_kwargs": {}, "output": []}
    if way == "backward":
        empty = {"input": [], "output": []}
    found = data.setdefault(_call(label, way), empty)
    found[_PLACES[what.rstrip("0123456789 ")]].append(tensor)


def _layer(call: str, data: dict[str, Any]) -> str | None:
    """The layer that a call belongs to."""
    words = call.split(".")
    if len(words) < 4 or words[1] != "layers" or words[3] == LAYER:
        return None
    way = "backward" if words[-2] == "backward" else "forward"
    layer = f"Module.layers.{words[2]}.{LAYER}.{way}.0"
    return layer if layer in data else None
