"""The drawing page in a browser, with mouse, touch and keys, and its server."""

import base64
import http.client
import io
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mnist import load
from mnist.config.settings import PROJECT_FOLDER
from mnist.data.images import read_image
from mnist.errors import ConfigError, UserError
from mnist.inference.draw import MAX_BODY, MAX_DRAWING_SIDE, PORT, DrawServer, build_server
from mnist.reporting.snapshots import picture
from tests.conftest import hear_ctrl_c
from tests.support.handwriting import HANDS, swing

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = tuple("0123456789")
PROMPT = "Draw a digit or a number"
HOSTILE = "</script><script>document.title='owned'</script> & \"'"
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def in_a_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a slow test that needs Chromium."""
    needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="apt install chromium")
    marked: Callable[..., None] = pytest.mark.slow(needs_chromium(test))
    return marked


def band(picture: bytes) -> dict[str, Any]:
    """An answer without a network: which of ten vertical bands contains the ink's center; none for a few specks."""
    try:
        with Image.open(io.BytesIO(picture)) as image:
            ink = np.asarray(image.convert("L"), dtype=float)  # [height, width]
    except (OSError, SyntaxError) as error:
        raise UserError(f"not a picture: {error}") from error
    if ink.sum() < 255 * 900:
        return answered(reason="no digit found")
    columns = ink.sum(axis=0)
    middle = (columns * np.arange(len(columns))).sum() / columns.sum()
    label = int(10 * middle / len(columns))
    probabilities = [0.82 if number == label else 0.02 for number in range(10)]
    return answered([read_as(str(label), ink, (0, 0, ink.shape[1], ink.shape[0]))], probabilities)


def read_as(label: str, ink: Any, region: tuple[int, int, int, int], probability: float = 0.82) -> dict[str, Any]:
    """A digit of an answer: the ink [height, width] within a region, given by left, top, right and bottom."""
    left, top, right, bottom = region
    part = ink[top:bottom, left:right]
    rows, columns = np.nonzero(part.max(axis=1) > 127)[0], np.nonzero(part.max(axis=0) > 127)[0]
    seen = io.BytesIO()
    Image.fromarray(part.astype(np.uint8)).resize((28, 28)).save(seen, format="PNG")
    return {
        "label": label,
        "probability": probability,
        "confident": probability > 0.5,
        "box": [int(edge) for edge in (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)],
        "network_input": "data:image/png;base64," + base64.b64encode(seen.getvalue()).decode(),
    }


def answered(
    digits: Sequence[dict[str, Any]] = (), probabilities: Sequence[float] = (), **fields: Any
) -> dict[str, Any]:
    """An answer with no, one or several digits."""
    one = digits[0] if len(digits) == 1 else {"label": None, "network_input": ""}
    return {
        "text": "".join(digit["label"] for digit in digits),
        "label": one["label"],
        "probability": min((digit["probability"] for digit in digits), default=0.0),
        "confident": len(digits) > 0 and all(digit["confident"] for digit in digits),
        "probabilities": list(probabilities),
        "network_input": one["network_input"],
        "digits": list(digits),
        "reason": "",
        **fields,
    }


def number(text: str, unsure: int | None = None) -> Callable[[bytes], dict[str, Any]]:
    """Answers of a server that finds the digits of `text`, one in each cell of a grid with as many rows."""
    rows = text.split("\n")

    def answer(picture: bytes) -> dict[str, Any]:
        with Image.open(io.BytesIO(picture)) as image:
            ink = np.asarray(image.convert("L"))  # [height, width]
        digits: list[dict[str, Any]] = []
        found = ["" for _ in rows]
        for y, row in enumerate(rows):
            for x, label in enumerate(row):
                width, height = ink.shape[1] // len(row), ink.shape[0] // len(rows)
                cell = x * width, y * height, (x + 1) * width, (y + 1) * height
                if ink[cell[1] : cell[3], cell[0] : cell[2]].max() > 127:  # drawn already
                    probability = 0.4 if len(digits) == unsure else 0.97 - 0.01 * len(digits)
                    digits.append(read_as(label, ink, cell, probability))
                    found[y] += label
        return answered(digits, [0.1] * 10 if len(digits) == 1 else [], text="\n".join(filter(None, found)))

    return answer


def png(width: int = 280, height: int = 280, ink: tuple[int, int, int, int] = (130, 40, 150, 240)) -> bytes:
    """An image with a bar of ink, given by left, top, right and bottom."""
    image = Image.new("L", (width, height))
    image.paste(255, ink)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@contextmanager
