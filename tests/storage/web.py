"""A web server for tests: it gives ranges of a folder's files, counts sent bytes, and fails or lies
if told to.
"""

import base64
import hashlib
import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from tests.conftest import save_model


def large(seed: int) -> dict[str, torch.Tensor]:
    """Four matrices of 256 KiB, so that most of a file is after its first bytes."""
    rng = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(256, 256, generator=rng)
        for i in range(4)
    }


def save_large(root: Path):
    """Write base and tuned."""
    before = large(1)
    after = {name: value + 0.1 * large(2)[name] for name, value in before.items()}
    for name, tensors in (("base", before), ("tuned", after)):
        (save_model(root / name, tensors) / "config.json").write_text('{"model_type": "llama"}')


def assert_equal(far, near):
    """Assert that a checkpoint is the same from another place."""
    assert set(far) == set(near)
    assert (far.kind, far.config) == (near.kind, near.config)
    for tensor in near:
        assert far[tensor] == near[tensor]
        some = (near[tensor].numel // 3, near[tensor].numel // 2)
        for span in ((), some):
            assert torch.equal(far.read(tensor, *span), near.read(tensor, *span))


@dataclass
class Request:
    """One request, as it came and as it was answered."""

    path: str
    query: str
    range: tuple[int, int] | None
    status: int
    sent: int
    headers: dict[str, str] = field(repr=False)


class Web:
    """Serves a folder on 127.0.0.1.

    ``fault`` names how the data behind the first 64 KiB of a file are answered (everything, with
    ``at_all``), and ``times`` how often before the server behaves again.
    """

    def __init__(self, folder: Path, certificate: Path | None = None):
        self.folder, self.requests = folder, []
        self.fault, self.times, self.at_all, self.user = None, 10**9, False, None
        self.takes_signature = None  # a query with this text counts as the user
        self.names_versions, self.is_gone = True, False
        self.now, self.most = 0, 0  # requests at once, now and at most
        self.together, self.held = (
            0,
            "",
        )  # how many are waited for before one that asks for such a path is answered
        self.moved = {}  # beginnings of paths, and where they are now
        self._lock = threading.Condition()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"web": self})
        )
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http{'s' if certificate else ''}://{self.host}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.is_gone = True
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def counted(self, path: str):
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self._lock.notify_all()
            if self.most < self.together and self.held in path:
                self._lock.wait_for(lambda: self.most >= self.together, 300)
                time.sleep(0.02)  # for more, of whom there may be none
        try:
            yield
        finally:
            with self._lock:
                self.now -= 1

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def takes_fault(self, start: int) -> str | None:
        with self._lock:
            if self.fault and self.times > 0 and (self.at_all or start > 0):
                self.times -= 1
                return self.fault
        return None


class _Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def handle(self):
        with suppress(OSError):
            super().handle()

    def do_GET(self):
        with self.web.counted(self.path):
            self.respond()

    def respond(self):
        if self.web.is_gone:
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        file = self.web.folder / unquote(parts.path).lstrip("/")
        wanted = self.headers.get("Range")
        span = tuple(map(int, wanted.removeprefix("bytes=").split("-"))) if wanted else None
        request = Request(
            parts.path,
            parts.query,
            span,
            0,
            0,
            {name.lower(): value for name, value in self.headers.items()},
        )
        self.web.requests.append(request)
        is_signed = self.web.takes_signature and self.web.takes_signature in parts.query
        if (
            self.web.user
            and not is_signed
            and self.headers.get("Authorization") != f"Basic {self.web.user}"
        ):
            self.answer(request, 401, {}, b"who are you?")
        elif moved := next(
            (to for old, to in self.web.moved.items() if parts.path.startswith(old)), None
        ):
            self.answer(
                request,
                302,
                {"Location": f"{moved}/{parts.path.rpartition('/')[2]}?signature=secret"},
                b"",
            )
        elif not file.is_file():
            self.answer(request, 404, {}, b"nothing here")
        else:
            self.give(request, file.read_bytes(), span)

    def give(self, request: Request, content: bytes, span: tuple[int, int] | None):
        headers = (
            {"ETag": f'"{hashlib.md5(content).hexdigest()}"'} if self.web.names_versions else {}
        )
        start, stop = (span[0], min(span[1] + 1, len(content))) if span else (0, len(content))
        fault = self.web.takes_fault(start)
        if fault == "ignore" or span is None:
            self.answer(request, 200, headers, content)
            return
        if start >= stop:
            self.answer(request, 416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        body = content[start:stop]
        first, last, size = start, stop - 1, len(content)
        if fault and fault.isdigit():
            self.answer(
                request,
                int(fault),
                {"Location": "http://elsewhere.invalid/x?token=secret"},
                b"<html>",
            )
            return
        if fault == "shifted":
            first, last, body = start + 1, stop, content[start + 1 : stop + 1]
        elif fault == "less":
            last, body = first + len(body) // 2 - 1, body[: len(body) // 2]
        elif fault == "other size":
            size += 1
        elif fault == "no range":
            size = None
        elif fault == "changed":
            headers["ETag"] = '"other"'
        elif fault == "gzip":
            headers["Content-Encoding"] = "gzip"
        elif fault == "short":
            body = body[: (len(body) + 1) // 2]
        elif fault in {"drip", "crumb"}:
            self.drip(request, headers | {"Content-Range": f"bytes {first}-{last}/{size}"}, body)
            return
        elif fault == "endless":
            self.pour(request, headers | {"Content-Range": f"bytes {first}-{last}/{size}"})
            return
        elif fault == "long":
            body += b"x"
        if size is not None:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.answer(request, 206, headers, body, drop=fault == "drop")

    def begin(self, request: Request, status: int, headers: dict):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        request.status = status

    def drip(self, request: Request, headers: dict, body: bytes):
        """Send a byte now and then; a crumb is few bytes, after which the connection is dropped."""
        self.begin(request, 206, {**headers, "Content-Length": len(body)})
        with suppress(OSError):
            for at in range(len(body)):
                self.wfile.write(body[at : at + 1])
                self.wfile.flush()
                if self.web.fault == "crumb" and at == 9:
                    break
                if self.web.fault == "drip":
                    time.sleep(0.05)
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def pour(self, request: Request, headers: dict):
        """Send bytes until the client stops reading, regardless of the headers."""
        self.begin(request, 206, {**headers, "Transfer-Encoding": "chunked"})
        with suppress(OSError):
            while not self.web.is_gone:
                self.wfile.write(b"10000\r\n" + bytes(2**16) + b"\r\n")
                request.sent += 2**16
        self.close_connection = True

    def answer(self, request: Request, status: int, headers: dict, body: bytes, drop: bool = False):
        self.begin(request, status, {**headers, "Content-Length": len(body)})
        if drop:
            body = body[: len(body) // 2]
        request.sent = len(body)
        try:
            self.wfile.write(body)
            self.wfile.flush()
            if drop:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
        except OSError:
            self.close_connection = True


def basic(user: str, password: str) -> str:
    """Return what a browser sends for a name and a password."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()
