"""Misbehaving W&B servers on loopback: each is a context manager that yields its URL."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def silent_server() -> Iterator[str]:
    """Accepts every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:  # the kernel accepts
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def refusing_server() -> Iterator[str]:
    """A reserved port that refuses connections."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve with `handler`, in threads of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """No output."""

    def read(self) -> str:
        return self.rfile.read(int(self.headers.get("content-length") or 0)).decode(errors="replace")

    def answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def answering(status: int) -> type[BaseHTTPRequestHandler]:
    """A handler that always answers with an error."""

    class Answering(_Handler):
        def do_POST(self) -> None:
            self.read()
            self.answer({"errors": [{"message": "no"}]}, status)

        do_GET = do_PUT = do_POST  # noqa: N815 (http.server's names)

    return Answering


class Accepting(_Handler):
    """Accepts a new run like W&B, then answers every request that is not `ignored`."""

    accepted_at = float("inf")

    def ignored(self, request: str) -> bool:
        return False

    def do_POST(self) -> None:
        request = self.read()
        if self.ignored(request):
            time.sleep(60)
            return
        operation = re.search(r'"operationName":\s*"(\w+)"|(?:query|mutation) (\w+)', request)
        name = (operation[1] or operation[2]) if operation else ""
        if name == "UpsertBucket":
            type(self).accepted_at = time.monotonic()
            run = json.loads(request)["variables"]["name"]
            project = {"id": "cA==", "name": "mnist", "entity": {"id": "ZQ==", "name": "someone"}}
            bucket = {"id": "aWQ=", "name": run, "displayName": run, "description": "", "config": "{}"}
            bucket |= {"sweepName": None, "project": project, "historyLineCount": 0}
            self.answer({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}})
        elif name == "Viewer":
            viewer = {"id": "dg==", "entity": "someone", "username": "someone", "email": "a@b", "admin": False}
            self.answer({"data": {"viewer": viewer | {"flags": "{}", "teams": {"edges": []}}}})
        elif "file_stream" in self.path:
            self.answer({"limits": {}})
        else:
            info: dict[str, object] = {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}
            files = {"runID": "aWQ=", "uploadHeaders": [], "files": []}
            self.answer({"data": {"serverInfo": info, "createRunFiles": files, "project": None}})

    do_GET = do_PUT = do_POST  # noqa: N815 (http.server's names)


class Vanishing(Accepting):
    """Stops answering a second after it has accepted the run."""

    def ignored(self, request: str) -> bool:
        return time.monotonic() > self.accepted_at + 1


class Stalling(Accepting):
    """Does not answer requests to create artifacts, as if its storage were down."""

    def ignored(self, request: str) -> bool:
        return "createArtifact" in request
