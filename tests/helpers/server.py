"""A server on the loopback address that can go wrong in the ways real ones do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves `files` (content by path); the words of `script` say how each GET goes, the last one for ever.

    Words: `good` (with byte ranges), `whole` (ignores byte ranges), `cut` (a third of the content,
    then the connection closes), `stall`, `redirect`, or a status number such as `503`.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.script = ["good"]
        self.ranges: list[str | None] = []  # the Range header of each request
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        script = self.server.script
        how = script.pop(0) if len(script) > 1 else script[0]
        wanted = self.headers["Range"]
        self.server.ranges.append(wanted)
        body = self.server.files.get(self.path.removeprefix("/moved").strip("/"))
        if how == "redirect" and not self.path.startswith("/moved"):
            self.answer(b"", 302, Location=f"/moved{self.path}")
        elif how == "stall":
            time.sleep(0.5)
        elif how.isdigit():
            self.answer(b"", int(how))
        elif body is None:
            self.answer(b"", 404)
        elif how == "cut":
            self.answer(body, 200, sent=len(body) // 3)
        elif wanted is None or how == "whole":
            self.answer(body, 200)
        else:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            span = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            self.answer(body[start:], 206, **span)

    def answer(self, body: bytes, status: int, sent: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])


@contextmanager
def running() -> Iterator[Server]:
    """A server that answers until the end of the block."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