def serving(answer: Callable[[bytes], dict[str, Any]] = band, **settings: Any) -> Iterator[DrawServer]:
    """A running server on a free port, in threads of this process."""
    usual: dict[str, Any] = {"class_names": NAMES, "title": "Digits", "port": 0, "numbers": True}
    with build_server(answer, **(usual | settings)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@contextmanager
def serving_process(*arguments: str, **options: Any) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, cwd=PROJECT_FOLDER, stdout=subprocess.PIPE, text=True, **options)
    try:
        assert process.stdout
        line = process.stdout.readline()
        found = re.search(r"http://127.0.0.1:\d+/", line)
        assert found, line
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[DrawServer]:
    with serving() as server:
        yield server


# --- the server


class Reply:
    """The response to a request."""

    def __init__(self, server: DrawServer, method: str, path: str, body: bytes | None = None, **headers: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        self.status, self.headers, self.body = response.status, response.headers, response.read()
        connection.close()


def raw(server: DrawServer, request: bytes) -> bytes:
    """The raw response to these bytes."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_an_image_is_answered_with_its_prediction(server: DrawServer) -> None:
    reply = Reply(server, "POST", "/answer", png(ink=(200, 40, 220, 240)))
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "application/json"
    prediction = json.loads(reply.body)
    assert prediction["label"] == "7"
    assert prediction["probabilities"][7] == prediction["probability"] == 0.82
    assert prediction["network_input"].startswith("data:image/png;base64,")
    assert json.loads(Reply(server, "POST", "/answer", png(ink=(0, 0, 9, 9))).body)["label"] is None


def test_an_answer_comes_quickly(server: DrawServer) -> None:
    seconds = []
    for _ in range(20):
        started = time.monotonic()
        assert Reply(server, "POST", "/answer", png()).status == 200
        seconds.append(time.monotonic() - started)
    print(f"median {1000 * sorted(seconds)[10]:.1f} ms, worst {1000 * max(seconds):.1f} ms")
    assert sorted(seconds)[10] < 0.5


def test_the_page_is_self_contained_and_no_other_script_or_style_is_allowed(server: DrawServer) -> None:
    first, second = Reply(server, "GET", "/"), Reply(server, "GET", "/?anything")
    assert first.status == second.status == 200
    assert f'<div id="label">{PROMPT}</div>'.encode() in first.body
    page, policy = first.body.decode(), first.headers["Content-Security-Policy"]
    found = re.search(r"script-src 'nonce-([\w-]{20,})'", policy)
    assert found
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'nonce-{found[1]}'" in policy
    assert "unsafe" not in policy
    assert page.count(f'nonce="{found[1]}"') == 2
    assert found[1].encode() not in second.body  # different for each page
    scripts = ['<script type="application/json" id="class-names">', f'<script nonce="{found[1]}">']
    assert re.findall(r"<script[^>]*>", page) == scripts
    assert not re.search(r"""(src|href|action)=["'](?!data:)|url\(|@import| style=| on\w+=""", page)
    for reply in (first, Reply(server, "GET", "/no"), Reply(server, "POST", "/answer", png())):
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Cache-Control"] == "no-store"
        assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'; ")


def test_hostile_names_stay_text() -> None:
    with serving(class_names=[HOSTILE, "other"], title=HOSTILE, numbers=False) as server:
        page = Reply(server, "GET", "/").body.decode()
    assert HOSTILE not in page
    assert page.count("<script") == 2
    assert '<div id="label">Draw something</div>' in page  # the names are not digits
    found = re.search(r'id="class-names">(.*?)</script>', page)
    assert found
    assert json.loads(found[1]) == [HOSTILE, "other"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *[("GET", path, 404) for path in ("/favicon.ico", "/draw.html", "/../draw.py", "/answer/", "/%2e%2e/")],
        *[(method, "/", 405) for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")],
        *[(method, "/answer", 405) for method in ("GET", "PUT", "HEAD", "OPTIONS")],
        ("BREW", "/", 501),
    ],
)
def test_other_paths_and_methods_are_refused(method: str, path: str, status: int, server: DrawServer) -> None:
    reply = Reply(server, method, path)
    assert reply.status == status
    if status == 405:
        assert reply.headers["Allow"] == ("GET" if path == "/" else "POST")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(host, 200) for host in ("localhost", "127.0.0.1:1", "LocalHost:8000", "[::1]:7860", "127.0.0.2")],
        *[(host, 421) for host in ("evil.example", "evil.example:7860", "localhost.evil.example", "localhost@evil")],
        *[(host, 421) for host in ("", "192.168.1.7", "[", "[fe80::1]", "127.0.0.1.nip.io")],
    ],
)
def test_other_host_names_are_refused_against_dns_rebinding(host: str, status: int, server: DrawServer) -> None:
    assert Reply(server, "GET", "/", Host=host).status == status
    assert Reply(server, "POST", "/answer", png(), Host=host).status == status


