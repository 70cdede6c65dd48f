"""Serve a page for drawing that shows predictions while you draw.

serve(answer, data.class_names, "cnn on mnist")             # http://127.0.0.1:7860, until Ctrl-C
server = build_server(answer, names, "title", port=0)       # for tests: a free port, see server.address

`answer` takes a PNG, bright ink on black like MNIST's images, and returns

    {"text": "7", "label": "7", "probability": 0.98, "confident": True, "probabilities": [0.0, ...],
     "network_input": "data:image/png;base64,...", "reason": "",
     "digits": [{"label": "7", "probability": 0.98, "confident": True, "box": [120, 40, 210, 230],
                 "network_input": "data:image/png;base64,..."}]}

For several digits, "text" has their rows, separated by newlines, "digits" has them in that order with their boxes
(left, top, right, bottom in pixels of the PNG), "probability" is the lowest, and "label", "probabilities" and
"network_input" are None and empty. If no digit was found, "text" and "digits" are empty and "reason" says why. The page
is a single file, draw.html. The server is stateless.
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
MAX_BODY = 2**20  # bytes of an image; the page sends some 5 kB
MAX_DRAWING_SIDE = 2048  # pixels; bounds the memory into which a small file can unpack
TIMEOUT = 10  # seconds to wait for a client
METHODS = {"/": "GET", "/answer": "POST"}
ANY_ADDRESS = ("", "0.0.0.0", "::")


def serve(
    answer: Answer, class_names: Sequence[str], title: str, host: str = HOST, port: int = PORT, numbers: bool = False
) -> None:
    """Serve the page until Ctrl-C. Takes and raises what `build_server` does."""
    with (
        contextlib.suppress(KeyboardInterrupt),
        build_server(answer, class_names, title, host, port, numbers) as server,
    ):
        print(f"Open {server.address} to draw (press Ctrl-C to stop).", flush=True)
        if not is_loopback(host):
            print(f"Listening on {host}: everyone who can reach this machine can use it.", flush=True)
        previous = signal.getsignal(signal.SIGINT)
        if previous is signal.default_int_handler:  # would close connections that threads are still using
            signal.signal(signal.SIGINT, lambda *_: threading.Thread(target=server.shutdown).start())
        try:
            server.serve_forever()
        finally:
            signal.signal(signal.SIGINT, previous)


def build_server(
    answer: Answer, class_names: Sequence[str], title: str, host: str = HOST, port: int = PORT, numbers: bool = False
) -> "DrawServer":
    """A server that listens but does not handle requests yet. Port 0 selects a free port.

    `answer` is called by one thread at a time and may raise UserError for an image that it cannot read. With `numbers`
    it can read several digits, and the page has a wide canvas. Raises UserError if the port is in use or not allowed,
    ConfigError if the host or port is invalid.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port}: must be from 0 to {2**16 - 1}.")
    try:
        family, *_, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        content = {"title": title, "class_names": list(class_names), "numbers": numbers}
        return DrawServer(answer, content, host, family, cast("tuple[str, int]", address[:2]))
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"--host {host}: unknown host. Use {HOST} for this machine only.") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"--host {host}: not an address of this machine. Try {HOST}.") from error
        if error.errno == errno.EADDRINUSE:
            reason = "in use, perhaps by another `mnist draw`"
        else:
            reason = f"not available ({os.strerror(error.errno or 0)})"
        other = port + 1 if 1024 <= port < 2**16 - 1 else PORT
        raise UserError(f"Port {port} of {host}: {reason}. Choose another one: --port {other}") from error


