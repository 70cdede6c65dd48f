"""A page in the browser on which a person draws, and the network's answer moves with the line.

serve(answer, data.class_names, "cnn on mnist")             # http://127.0.0.1:7860, until Ctrl-C
server = build_server(answer, names, "title", port=0)       # for tests: a free port, server.address names it

`answer` takes a PNG, bright ink on black as MNIST's images are, and returns what the page shows:

    {"label": "7", "probability": 0.98, "probabilities": [0.0, ...], "seen": "data:image/png;base64,..."}

with None as the label where nothing is found to answer about. `seen` is what the network was given; it may be empty.
The page is one file, draw.html, and asks for nothing from elsewhere. The server keeps nothing between two requests, so
that pages do not disturb each other.
"""

import contextlib
import errno
import io
import ipaddress
import json
import os
import secrets
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from mnist.errors import ConfigError, UserError

Answer = Callable[[bytes], Mapping[str, Any]]

HOST, PORT = "127.0.0.1", 7860
LARGEST_BODY = 2**20  # bytes of a picture; the page sends some 5 kB
LARGEST_SIDE = 2048  # pixels: what a small file can unpack to is bounded before anyone unpacks it
PATIENCE = 10  # seconds in which a client has to send something
METHODS = {"/": "GET", "/answer": "POST"}
ANY_ADDRESS = ("", "0.0.0.0", "::")


def serve(answer: Answer, class_names: Sequence[str], title: str, host: str = HOST, port: int = PORT) -> None:
    """Give the page and answer what is drawn on it, until Ctrl-C, on which it returns.

    Raises what `build_server` does.
    """
    with contextlib.suppress(KeyboardInterrupt), build_server(answer, class_names, title, host, port) as server:
        print(f"Draw at {server.address} and see what the network makes of it. Ctrl-C ends it.", flush=True)
        if not is_loopback(host):
            print(f"It listens on {host}: whoever reaches this machine there can use it.", flush=True)
        previous = signal.getsignal(signal.SIGINT)
        if previous is signal.default_int_handler:  # which would close a connection under the thread that answers it
            signal.signal(signal.SIGINT, lambda *_: threading.Thread(target=server.shutdown).start())
        try:
            server.serve_forever()
        finally:
            signal.signal(signal.SIGINT, previous)


