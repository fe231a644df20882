"""--swap-optimizer: float32 masters and moments are on the host; a step copies them to the device slice by slice.

While one slice is updated, the previous one is copied to the host and the next one to the device, on separate streams:
two slices are on the device at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from qwen3_npu.host_memory import host_tensor
from qwen3_npu.training.update.slices import MOMENTS, SlicedState, StatePiece


class SwappedState(SlicedState):
    """Masters and moments on the host, in pinned memory."""

    def prepare(self) -> None:
        """As `SlicedState.prepare`."""
        has_streams = self.device.type != "cpu"
        self.streams = [torch.cuda.Stream() for _ in range(2)] if has_streams else []
        for main in self.masters:
            main.data = self._on_host(main.data)
        for main, state in self.optimizer.state.items():
            for key in MOMENTS:
                state[key] = host_tensor(main.shape, torch.float32, pinned=has_streams).zero_()

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return host_tensor(tensor.shape, tensor.dtype, pinned=self.device.type != "cpu").copy_(tensor)

    def run(self, count: torch.Tensor) -> None:
        """As `SlicedState.run`."""
        arriving, leaving = self.streams or (None, None)
        there: list[list[list[torch.Tensor]]] = []
        done: list[torch.cuda.Event | None] = []
        for number in range(len(self.slices) + 1):
            if number < len(self.slices):  # the next slice arrives
                self._release(there, number - 1)
                there.append(self._fetch(self.slices[number], arriving))
                done.append(self._event(arriving))
            if number == 0:
                continue
            self._wait(done[number - 1])
            self.update(self.slices[number - 1], there[number - 1], count)
            self._return(self.slices[number - 1], there[number - 1], leaving)
        self._release(there, len(there))  # the next step reads what is still leaving

    def _release(self, there: list[list[list[torch.Tensor]]], end: int) -> None:
        """Give the memory of the slices before `end` back, to the stream that it is of. They leave after their
        update, so nothing uses them once they have left."""
        if self.streams:
            arriving, leaving = self.streams
            arriving.wait_stream(leaving)
        there[: max(end, 0)] = [[] for _ in there[: max(end, 0)]]

    def _fetch(self, pieces: Sequence[StatePiece], stream: torch.cuda.Stream | None) -> list[list[torch.Tensor]]:
        if stream is None:
            return [[tensor.clone() for tensor in piece.of(_tensors(piece))] for piece in pieces]
        with torch.cuda.stream(stream):
            return [[t.to(self.device, non_blocking=True) for t in piece.of(_tensors(piece))] for piece in pieces]

    def _return(
        self, pieces: Sequence[StatePiece], tensors: list[list[torch.Tensor]], stream: torch.cuda.Stream | None
    ) -> None:
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            for piece, on_device in zip(pieces, tensors, strict=True):
                for host, changed in zip(piece.of(_tensors(piece)), on_device, strict=True):
                    host.copy_(changed, non_blocking=True)

    def _event(self, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        return None if stream is None else stream.record_event()

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def wait(self) -> None:
        """Wait until the state on the host is that of the last step."""
        for stream in self.streams:
            stream.synchronize()


def _tensors(piece: StatePiece) -> list[torch.Tensor]:
    """The tensors that are copied."""
    return [*([piece.main] if piece.is_split else []), *(piece.state[key] for key in MOMENTS)]
