"""HTTP: addresses, keys, bodies and errors. One thread for each connection.

Errors have OpenAI's form. A web page in a browser on this machine cannot use the server: bodies must be declared as
JSON, and without a key the Host header must name this machine.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import socketserver
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qwen3_npu import log, schema
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.serve.answers import error_body
from qwen3_npu.inference.serve.asked import Reader
from qwen3_npu.inference.serve.desk import Desk
from qwen3_npu.inference.serve.fields import Refused
from qwen3_npu.inference.serve.metrics import Metrics

MOST_BYTES = 8 << 20  # of a body
_MOST_DISCARDED = 64 << 20  # bytes of a refused body that are still read, so that its sender receives the reason
_UNKNOWN = 1 << 62  # bytes of a body that does not say how many it has
_MOST_CONNECTIONS = 2048
_SILENCE = 60.0  # seconds in which a client neither sends nor reads
Accepted = socket.socket | tuple[bytes, socket.socket]  # what socketserver passes to a handler
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


class WebServer(ThreadingHTTPServer):
    """Listens once `server_activate` is called.

    Attributes:
        key: the token that requests must carry; None: none.
        answering: connections whose request is being answered.
    """

    daemon_threads, block_on_close, allow_reuse_address = True, False, True
    request_queue_size = 1024  # connections that may come at once

    def __init__(self, host: str, port: int, key: str | None, *, connection: type[JsonConnection]) -> None:
        """Raises: UsageError: the address is not available."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.key = key
        self.answering: set[int] = set()
        self.connections = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self.desk: Desk
        self.reader: Reader
        self.metrics: Metrics
        try:
            super().__init__((host, port), connection, bind_and_activate=False)
            self.server_bind()
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"--serve-host {host} --serve-port {port}: {getattr(error, 'strerror', None) or error}; give another"
            ) from None

    def server_bind(self) -> None:
        """TCPServer's method, since HTTPServer's looks this machine's name up in the network."""
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def process_request(self, request: Accepted, client_address: object) -> None:
        """Start a thread for a connection, unless there are too many."""
        if self.connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Accepted, client_address: object) -> None:
        """The work of this thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Accepted, client_address: object) -> None:
        """Ignore clients that have left."""

    @property
    def url(self) -> str:
        """The address of the server."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if self.address_family == socket.AF_INET6 else host}:{self.server_port}"

    def ready(self, desk: Desk, reader: Reader, metrics: Metrics) -> None:
        """Answer requests from now on: the model is loaded."""
        self.desk, self.reader, self.metrics = desk, reader, metrics
        self.server_activate()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def close(self) -> None:
        """Send complete answers, then close."""
        self.shutdown()
        self.server_close()
        until = time.monotonic() + 2
        while self.answering and time.monotonic() < until:
            time.sleep(0.02)


class JsonConnection(BaseHTTPRequestHandler):
    """A client's connection with one request after the other. Subclasses define the endpoints."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "qwen3_npu", ""
    timeout = _SILENCE
    disable_nagle_algorithm = True
    server: WebServer
    endpoint, unread, streams = "other", 0, False

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, since /metrics counts requests."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer invalid HTTP and methods that are not offered."""
        self.close_connection = True
        self.send(code, error_body(Refused(message or "not understood", status=code)))

    # From a request to its answer

    def answer(self, known: Mapping[str, Callable[[], None]]) -> None:
        path = self.path.partition("?")[0].rstrip("/")
        self.endpoint = path if path in known else "other"
        self.streams = False
        self.server.answering.add(id(self))
        try:
            self._check(path)
            if path not in known:
                raise Refused(f"{self.command} {schema.shown(path)} is not offered", status=404)
            known[path]()
        except Refused as refused:
            self._discard()
            self.send(refused.status, error_body(refused))
        except OSError:  # the client is gone
            self.close_connection = True
        except Exception:
            log.warning(f"{path}: {traceback.format_exc()}")
            self.close_connection = True
            if not self.streams:
                self.send(500, error_body(Refused("an error of the server; its log says more", status=500)))
        finally:
            self.server.answering.discard(id(self))

    def _check(self, path: str) -> None:
        """Raises: Refused: the client has no permission."""
        key = self.server.key
        if path == "/health":
            return
        if key is not None:
            scheme, _, given = self.headers.get("Authorization", "").partition(" ")
            given_bytes = given.strip().encode("latin-1", "replace")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given_bytes, key.encode()):
                raise Refused("a valid token is missing (Authorization: Bearer ..)", status=401, code="invalid_api_key")
        else:
            host = self.headers.get("Host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in _LOCAL:
                raise Refused(f"the Host {schema.shown(host)} is not this machine; use localhost", status=403)

    def body(self) -> object:
        """The JSON of the request. Raises: Refused."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused("Content-Type must be application/json", status=415)
        if self.unread == _UNKNOWN:
            raise Refused("Content-Length must say how long the body is", status=411)
        if self.unread > MOST_BYTES:
            raise Refused(f"the body has {self.unread} bytes; at most {MOST_BYTES} are read", status=413)
        data = self.rfile.read(self.unread)
        if len(data) < self.unread:
            raise ConnectionError("the body was cut off")
        self.unread = 0
        try:
            return schema.parse_json(data, "the body", strict=True)
        except UsageError as error:
            raise Refused(str(error)) from None

    def parse_request(self) -> bool:
        """Parse the request line and headers; the body is not read yet."""
        found = super().parse_request()
        if found:
            default = "0" if self.command == "GET" else ""
            length = self.headers.get("Content-Length", default)
            known = length.isdecimal() and len(length) < 16 and "Transfer-Encoding" not in self.headers
            self.unread = int(length) if known else _UNKNOWN
        return found

    def _discard(self) -> None:
        """Read and drop a body: if the connection closed at once, the sender would not see the answer."""
        if not self.unread:
            return
        left = min(self.unread, _MOST_DISCARDED)
        with contextlib.suppress(OSError):
            self.connection.settimeout(1)
            while left and (data := self.rfile.read(min(left, 1 << 16))):
                left -= len(data)

    def send(self, status: int, content: dict[str, object] | str) -> None:
        """Send one answer: JSON or text."""
        self.server.metrics.answered(self.endpoint, status)
        self.close_connection |= self.unread > 0  # the rest of the body would be taken for a request
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        kind = "text/plain; version=0.0.4; charset=utf-8" if isinstance(content, str) else "application/json"
        data = text.encode("utf-8")
        with contextlib.suppress(OSError):  # the client is gone
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
