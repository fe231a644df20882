"""The endpoints of the server: models, health, metrics, and answers, complete or as a stream."""

from __future__ import annotations

import contextlib
import json
import queue
import select
import socket
import time
from collections.abc import Iterator

from qwen3_npu.inference.serve.answers import Answers, error_body
from qwen3_npu.inference.serve.desk import CUT, MOST, Inbox, Piece
from qwen3_npu.inference.serve.fields import CHAT, COMPLETION, Refused
from qwen3_npu.inference.serve.web import JsonConnection

_LOOK = 0.25  # seconds between two looks whether a client is still there
_POSTS = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}


class Connection(JsonConnection):
    """A connection of a client."""

    def do_GET(self) -> None:
        known = {"/health": self._health, "/v1/models": self._models, "/metrics": self._metrics}
        self.answer({**known, f"/v1/models/{self.server.reader.limits.model}": self._one_model})

    def do_POST(self) -> None:
        self.answer({path: self._generate for path in _POSTS})

    def _health(self) -> None:
        closed = self.server.desk.closed
        self.send(503 if closed else 200, {"status": "stopping" if closed else "ok"})

    def _metrics(self) -> None:
        self.send(200, self.server.metrics.text())

    def _models(self) -> None:
        self.send(200, {"object": "list", "data": [self._model()]})

    def _one_model(self) -> None:
        self.send(200, self._model())

    def _model(self) -> dict[str, object]:
        limits = self.server.reader.limits
        return {
            "id": limits.model,
            "object": "model",
            "created": 0,
            "owned_by": "qwen3_npu",
            "max_model_len": limits.context,
        }

    def _generate(self) -> None:
        server, start = self.server, time.monotonic()
        body = self.body()
        if server.desk.closed:
            raise Refused("the server is stopping", status=503)
        asked = server.reader.read(body, _POSTS[self.path.partition("?")[0].rstrip("/")])
        if len(server.desk.inboxes) + len(asked.orders) > MOST:
            raise Refused(f"{MOST} answers wait already; try again later", status=503)
        server.metrics.add("prompt_tokens", asked.prompt_tokens)
        answers = Answers(asked, server.reader.limits.model, server.reader.writer.encoder)
        inbox = Inbox()
        try:
            for order in asked.orders:
                server.desk.hand_in(order, inbox)
            (self._stream if asked.stream else self._whole)(answers, inbox, start)
        finally:
            for order in asked.orders:
                server.desk.leave(order.key)
            server.metrics.add("generated_tokens", sum(answers.tokens))
        server.metrics.took("request_seconds", time.monotonic() - start)

    def _pieces(self, answers: Answers, inbox: Inbox, start: float) -> Iterator[tuple[int, Piece]]:
        """The pieces of the answers until all have ended.

        Raises:
            Refused: the server stopped before.
            ConnectionError: the client has left.
        """
        stopped = Refused("the server stopped before the answer was complete", status=503)
        numbers = {order.key: number for number, order in enumerate(answers.asked.orders)}
        first, seen = True, start
        while not answers.done:
            with contextlib.suppress(queue.Empty):
                key, piece = inbox.get(timeout=_LOOK)
                if piece.finish == CUT:
                    raise stopped
                if first:
                    self.server.metrics.took("first_token_seconds", time.monotonic() - start)
                    first = False
                answers.add(numbers[key], piece)
                yield numbers[key], piece
            if self.server.desk.ended and inbox.empty() and not answers.done:
                raise stopped
            if time.monotonic() - seen > _LOOK:
                self._look()
                seen = time.monotonic()

    def _look(self) -> None:
        """Raises: ConnectionError: the client has left."""
        ready = select.poll()
        ready.register(self.connection, select.POLLIN)
        if ready.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError("the client is gone")

    def _whole(self, answers: Answers, inbox: Inbox, start: float) -> None:
        for _ in self._pieces(answers, inbox, start):
            pass
        self.send(200, answers.body())

    def _stream(self, answers: Answers, inbox: Inbox, start: float) -> None:
        """Server-sent events in chunks (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
        self.server.metrics.answered(self.endpoint, 200)
        self.streams = True
        self.send_response(200)
        for name, value in (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache")):
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number, piece in self._pieces(answers, inbox, start):
                for chunk in answers.chunks(number, piece):
                    self._event(json.dumps(chunk, ensure_ascii=False))
            if answers.asked.usage:
                self._event(json.dumps(answers.last_chunk()))
        except Refused as refused:  # the status is already sent
            self._event(json.dumps(error_body(refused)))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
