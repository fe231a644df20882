"""What the tests of `inference.py --serve` share: a server beside its client."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from qwen3_npu import cli
from qwen3_npu.args.inference import FOREIGN, GROUPS, InferenceArgs
from qwen3_npu.inference.plan import plan_inference


def start(platform: Any, world: Any, folder: object, flags: list[str]) -> tuple[Callable[[], None], queue.SimpleQueue]:
    """What serves until it is stopped, and where its WebServer comes from once it listens."""
    from qwen3_npu.inference.serve import run, web

    listening: queue.SimpleQueue = queue.SimpleQueue()

    class Noted(web.WebServer):
        def ready(self, *parts: Any) -> None:
            super().ready(*parts)
            listening.put(self)

    words = ["--load", str(folder), "--device", "cpu", "--serve", "--serve-port", "0", *flags]
    args = InferenceArgs(*cli.parse("test", "", GROUPS, FOREIGN, argv=words).groups)
    args.check()
    plan = plan_inference(
        args.model, args.shape, args.parallel, args.weights, prompts=args.prompts, world_size=world.size
    )

    def serve() -> None:
        with mock.patch.object(run, "WebServer", Noted):
            run.serve(platform, world, args, plan)

    return serve, listening


@contextlib.contextmanager
def serving(platform: Any, world: Any, folder: object, *flags: str) -> Iterator[Any]:
    """A WebServer that answers, in a thread."""
    serve, listening = start(platform, world, folder, list(flags))
    thread = threading.Thread(target=serve)
    thread.start()
    server = listening.get(timeout=60)
    try:
        yield server
    finally:
        server.desk.stop()
        thread.join(30)
    assert not thread.is_alive()


def post(url: str, body: Any, **headers: str) -> dict[str, Any]:
    """The JSON that a request is answered with."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())
