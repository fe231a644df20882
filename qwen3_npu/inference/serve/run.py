"""`inference.py --serve`: the model, the engine and the HTTP server, from the check of the flags to Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from qwen3_npu import log
from qwen3_npu.args.inference import SERVE_CONTEXT, InferenceArgs
from qwen3_npu.distributed.launch import World
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.engine import Engine
from qwen3_npu.inference.generation_config import with_defaults
from qwen3_npu.inference.plan import InferencePlan
from qwen3_npu.inference.runner import loaded
from qwen3_npu.inference.sampling import sampling_of
from qwen3_npu.inference.serve.asked import Reader, ServerLimits
from qwen3_npu.inference.serve.desk import Desk
from qwen3_npu.inference.serve.loop import Loop
from qwen3_npu.inference.serve.metrics import Metrics
from qwen3_npu.inference.serve.offered import Connection
from qwen3_npu.inference.serve.web import WebServer
from qwen3_npu.inference.text import for_conversations, open_writer
from qwen3_npu.platform.base import Platform
from qwen3_npu.progress import human


def serve(platform: Platform, world: World, args: InferenceArgs, plan: InferencePlan) -> None:
    """Load the model and answer until Ctrl-C or SIGTERM.

    Raises:
        UsageError: something does not fit; nothing has been loaded then.
    """
    flags, lines = with_defaults(args.generate, plan.generation)
    for line in lines:
        log.info(line)
    if plan.data_parallel > 1 and plan.layout.expert == 1:
        raise UsageError(
            f"--serve: {world.size} processes make {plan.data_parallel} copies of the model ({plan.layout}), and one "
            "answers; start a server for each, or shard the model over all of them (--tensor-model-parallel-size)"
        )
    writer, plan = open_writer(for_conversations(plan))
    context = args.serve.serve_context or min(SERVE_CONTEXT, plan.positions)
    if context > plan.positions:
        raise UsageError(f"--serve-context {context}: the model has {plan.positions} positions")
    limits = ServerLimits(
        args.serve.serve_model_name or Path(args.weights.load).resolve().name,
        context,
        plan.arch.vocab_size,
        sampling=sampling_of(flags, 0, sample=flags.temperature != 0),
        chats=plan.prompts.template is not None,
    )
    if limits.chats:
        writer.template  # noqa: B018 - it is opened now: a tokenizer that lacks one is refused before the model is loaded
    desk = Desk() if world.rank == 0 else None
    metrics = Metrics(flags.predict_batch_size, context)
    server = None
    if desk is not None:
        where = args.serve
        server = WebServer(where.serve_host, where.serve_port, where.api_key, connection=Connection)
    rows = flags.predict_batch_size
    with loaded(platform, world, args.runtime, args.weights, plan=plan, rows=rows) as runner:
        engine = Engine(runner, slots=rows, kv_cache=args.weights.use_kv_cache, prefix_cache=args.weights.prefix_cache)
        engine.reserve(context)
        if engine.cache is not None:
            log.info(f"cache: {rows} slots of {context} tokens, {human(engine.cache.bytes, 'B')} on each process")
        loop = Loop(runner, writer, engine, desk, metrics=metrics)
        with _until_stopped(desk):
            if server is not None and desk is not None:
                server.ready(desk, Reader(writer, limits, desk.new_key), metrics)
                log.info(f"serving {limits.model} at {server.url}/v1 (Ctrl-C ends)")
            try:
                loop.run()
            finally:
                if server is not None:
                    server.close()
    log.info("the server has stopped")


@contextlib.contextmanager
def _until_stopped(desk: Desk | None) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop the desk; processes without a desk continue until rank 0 tells them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*signal_and_frame: object) -> None:
        if desk is not None:
            desk.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