class DrawServer(ThreadingHTTPServer):
    """An HTTP server with one thread per request, so an idle client does not block others."""

    def __init__(
        self, answer: Answer, content: dict[str, Any], host: str, family: int, address: tuple[str, int]
    ) -> None:
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
        )
        self.page = environment.get_template("draw.html")
        self.content = content
        self.host = host
        self.address_family = cast("socket.AddressFamily", family)
        self._answer = answer
        # predicting switches the network to evaluation mode and back; two threads would only compete for the cores
        self._answering = threading.Lock()
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Skip HTTPServer's lookup of this machine's full name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)

    @property
    def address(self) -> str:
        """The page's URL for a browser on this machine."""
        host = "127.0.0.1" if self.host in ANY_ADDRESS else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def answer(self, image: bytes) -> Mapping[str, Any]:
        """The prediction for a PNG."""
        with self._answering:
            return self._answer(image)

    def is_named(self, host: str) -> bool:
        """Whether a Host header names this machine; prevents DNS rebinding (another site whose name resolves to us).

        Ignores the port, which differs behind `ssh -L`.
        """
        name = (host[1:].partition("]") if host.startswith("[") else host.partition(":"))[0].lower()
        if is_loopback(name) or name == self.host.lower():
            return True
        # listening on all addresses: a numeric one is ours, because it was not resolved from a name
        return self.host in ANY_ADDRESS and (is_number(name) or name == socket.gethostname().lower())

    def server_close(self) -> None:
        """Stop listening and answering: a thread inside torch would crash the interpreter's exit."""
        super().server_close()
        self._answering.acquire(timeout=5)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect or time out; anything else is a bug and prints its traceback."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Handles one request and closes the connection, so data after a refused body is not read."""

    server: DrawServer
    timeout = TIMEOUT
    disable_nagle_algorithm = True  # headers and body are two packets; the second must not be delayed

    def handle_any(self) -> None:
        """Answer any request."""
        path = self.path.partition("?")[0]
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(hosts) != 1 or not self.server.is_named(hosts[0]):
            self.refuse(HTTPStatus.MISDIRECTED_REQUEST, "Unknown host name.")
        elif origin is not None and origin.lower() != f"http://{hosts[0].lower()}":
            self.refuse(HTTPStatus.FORBIDDEN, "Requests from other sites are not allowed.")
        elif path not in METHODS:
            self.refuse(HTTPStatus.NOT_FOUND, "Not found.")
        elif self.command != METHODS[path]:
            self.refuse(HTTPStatus.METHOD_NOT_ALLOWED, f"Only {METHODS[path]} is allowed.", Allow=METHODS[path])
        elif path == "/":
            self.send_page()
        else:
            self.send_answer()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = handle_any  # noqa: N815 (http.server's)

    def send_page(self) -> None:
        """Send the page. The browser accepts no styles and scripts but those of the page."""
        nonce = secrets.token_urlsafe(16)
        page = self.server.page.render(**self.server.content, nonce=nonce)
        allowed = f"style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src data:; connect-src 'self'"
        self.send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode(), allowed)

    def send_answer(self) -> None:
        """Send the prediction for the image in the body."""
        length = self.headers.get("Content-Length")
        if length is None or "Transfer-Encoding" in self.headers:
            return self.refuse(HTTPStatus.LENGTH_REQUIRED, "Content-Length is required.")
        if not length.isdecimal():
            return self.refuse(HTTPStatus.BAD_REQUEST, "Content-Length is not a number.")
        if len(length) > 15 or int(length) > MAX_BODY:
            return self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The limit is {MAX_BODY:,} bytes.")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return None  # the client is gone
        if (size := size_of_png(body)) is None:
            return self.refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Not a PNG.")
        if max(size) > MAX_DRAWING_SIDE:
            return self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The limit is {MAX_DRAWING_SIDE} pixels per side.")
        try:
            answer = json.dumps(self.server.answer(body), allow_nan=False)
        except UserError as error:
            return self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Exception:  # a bug, or out of memory; the next image may succeed
            traceback.print_exc()
            return self.refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "The network failed; see the terminal.")
        return self.send(HTTPStatus.OK, "application/json", answer.encode())

    def refuse(self, status: int, reason: str, **headers: str) -> None:
        """Send an error and discard what the client still sends: closing early would reset the connection."""
        self.send(status, "text/plain; charset=utf-8", f"{reason}\n".encode(), **headers)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            ends_at = time.monotonic() + TIMEOUT
            while time.monotonic() < ends_at and self.connection.recv(2**16):
                pass

    def send(self, status: int, kind: str, body: bytes, allowed: str = "", **headers: str) -> None:
        """Send a response that is not cached. `allowed` extends a security policy that denies everything."""
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
        """Send http.server's own errors, e.g. for malformed requests."""
        self.refuse(code, message or HTTPStatus(code).phrase)

    def version_string(self) -> str:
        """Hide the Python version."""
        return "mnist"

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: there are many requests per second."""


def is_number(name: str) -> bool:
    """Whether it is a numeric IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def size_of_png(body: bytes) -> tuple[int, int] | None:
    """Width and height as Pillow reads them (a file may have several headers); None if it is not a PNG."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is refused with an error
            with Image.open(io.BytesIO(body), formats=["PNG"]) as image:
                width, height = image.size
                return width, height
    except Image.DecompressionBombError:
        return MAX_DRAWING_SIDE + 1, MAX_DRAWING_SIDE + 1
    except Exception:  # parsers raise anything on damaged files
        return None


def is_loopback(name: str) -> bool:
    """Whether it names this machine's loopback interface."""
    return name == "localhost" or (is_number(name) and ipaddress.ip_address(name).is_loopback)
