"""A web server on this machine, whose paths answer as a test says: with bytes, or with anything."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Request(BaseHTTPRequestHandler):
    """One request; a route may write to `wfile` what no honest server would."""

    protocol_version = "HTTP/1.1"
    server: "Web"

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.seen.append((self.path, dict(self.headers)))
        route = self.server.routes.get(self.path.partition("?")[0])
        try:
            if route is None:
                self.answer(b"", status=404)
            elif callable(route):
                route(self)
            else:
                self.give(route)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has seen enough

    def do_HEAD(self) -> None:
        self.do_GET()

    def give(self, data: bytes) -> None:
        """The whole, or the range that was asked for."""
        asked = self.headers.get("Range")
        if asked is None:
            return self.answer(data)
        first, last = asked.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1]
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return self.answer(part, status=206, headers=headers)

    def answer(
        self, data: bytes, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""


class Web(ThreadingHTTPServer):
    """`routes` maps paths to bytes or to functions of a Request; `seen` lists what was asked."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.routes: dict[str, bytes | Callable[[Any], None]] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.stopped = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def url(self, path: str) -> str:
        return f"http://{self.address}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error."""


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()
