"""Servers on this machine for proofs and tests: a web server that may answer as no honest one
would, and moto's S3, which keeps buckets in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Request(BaseHTTPRequestHandler):
    """One request; a route may write to `wfile` what it likes."""

    protocol_version = "HTTP/1.1"
    server: Web

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


Route = bytes | Callable[[Request], None]


class Web(ThreadingHTTPServer):
    """`routes` maps paths to bytes or to functions of a Request; `seen` lists what was asked."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Request)
        self.routes: dict[str, Route] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.stopped = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def url(self, path: str) -> str:
        return f"http://{self.address}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error."""


@contextmanager
def web_server(port: int = 0) -> Iterator[Web]:
    """A web server of 127.0.0.1 that answers in threads of its own; port 0: any free one."""
    server = Web(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of an S3 without buckets."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def s3_environment(address: str) -> dict[str, str]:
    """The variables by which s3:// leads there."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


# Routes


def slowly(data: bytes, *, part_bytes: int = 200, pause_s: float = 0.02) -> Route:
    """All of it, in drops."""

    def route(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        for at in range(0, len(data), part_bytes):
            request.wfile.write(data[at : at + part_bytes])
            request.server.stopped.wait(pause_s)

    return route


def endless(request: Request) -> None:
    """Zeros for as long as the client reads."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not request.server.stopped.is_set():
        request.wfile.write(bytes(4096))


def silent(request: Request) -> None:
    """A promise, and then nothing for a minute."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    request.server.stopped.wait(60)


def short(data: bytes) -> Route:
    """Ends before the length that was promised."""

    def route(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data) + 1000))
        request.end_headers()
        request.wfile.write(data)

    return route


def status(code: int) -> Route:
    """An error's page."""
    return lambda request: request.answer(b"no", status=code)


def redirect(location: str) -> Route:
    """To somewhere else."""
    return lambda request: request.answer(b"", status=302, headers={"Location": location})


def wished(data: bytes) -> Route:
    """The bytes, with the wish that they are not used."""
    return lambda request: request.answer(data, headers={"X-Robots-Tag": "noai, nofollow"})