def test_no_host_and_two_hosts_are_refused(server: DrawServer) -> None:
    for hosts in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        assert raw(server, b"GET / HTTP/1.1\r\n" + hosts + b"\r\n").startswith(b"HTTP/1.0 421 ")


def test_accepted_host_names_depend_on_the_listening_address() -> None:
    with serving(host="0.0.0.0") as server:
        assert server.address.startswith("http://127.0.0.1:")
        assert server.is_named("192.168.1.7:7860")
        assert server.is_named("[fe80::1]:7860")
        assert server.is_named(socket.gethostname())
        assert not server.is_named("evil.example")
    with serving(host="localhost") as server:
        assert server.is_named("localhost:1")
        server.host = "box.example"
        assert server.is_named("Box.example:7860")
        assert not server.is_named("192.168.1.7")


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:7860", 200), ("http://evil.example", 403), ("https://localhost:7860", 403), ("null", 403)]
    + [("http://localhost:7861", 403), ("", 403)],
)
def test_requests_from_other_origins_are_refused(origin: str, status: int, server: DrawServer) -> None:
    assert Reply(server, "POST", "/answer", png(), Host="localhost:7860", Origin=origin).status == status


def test_an_image_that_is_too_large_is_refused_with_a_response(server: DrawServer) -> None:
    large = png() + bytes(MAX_BODY)
    reply = Reply(server, "POST", "/answer", large)  # sent completely before the response is read
    assert reply.status == 413
    assert b"1,048,576 bytes" in reply.body
    assert Reply(server, "POST", "/answer", large[:MAX_BODY]).status == 200
    head = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n"
    assert raw(server, head).startswith(b"HTTP/1.0 413 ")


def test_a_small_file_with_a_huge_image_is_refused() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def header(width: int, height: int) -> bytes:
        return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))

    side = MAX_DRAWING_SIDE + 1
    data = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with serving(lambda picture: pytest.fail("predicted")) as server:
        # decoders use the last of several headers
        for headers in (header(side, 1), header(28, 28) + header(1, side), header(28, 28) + header(50_000, 50_000)):
            assert Reply(server, "POST", "/answer", b"\x89PNG\r\n\x1a\n" + headers + data).status == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"", 411),
        (b"Transfer-Encoding: chunked\r\n", 411),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", 411),
        (b"Content-Length: many\r\n", 400),
        (b"Content-Length: -1\r\n", 400),
        (b"Content-Length: \r\n", 400),
        (b"Content-Length: 0\r\n", 415),
        (b"Content-Length: 3\r\n", 415),
    ],
)
def test_content_length_is_required(headers: bytes, status: int, server: DrawServer) -> None:
    response = raw(server, b"POST /answer HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\nabc")
    assert response.startswith(f"HTTP/1.0 {status} ".encode())