def build_server(
    answer: Answer, class_names: Sequence[str], title: str, host: str = HOST, port: int = PORT
) -> "DrawServer":
    """The server, listening but not yet answering; port 0 is any free one.

    `answer` is called by one thread at a time, and raises UserError for a picture that it cannot read. Raises UserError
    for a port that is taken or forbidden, and ConfigError for a host or a port that cannot be.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port}: a port is a number from 0 to {2**16 - 1}.")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        return DrawServer(answer, class_names, title, host, family, cast("tuple[str, int]", address[:2]))
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"--host {host}: no address is known by this name. {HOST} is this machine alone.") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"--host {host}: not an address of this machine. {HOST} is always one.") from error
        if error.errno == errno.EADDRINUSE:
            reason = "is taken, by another `mnist draw` perhaps"
        else:
            reason = f"cannot be listened on ({os.strerror(error.errno or 0)})"
        other = port + 1 if 1024 <= port < 2**16 - 1 else PORT
        raise UserError(f"Port {port} of {host} {reason}. Choose another one, as --port {other}.") from error


class DrawServer(ThreadingHTTPServer):
    """A thread for each request, so that a client that sends nothing keeps nobody waiting."""

    def __init__(
        self,
        answer: Answer,
        class_names: Sequence[str],
        title: str,
        host: str,
        family: int,
        address: tuple[str, int],
    ) -> None:
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
        )
        self.page = environment.get_template("draw.html")
        self.content = {"title": title, "class_names": list(class_names)}
        self.host = host
        self.address_family = cast("socket.AddressFamily", family)
        self._answer = answer
        # A network is switched to evaluation and back while it answers, and two at a time would only share the cores.
        self._answering = threading.Lock()
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Without HTTPServer's question for this machine's full name, which takes seconds where nobody knows it."""
        socketserver.TCPServer.server_bind(self)

    @property
    def address(self) -> str:
        """Where a browser on this machine finds the page."""
        host = "127.0.0.1" if self.host in ANY_ADDRESS else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def answer(self, picture: bytes) -> Mapping[str, Any]:
        """What the page shows for a PNG."""
        with self._answering:
            return self._answer(picture)

    def is_named(self, host: str) -> bool:
        """Whether a Host header names this machine as we know it.

        A page from elsewhere may have its own name resolved to this machine's address and reach us under that name, as
        if we were its own server (DNS rebinding). The port is not compared: it is another one behind `ssh -L`.
        """
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        name = name.lower()
        if is_loopback(name) or name == self.host.lower():
            return True
        # listening on all addresses, we are called by any of them: what is a number was not resolved from a name
        return self.host in ANY_ADDRESS and (is_number(name) or name == socket.gethostname().lower())

    def server_close(self) -> None:
        """Stop listening. No answer is computed afterwards: a thread inside torch does not survive the interpreter."""
        super().server_close()
        self._answering.acquire(timeout=5)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has gone away or is too slow; all else is a bug and keeps its traceback."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request. The connection ends with it, so that none stays open and what follows a refused body is not read."""

    server: DrawServer
    timeout = PATIENCE
    disable_nagle_algorithm = True  # the head and the body of an answer are two packets, and the second shall not wait

    def handle_any(self) -> None:
        """Answer with the page, with what the network makes of a drawing, or with a refusal."""
        path = self.path.partition("?")[0]
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(hosts) != 1 or not self.server.is_named(hosts[0]):
            self.refuse(HTTPStatus.MISDIRECTED_REQUEST, "This server is not known by that name.")
        elif origin is not None and origin.lower() != f"http://{hosts[0].lower()}":
            self.refuse(HTTPStatus.FORBIDDEN, "Only the page of this server may ask.")
        elif path not in METHODS:
            self.refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")
        elif self.command != METHODS[path]:
            self.refuse(HTTPStatus.METHOD_NOT_ALLOWED, f"Here is only {METHODS[path]}.", Allow=METHODS[path])
        elif path == "/":
            self.give_page()
        else:
            self.give_answer()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = handle_any  # noqa: N815 (http.server's)

    def give_page(self) -> None:
        """The page, whose own style and script are the only ones that the browser takes."""
        nonce = secrets.token_urlsafe(16)
        page = self.server.page.render(**self.server.content, nonce=nonce)
        allowed = f"style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src data:; connect-src 'self'"
        self.send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode(), allowed)

    def give_answer(self) -> None:
        """What the network makes of the picture in the body."""
        length = self.headers.get("Content-Length")
        if length is None or "Transfer-Encoding" in self.headers:
            return self.refuse(HTTPStatus.LENGTH_REQUIRED, "How long the picture is has to be said: Content-Length.")
        if not length.isdecimal():
            return self.refuse(HTTPStatus.BAD_REQUEST, "Content-Length is no number.")
        if len(length) > 15 or int(length) > LARGEST_BODY:
            return self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A picture has at most {LARGEST_BODY:,} bytes.")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return None  # the client is gone
        if (size := size_of_png(body)) is None:
            return self.refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "That is not a PNG.")
        if max(size) > LARGEST_SIDE:
            reason = f"A picture has at most {LARGEST_SIDE} pixels a side."
            return self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
        try:
            answer = json.dumps(self.server.answer(body), allow_nan=False)
        except UserError as error:
            return self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Exception:  # a bug, or a machine out of memory: the next picture may fare better
            traceback.print_exc()
            return self.refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "The network failed; the terminal says how.")
        return self.send(HTTPStatus.OK, "application/json", answer.encode())

    def refuse(self, status: int, reason: str, **headers: str) -> None:
        """Say why not."""
        self.send(status, "text/plain; charset=utf-8", f"{reason}\n".encode(), **headers)
        # What the client still sends is read and thrown away: closed over it, the connection would be reset, and the
        # client might never see the answer.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            ends_at = time.monotonic() + PATIENCE
            while time.monotonic() < ends_at and self.connection.recv(2**16):
                pass

    def send(self, status: int, kind: str, body: bytes, allowed: str = "", **headers: str) -> None:
        """An answer that nobody keeps, with nothing `allowed` to the browser but what is named."""
        self.send_response(status)
        policy = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{policy}; {allowed}" if allowed else policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server's own refusals, of what is no HTTP for instance, in the form of ours."""
        self.refuse(code, message or HTTPStatus(code).phrase)

    def version_string(self) -> str:
        """Which Python it is concerns nobody."""
        return "mnist"

    def log_message(self, format: str, *arguments: object) -> None:
        """No line a request: there are many a second."""


def is_number(name: str) -> bool:
    """Whether it is an address in numbers, of IPv4 or IPv6."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def size_of_png(body: bytes) -> tuple[int, int] | None:
    """Width and height of what Pillow would decode, from whichever header it believes; None for what is no PNG."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is refused, and the client told
            with Image.open(io.BytesIO(body), formats=["PNG"]) as image:
                width, height = image.size
                return width, height
    except Image.DecompressionBombError:
        return LARGEST_SIDE + 1, LARGEST_SIDE + 1
    except Exception:  # whatever a damaged file makes of a parser
        return None


def is_loopback(name: str) -> bool:
    """Whether only this machine is reached by that name."""
    return name == "localhost" or (is_number(name) and ipaddress.ip_address(name).is_loopback)
