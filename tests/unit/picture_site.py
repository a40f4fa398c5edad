"""A site of pictures for tests: names resolve through a table, every connection to it is recorded and led to a server
on the loopback interface, whatever address it was meant for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image
from waiting import PATIENCE

PUBLIC = "93.184.216.34"
DRIBBLED = 5.0  # seconds that a slow site goes on, if nobody hangs up


def picture(colour: str = "red") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Lab:
    port: int
    names: dict[str, list[list[str]]] = field(default_factory=dict)
    lookups: list[str] = field(default_factory=list)
    connections: list[str] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)  # until it is set, "wait" is not answered

    def name(self, host: str, *answers: list[str]) -> None:
        """`host` resolves to each answer in turn, then to the last one for ever."""
        self.names[host] = list(answers)

    def url(self, path: str, host: str = "pictures.example") -> str:
        return f"http://{host}:{self.port}/{path}"


def handler_of(requests: list[tuple[str, str]], opened: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content_Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def dribble(self, what: bytes, seconds: float) -> None:
            for _ in range(int(seconds / 0.05)):
                self.wfile.write(what)
                time.sleep(0.05)

        def do_GET(self) -> None:
            requests.append((self.headers["Host"], self.path))
            kind, _, rest = self.path.lstrip("/").partition("?")[0].partition("/")
            try:
                self.serve(kind, rest)
            except OSError:
                pass  # the client hung up, as it should
            finally:
                self.close_connection = True

        def serve(self, kind: str, rest: str) -> None:
            match kind:
                case "status":
                    self.answer(int(rest), b"sorry")
                case "redirect":
                    self.answer(302, Location=unquote(rest))
                case "loop":
                    self.answer(302, Location="/loop")
                case "wait":
                    opened.wait(PATIENCE)
                    self.answer(int(rest or 200), picture())
                case "big":
                    self.answer(200, b"x" * int(rest or 5000))
                case "endless":
                    self.send_response(200)
                    self.end_headers()
                    self.dribble(b"x" * int(rest or 2000), DRIBBLED)
                case "lies":
                    self.answer(200, b"x" * 10, Content_Length="100")
                case "promises":
                    self.answer(200, b"x", Content_Length="99999999999999")
                case "gzip":
                    self.answer(200, b"x", Content_Encoding="gzip")
                case "slow-body":
                    self.send_response(200)
                    self.end_headers()
                    self.dribble(b"x", DRIBBLED)
                case "slow-head":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Header: ")
                    self.dribble(b"x", DRIBBLED)
                case "nonsense":
                    self.wfile.write(b"SMTP ready\r\n\r\n")
                case _:
                    self.answer(200, picture())

    return Handler


def wire(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    real_lookup, real_connect = socket.getaddrinfo, socket.create_connection

    def lookup(host: str, port: int, *rest: Any, **named: Any) -> list[Any]:
        if host not in lab.names:
            # only spellings of addresses: the lab must not ask a real name server
            return real_lookup(host, port, *rest, **{**named, "flags": socket.AI_NUMERICHOST})
        lab.lookups.append(host)
        answers = lab.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port))
            for family, address in zip(families, addresses, strict=True)
        ]

    def connect(address: tuple[str, int], *rest: Any, **named: Any) -> socket.socket:
        if address[1] == lab.port:
            lab.connections.append(address[0])
        if address[0].startswith("198.41."):
            raise ConnectionRefusedError
        return real_connect(("127.0.0.1", address[1]), *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", connect)


@contextmanager
def picture_site(patch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """One that is wired for as long as `patch` lasts."""
    requests: list[tuple[str, str]] = []
    opened = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(requests, opened))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    made = Lab(server.server_port, requests=requests, open=opened)
    made.name("pictures.example", [PUBLIC])
    wire(made, patch)
    yield made
    server.shutdown()
    server.server_close()