def test_invalid_images_are_refused_and_bugs_are_printed_in_the_terminal_only(
    server: DrawServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Reply(server, "POST", "/answer", b"GIF89a" + bytes(100)).status == 415
    assert Reply(server, "POST", "/answer", png()[:-30]).status == 400
    assert capsys.readouterr().err == ""

    def broken(picture: bytes) -> dict[str, Any]:
        raise RuntimeError("a secret of the machine")

    with serving(broken) as failing:
        reply = Reply(failing, "POST", "/answer", png())
        assert reply.status == 500
        assert b"secret" not in reply.body
        assert "a secret of the machine" in capsys.readouterr().err
        assert Reply(failing, "GET", "/").status == 200
    with serving(lambda picture: {"probability": float("nan")}) as failing:
        assert Reply(failing, "POST", "/answer", png()).status == 500


def test_idle_clients_block_no_other_and_are_disconnected(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mnist.inference.draw.Handler.timeout", 1)
    with serving() as server, ExitStack() as opened:
        clients = []
        for begun in (b"", b"GET / HT", b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc"):
            client = socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10)
            clients.append(opened.enter_context(client))
            client.sendall(begun)
        started = time.monotonic()
        assert Reply(server, "POST", "/answer", png()).status == 200
        assert time.monotonic() - started < 0.9
        for client in clients:
            assert client.recv(100) == b""
        assert time.monotonic() - started < 5
        # a client that disconnects midway
        with socket.create_connection(("127.0.0.1", server.server_address[1])) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc")
        assert Reply(server, "GET", "/").status == 200
        assert raw(server, b"\x16\x03\x01 this is no HTTP\r\n\r\n").startswith(b"Bad request ")
    assert capfd.readouterr() == ("", "")


def test_predictions_are_computed_one_at_a_time() -> None:
    inside, most = [0], [0]

    def slow(picture: bytes) -> dict[str, Any]:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return band(picture)

    with serving(slow) as server:
        threads = [threading.Thread(target=Reply, args=(server, "POST", "/answer", png())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1]


def test_unavailable_ports_and_hosts_are_errors(server: DrawServer) -> None:
    port = server.server_address[1]
    with pytest.raises(UserError, match=rf"Port {port} of 127.0.0.1: in use.*--port {port + 1}"):
        build_server(band, NAMES, "Digits", port=port)
    for host, port, words in (
        ("nowhere.invalid", 0, "--host nowhere.invalid: unknown host"),
        ("192.0.2.1", 0, "--host 192.0.2.1: not an address of this machine"),
        ("127.0.0.1", 70000, "--port 70000"),
        ("127.0.0.1", -1, "--port -1"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_server(band, NAMES, "Digits", host=host, port=port)


def test_control_c_exits_quietly() -> None:
    code = "from mnist.inference.draw import serve; serve(dict, tuple('0123456789'), 'Digits', port=0)"
    with serving_process("-c", code, preexec_fn=hear_ctrl_c, stderr=subprocess.PIPE) as (process, address):
        port = int(address.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):  # a connected client
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=10) == ("", "")
        assert process.returncode == 0
    assert PORT == 7860


# --- the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


class Tab:
    """The page in a tab of its own, with its requests and console messages."""

    def __init__(self, browser: Any, address: str, **settings: Any) -> None:
        self.context = browser.new_context(**({"viewport": DESK} | settings))
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Window coordinates of a point of the canvas, given as fractions of its sides."""
        box = self.page.locator("#canvas").bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def draw(self, x: float, top: float = 0.2, bottom: float = 0.8, release: bool = True) -> None:
        """Draw a line from top to bottom with the mouse."""
        self.page.mouse.move(*self.at(x, top))
        self.page.mouse.down()
        self.page.mouse.move(*self.at(x, bottom), steps=8)
        if release:
            self.page.mouse.up()

    def draw_cells(self, text: str) -> None:
        """Draw a line for each digit of `text`, all at once, where `number` expects it."""
        rows = text.split("\n")
        lines = []
        for y, row in enumerate(rows):
            for x in range(len(row)):
                lines.append([[1.5 * (x + 0.5) / len(row), (y + part) / len(rows)] for part in (0.2, 0.8)])
        self.page.evaluate("lines => change(lines)", lines)

    def write(self, digit: int, left: float, top: float, height: float, rng: np.random.Generator) -> None:
        """Write a digit with the mouse, at a place and of a size given as fractions of the canvas's height."""
        box = self.page.locator("#canvas").bounding_box()
        for skeleton in next(iter(HANDS[digit].values())):
            path = (np.array([left, top]) + height * swing(skeleton, 0, rng)[::3]) * box["height"]
            path += np.array([box["x"], box["y"]])
            self.page.mouse.move(*path[0])
            self.page.mouse.down()
            for x, y in path:
                self.page.mouse.move(x, y)
            self.page.mouse.up()

    def draw_with_finger(self, x: float, top: float = 0.2, bottom: float = 0.8) -> None:
        """Draw a line on a touch screen."""
        session = self.context.new_cdp_session(self.page)
        for step in range(9):
            left, y = self.at(x, top + (bottom - top) * step / 8)
            kind = "touchMove" if step else "touchStart"
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": left, "y": y}]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def sees(self, label: str, selector: str = "#label") -> None:
        """Wait until the page shows this label."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_have_text(label, timeout=10_000)

    def says(self, words: str) -> None:
        """Wait until screen readers are told this."""
        self.sees(words, "#status[aria-live=polite]")

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())

    def ink(self) -> int:
        """The number of inked pixels."""
        count = """canvas => {
            const copy = canvas.cloneNode(), pen = copy.getContext("2d", {willReadFrequently: true});
            pen.drawImage(canvas, 0, 0);
            return pen.getImageData(0, 0, copy.width, copy.height).data.filter((v, i) => i % 4 === 3 && v).length;
        }"""
        return int(self.page.locator("#canvas").evaluate(count))

    def shares(self) -> list[float]:
        """The length of each bar relative to its track, after the animation."""
        self.page.wait_for_timeout(250)
        part = """bars => bars.map(bar => {
            const [track, fill] = [bar, bar.firstChild].map(it => it.getBoundingClientRect());
            return Math.abs(fill.top - track.top) > 1 ? (track.bottom - fill.top) / track.height
                : (fill.right - track.left) / track.width;
        })"""
        return [float(share) for share in self.page.locator(".track").evaluate_all(part)]


@pytest.fixture
def open_tab(browser: Any, server: DrawServer) -> Iterator[Callable[..., Tab]]:
    """Open the page in a tab; finally, no tab has loaded anything external or printed to the console."""
    tabs: list[Tab] = []

    def open_(address: str = server.address, **settings: Any) -> Tab:
        tabs.append(Tab(browser, address, **settings))
        return tabs[-1]

    yield open_
    for tab in tabs:
        tab.context.close()
        assert tab.complaints == []
        for address in tab.asked:
            assert address.startswith(("data:", "http://127.0.0.1:")), address


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_line_drawn_with_the_mouse_is_predicted_on_a_desktop(scheme: str, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(color_scheme=scheme)
    assert tab.text("#label") == PROMPT
    assert tab.shares() == pytest.approx([0] * 10, abs=0.02)
    tab.draw(0.75)
    tab.sees("7")
    assert tab.text("#probability") == "82.0 %"
    assert tab.text(".bars li.first").split() == ["7", "82"]
    assert tab.shares() == pytest.approx([0.82 if number == 7 else 0.02 for number in range(10)], abs=0.02)
    assert tab.page.locator("#network-input").evaluate("it => [it.naturalWidth, it.naturalHeight]") == [28, 28]
    tab.says("7 82.0 %")
    assert tab.page.evaluate("document.documentElement.scrollHeight <= innerHeight")  # no scrolling
    paper, ink = tab.page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.getElementById('canvas')).color]"
    )
    bright = [sum(map(int, re.findall(r"\d+", color)[:3])) > 3 * 128 for color in (paper, ink)]
    assert bright == ([True, False] if scheme == "light" else [False, True])


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_line_drawn_by_touch_is_predicted_on_a_phone_without_scrolling(
    scheme: str, open_tab: Callable[..., Tab]
) -> None:
    tab = open_tab(viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=3, color_scheme=scheme)
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.page.locator("#canvas").evaluate("it => it.width === Math.round(3 * it.getBoundingClientRect().width)")
    tab.page.evaluate("document.body.style.setProperty('padding-bottom', '1000px')")  # there is somewhere to scroll to
    tab.draw_with_finger(0.35, top=0.9, bottom=0.1)
    tab.sees("3")
    assert tab.shares() == pytest.approx([0.82 if number == 3 else 0.02 for number in range(10)], abs=0.02)
    assert tab.page.evaluate("scrollY") == 0
    assert tab.page.locator("#canvas").evaluate("it => getComputedStyle(it).touchAction") == "none"
    tab.page.locator("#clear").tap()
    tab.sees(PROMPT)


@in_a_browser
def test_the_prediction_updates_while_drawing(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.draw(0.05, release=False)
    tab.sees("0")
    tab.page.mouse.move(*tab.at(0.95, 0.8), steps=20)
    tab.sees("3")
    assert tab.text("#status") == PROMPT  # announced only once the pointer is released
    tab.page.mouse.up()
    tab.says("3 82.0 %")


@in_a_browser
@pytest.mark.parametrize(
    ("undo", "clear"), [("button", "button"), ("u", "c"), ("Control+z", "Escape"), ("Meta+z", "c"), ("U", "C")]
)
def test_undo_removes_the_last_stroke_and_clear_removes_all(
    undo: str, clear: str, open_tab: Callable[..., Tab]
) -> None:
    tab = open_tab()

    def do(what: str, key: str) -> None:
        if key == "button":
            tab.page.locator(f"#{what}").click(force=True)  # also one that has nothing to do
        else:
            tab.page.keyboard.press(key)

    do("undo", undo)  # of nothing is nothing
    do("clear", clear)
    tab.draw(0.15)
    tab.sees("1")
    one = tab.ink()
    tab.draw(0.95)
    tab.sees("5")
    both = tab.ink()
    do("undo", undo)
    tab.sees("1")
    assert tab.ink() == one
    tab.draw(0.95)
    tab.sees("5")
    do("clear", clear)
    tab.sees(PROMPT)
    assert tab.shares() == pytest.approx([0] * 10, abs=0.02)
    assert tab.ink() == 0
    assert tab.page.locator("#network-input").get_attribute("src") is None
    tab.says(PROMPT)
    do("undo", undo)  # of clearing too
    tab.sees("5")
    assert tab.ink() == both
    tab.page.keyboard.press("Control+c")  # which copies, and does not clear
    tab.page.wait_for_timeout(100)
    assert tab.ink() == both


@in_a_browser
def test_the_keyboard_reaches_everything_with_a_visible_focus(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.draw(0.15)
    tab.sees("1")
    tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Tab")
    focus = "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
    assert tab.page.evaluate(focus) == ["clear", "solid"]
    tab.page.keyboard.press("Enter")
    tab.sees(PROMPT)
    assert tab.page.evaluate("document.activeElement.id") == "clear"  # a button that has nothing to do keeps the focus
    tab.page.locator("#clear[aria-disabled=true]").wait_for()


@in_a_browser
def test_a_dot_is_drawn_but_is_not_a_digit(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.page.mouse.click(*tab.at(0.5, 0.5))
    tab.sees("No digit found")
    assert tab.ink() > 100
    assert tab.text("#probability") == ""
    assert tab.shares() == pytest.approx([0] * 10, abs=0.02)
    tab.page.mouse.click(*tab.at(0.2, 0.5), button="right")
    tab.page.locator("#undo[aria-disabled=false]").wait_for()
    tab.page.keyboard.press("u")
    tab.sees(PROMPT)  # the other button has drawn nothing


@in_a_browser
def test_several_digits_are_listed_and_boxed(open_tab: Callable[..., Tab]) -> None:
    with serving(number("2026")) as server:
        tab = open_tab(server.address)
        bars, tiles, boxes = tab.page.locator("#classes"), tab.page.locator("#digits li"), tab.page.locator("#boxes i")
        assert tab.page.evaluate("[sent.width, sent.height]") == [420, 280]
        tab.draw(0.125)
        tab.sees("2")
        assert boxes.count() == tiles.count() == 0
        for place, text in ((0.375, "20"), (0.625, "202"), (0.875, "2026")):
            tab.draw(place)
            tab.sees(text)
        tab.says("2026, lowest 94.0 %")
        assert tab.text("#probability") == "94.0 %"
        assert tab.text("#second") == "lowest of 4 digits"
        tab.page.locator("#seen").wait_for(state="hidden")
        bars.wait_for(state="hidden")
        assert [tile.split() for tile in tiles.all_inner_texts()] == [
            [label, share, "%"] for label, share in zip("2026", ("97", "96", "95", "94"), strict=True)
        ]
        inputs = tab.page.locator("#digits img")
        assert inputs.evaluate_all("all => all.map(it => [it.naturalWidth, it.naturalHeight])") == [[28, 28]] * 4
        canvas = tab.page.locator("#canvas").bounding_box()
        for place, box in zip((0.125, 0.375, 0.625, 0.875), boxes.all(), strict=True):
            found, pen = box.bounding_box(), 0.06 * canvas["height"]
            drawn = {"width": pen, "height": 0.6 * canvas["height"] + pen}  # round ends
            drawn |= {"x": canvas["x"] + place * canvas["width"] - pen / 2, "y": tab.at(0, 0.2)[1] - pen / 2}
            assert found == pytest.approx(drawn, abs=4)
        tab.page.keyboard.press("u")
        tab.sees("202")
        tab.page.keyboard.press("c")
        tab.sees(PROMPT)
        assert boxes.count() == tiles.count() == 0
        bars.wait_for(state="visible")
        tab.context.close()


@in_a_browser
def test_a_digit_that_may_be_wrong_is_marked_in_words(open_tab: Callable[..., Tab]) -> None:
    for text, said in (("7", "7 40.0 %, not sure"), ("47\n11", "47, 11, lowest 40.0 %, not sure of 1")):
        with serving(number(text, unsure=len(text) // 4)) as server:
            tab = open_tab(server.address)
            tab.draw_cells(text)
            tab.says(said)
            assert tab.text("#note") == said.partition("%, ")[2]
            if len(text) > 1:
                assert tab.text("#label .unsure") == "7"
                assert [tile.split()[3:] for tile in tab.page.locator("#digits li").all_inner_texts()] == [
                    ["not", "sure"] if place == 1 else [] for place in range(4)
                ]
            tab.context.close()


@in_a_browser
def test_the_reason_for_no_digit_is_shown(open_tab: Callable[..., Tab]) -> None:
    with serving(lambda picture: answered(reason="digits touch each other")) as server:
        tab = open_tab(server.address)
        tab.draw(0.5)
        tab.says("Digits touch each other")
        assert tab.text("#label") == "Digits touch each other"
        tab.context.close()


@in_a_browser
def test_nothing_overflows_or_moves_with_up_to_twelve_digits_in_any_window(open_tab: Callable[..., Tab]) -> None:
    outside = """[...document.querySelectorAll(".card :not(.track i)")].filter(it => {
        const box = it.getBoundingClientRect(), card = it.closest(".card").getBoundingClientRect();
        return box.width && (box.left < card.left || box.right > card.right || box.top < card.top
            || box.bottom > card.bottom);
    }).map(it => it.outerHTML)"""
    places = """["#canvas", ".draw", ".answer", ".bars"].map(it => {
        const {left, top, right, bottom} = document.querySelector(it).getBoundingClientRect();
        return [left, top, right, bottom];
    })"""
    scrolls = """[document.documentElement, document.getElementById("digits")].filter(
        it => it.scrollWidth > it.clientWidth || it.scrollHeight > it.clientHeight).map(it => it.id || "page")"""
    answers = [number("1")]
    with serving(lambda picture: answers[-1](picture)) as server:
        tab = open_tab(server.address)
        for width, height in ((390, 844), (844, 390), (1280, 800), (1920, 1080)):
            tab.page.set_viewport_size({"width": width, "height": height})
            before = tab.page.evaluate(places)
            for text in ("7", "2026", "314159265358", "314159\n265358"):
                answers.append(number(text, unsure=0))
                tab.draw_cells(text)
                tab.sees(text)
                assert tab.page.evaluate(outside) == [], (width, text)
                assert tab.page.evaluate(scrolls) == [], (width, text)
                assert tab.page.evaluate(places) == before, (width, text)
                tab.page.keyboard.press("c")
                tab.sees(PROMPT)
        tab.context.close()


@in_a_browser
def test_a_line_that_leaves_the_canvas_ends_when_the_button_is_released(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.draw(0.25, bottom=0.95, release=False)
    tab.page.mouse.move(*tab.at(0.25, 1.3), steps=4)
    tab.page.mouse.up()
    tab.sees("2")
    ink = tab.ink()
    tab.page.mouse.move(*tab.at(0.9, 0.5), steps=8)  # without a button
    tab.page.wait_for_timeout(100)
    assert tab.ink() == ink
    assert tab.page.evaluate("getSelection().toString()") == ""


@in_a_browser
def test_two_tabs_are_independent(open_tab: Callable[..., Tab]) -> None:
    one, other = open_tab(), open_tab()
    one.draw(0.25, release=False)
    other.draw(0.75, release=False)
    one.sees("2")
    other.sees("7")
    one.page.mouse.up()
    one.page.keyboard.press("c")
    other.page.mouse.move(*other.at(0.75, 0.1), steps=4)
    one.sees(PROMPT)
    other.sees("7")
    other.page.mouse.up()
    other.says("7 82.0 %")


@in_a_browser
def test_one_request_at_a_time_and_outdated_answers_are_dropped(
    open_tab: Callable[..., Tab],
) -> None:
    asked: list[bytes] = []
    may_answer = threading.Event()

    def waiting(picture: bytes) -> dict[str, Any]:
        asked.append(picture)
        assert may_answer.wait(10)
        return band(picture)

    with serving(waiting) as server:
        tab = open_tab(server.address)
        tab.draw(0.25)
        tab.draw(0.95)
        tab.draw(0.95, top=0.1, bottom=0.9)
        tab.page.wait_for_timeout(300)
        assert len(asked) == 1  # the other lines wait for the answer
        with tab.page.expect_response("**/answer") as answered:
            tab.page.keyboard.press("c")
            tab.sees(PROMPT)
            may_answer.set()
        answered.value.finished()
        tab.page.wait_for_timeout(200)
        assert tab.text("#label") == PROMPT  # the answer to what was cleared came too late
        assert tab.shares() == pytest.approx([0] * 10, abs=0.02)
        assert len(asked) == 1  # and nobody asks about an empty paper

        may_answer.clear()
        tab.draw(0.25)
        tab.draw(0.95)
        with tab.page.expect_response("**/answer"):
            tab.page.keyboard.press("u")
            may_answer.set()
        tab.sees("2")
        may_answer.clear()
        tab.draw(0.9)
        tab.draw(0.8)
        may_answer.set()
        tab.sees("6")  # of all three: what was drawn last has its answer
        assert band(asked[-1])["label"] == "6"
        tab.page.wait_for_timeout(100)
        count = len(asked)
        tab.page.wait_for_timeout(300)
        assert len(asked) == count  # nothing is asked while nothing is drawn


@in_a_browser
def test_the_page_reports_a_lost_server_and_reconnects(browser: Any) -> None:
    with serving() as server:
        port = server.server_address[1]
        tab = Tab(browser, server.address)
        tab.draw(0.25)
        tab.sees("2")
    tab.draw(0.95)
    notice = tab.page.locator("#notice")
    notice.wait_for(state="visible")
    assert "The server does not respond" in tab.text("#notice")
    assert notice.get_attribute("role") == "alert"
    with serving(port=port):
        notice.wait_for(state="hidden")
        tab.sees("5")  # the last stroke has its answer after all
    tab.context.close()


@in_a_browser
def test_the_page_shows_server_errors(browser: Any) -> None:
    def broken(picture: bytes) -> dict[str, Any]:
        raise UserError("this picture is of no use")

    with serving(broken) as server:
        tab = Tab(browser, server.address)
        tab.draw(0.25)
        tab.page.locator("#notice").wait_for(state="visible")
        assert "(400): this picture is of no use" in tab.text("#notice")
        tab.context.close()


@in_a_browser
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_digits_and_numbers_drawn_with_the_mouse_are_read_by_the_included_model(
    viewport: dict[str, int], browser: Any
) -> None:
    model, rng = load("digits"), np.random.default_rng(0)
    with serving_process("-m", "mnist", "draw", "--model", "digits", "--port", "0") as (_, address):
        tab = Tab(browser, address, viewport=viewport)
        for digit in HANDS:
            tab.page.keyboard.press("c")
            tab.sees(PROMPT)
            tab.write(digit, 0.5, 0.2, 0.6, rng)
            tab.sees(str(digit))
            while not tab.page.evaluate("shown !== null && shown.about === drawn"):
                tab.page.wait_for_timeout(20)
            sent = tab.page.evaluate("picture().then(it => it.arrayBuffer()).then(it => [...new Uint8Array(it)])")
            expected = model.predict(read_image(bytes(sent)))
            told = dict(zip(model.class_names, tab.page.evaluate("shown.probabilities"), strict=True))
            assert told == pytest.approx(expected.probabilities, abs=1e-5)
            assert tab.page.locator("#network-input").get_attribute("src") == picture(expected.network_input)
        tab.page.keyboard.press("c")
        for index, digit in enumerate((4, 0, 7)):
            tab.write(digit, 0.12 + 0.45 * index, 0.25, 0.45, rng)
        tab.sees("407")
        tab.context.close()
    assert tab.complaints == []
    assert all(it.startswith((address, "data:")) for it in tab.asked)


@in_a_browser
def test_many_long_and_hostile_names_fit(open_tab: Callable[..., Tab]) -> None:
    names = [f"{HOSTILE} {number}" for number in range(47)]
    digit = {"label": names[3], "probability": 0.9999, "confident": True, "box": None, "network_input": ""}
    told = answered([digit], [0.9999] + [0.0] * 46)
    with serving(lambda picture: told, class_names=names, title=HOSTILE, numbers=False) as server:
        for viewport in (DESK, PHONE):
            tab = open_tab(server.address, viewport=viewport)
            assert tab.page.title() == HOSTILE
            assert tab.text("h1") == HOSTILE
            tab.draw(0.25)
            tab.sees(names[3])
            assert tab.text("#probability") == "> 99.9 %"
            assert tab.page.locator(".bars li").count() == 47
            assert tab.page.evaluate("[sent.width, sent.height, canvas.width / canvas.height]") == [280, 280, 1]
            assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            tab.context.close()  # before the server goes, which it may be about to ask once more
