"""The engine's loop of a server: every process makes the same passes, and rank 0 has the desk."""

from __future__ import annotations

import torch

from qwen3_npu.inference.engine import Engine, Request
from qwen3_npu.inference.runner import Runner
from qwen3_npu.inference.serve.desk import CUT, DROPPED, Desk, News, Order, Piece
from qwen3_npu.inference.serve.metrics import Metrics
from qwen3_npu.inference.text import TextStream, Writer


class Loop:
    """Takes orders between two passes, so that a new prompt enters as soon as a slot is free (continuous batching).

    Rank 0 tells the other processes about orders, clients that have left, and the end. Everything else follows from the
    tokens, which all processes have. Further copies of the model exist only with expert parallelism; they compute their
    experts.
    """

    def __init__(self, runner: Runner, writer: Writer, engine: Engine, desk: Desk | None, *, metrics: Metrics) -> None:
        """Args: desk: of rank 0; None on the others."""
        self.runner, self.writer, self.engine, self.desk, self.metrics = runner, writer, engine, desk, metrics
        self.live: dict[int, Request] = {}
        self.keys: dict[Request, int] = {}
        self.streams: dict[Request, TextStream] = {}
        self.ends = False

    @torch.inference_mode()
    def run(self) -> None:
        """Serve until the desk says that it ends."""
        engine = self.engine
        try:
            while True:
                if (news := self._news()) is not None:
                    self._apply(news)
                if self.runner.anyone(engine.busy):
                    if not engine.busy:
                        self.runner.idle()
                        continue
                    for request in engine.step(self._on_token):
                        self._ended(request)
                elif self.ends:
                    return
                metrics = self.metrics
                metrics.running, metrics.waiting, metrics.cached = (
                    *map(len, (engine.running, engine.waiting)),
                    engine.reused,
                )
        finally:
            if self.desk is not None:
                self.desk.end()

    def _news(self) -> News | None:
        runner = self.runner
        mine = self.desk.take(wait=not self.engine.busy) if self.desk is not None else None
        if runner.world.size == 1:
            return mine
        # Each pass broadcasts one number; objects are sent only when there is news.
        return runner.agreed(mine) if runner.told(mine is not None, everyone=True) else None

    def _apply(self, news: News) -> None:
        if self.runner.data_rank == 0:
            for order in news.orders:
                self._enter(order)
            for key in list(self.live) if news.cuts else news.dropped:
                if (request := self.live.get(key)) is not None:
                    self.engine.drop(request, CUT if news.cuts else DROPPED)
                    self.metrics.add("dropped_answers", 1)
                    self._ended(request)
        self.ends = news.ends

    def _enter(self, order: Order) -> None:
        request = Request(order.number, list(order.tokens), order.limit, sampling=order.sampling, top=order.top)
        self.live[order.key], self.keys[request] = request, order.key
        self.streams[request] = TextStream(self.writer.encoder, self.runner.plan.eos, order.stops)
        self.engine.add(request)

    def _on_token(self, request: Request) -> bool:
        stream = self.streams[request]
        text = stream.add(request.tokens[-1])
        self._tell(request, Piece(text, request.tokens[-1:], request.logprobs[-1:], request.likeliest[-1:]))
        return stream.stopped

    def _ended(self, request: Request) -> None:
        key, stream = self.keys[request], self.streams.pop(request)
        last = request.finish == "eos"  # `_on_token` is not called with the token that ends an answer
        place = slice(-1, None) if last else slice(0, 0)
        said = request.generated[place], request.logprobs[place], request.likeliest[place]
        self._tell(request, Piece(stream.rest(), *said, finish=request.finish))
        del self.live[key], self.keys[request]

    def _tell(self, request: Request, piece: Piece) -> None:
        if self.desk is not None:
            self.desk.put(self.keys[request], piece)
