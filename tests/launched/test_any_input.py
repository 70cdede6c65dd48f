"""The commands, started on files and variables that are damaged or hostile: each ends with a code that is documented,
without a traceback, and within the time and the memory that docs/reliability.md states.
"""

import base64
import functools
import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from mnist.config.settings import PROJECT_FOLDER
from mnist.data.datasets import FILES
from mnist.launch.signals import EXIT_CODES
from tests.conftest import user_environment
from tests.data.test_images import png_claiming
from tests.test_any_input import NUMBERS, OF_CONTAINERS, OF_LAUNCHERS, any_json, damaged, each

pytestmark = pytest.mark.slow

MORE_SECONDS, MORE_MEBIBYTES, MEBIBYTES_OF_A_PICTURE = 10, 256, 2304  # docs/reliability.md
started = settings(each, phases=[Phase.generate])  # the first failure is told as it is: each takes seconds
FLAGS = ("--limit-train-images=100", "--limit-test-images=100", "--epochs=1", "--trackers=none", "--timeout-seconds=3")
# In a process of its own, which is small: what a process has before it becomes another counts as the other's memory.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
COMMANDS = {
    "runs": "-m mnist runs {run}/..",
    "report": "-m mnist report {run}",
    "predict": "-m mnist predict --model {run} {run}/image",
    "stdin": "-m mnist predict --model {run} -",
    "evaluate": "-m mnist evaluate --model {run}",
    "resume": "train.py --resume {run} --epochs=2",
    "healthcheck": "docker/healthcheck.py 60 {run}/..",
    "entrypoint": "docker/entrypoint.py --resume {run} --epochs=2",
    "idx": f"train.py --dataset=kmnist --data-dir={{run}} --output-dir={{run}}/runs {' '.join(FLAGS)}",
    "variables": f"train.py --output-dir={{run}}/runs {' '.join(FLAGS)}",
}
READ_BY = {
    "config.yaml": ("runs", "report", "evaluate", "resume"),
    "state.json": ("runs", "report", "resume", "healthcheck", "entrypoint"),
    "metrics.jsonl": ("runs", "report", "resume"),
    "evaluation.json": ("report", "resume"),
    "environment.json": ("report", "evaluate", "resume"),
    "model/config.json": ("predict", "evaluate"),
    "model/model.safetensors": ("predict", "evaluate"),
    "checkpoints/*/state.json": ("resume", "entrypoint"),
    "checkpoints/*/manifest.json": ("resume",),
    "image": ("predict",),
}


class Ended(NamedTuple):
    code: int
    seconds: float  # of computing: the machine may be busy with other things
    mebibytes: int
    output: str


def start(command: str, run: Path, stdin: str = os.devnull, **variables: str) -> Ended:
    words = COMMANDS[command].format(run=run).split()
    with open(stdin, "rb") as source:
        environment = user_environment(run.parent, **variables)
        job = [sys.executable, "-c", MEASURE, *words]
        kept: dict[str, Any] = {"cwd": PROJECT_FOLDER, "env": environment, "stdin": source, "capture_output": True}
        ended = subprocess.run(job, timeout=120, text=True, errors="replace", check=False, **kept)
    errors, _, figures = ended.stderr.rstrip("\n").rpartition("\n")
    seconds, mebibytes = figures.split()
    return Ended(ended.returncode, float(seconds), int(mebibytes), ended.stdout + errors)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and in its folder an image."""
    parent = tmp_path_factory.mktemp("good")
    command = [sys.executable, "train.py", *FLAGS, f"--output-dir={parent}", "--run-name=good"]
    subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, check=True)
    Image.new("L", (28, 28)).save(parent / "good" / "image", format="PNG")
    return parent / "good"


@functools.cache
def of_good_input(command: str, good: Path) -> Ended:
    run = good.parent / f"for {command}".replace(" ", "-") / "good"
    shutil.copytree(good, run)
    if command == "idx":
        shutil.copytree(PROJECT_FOLDER / "data" / "MNIST", run / "KMNIST")
    ended = start(command, run, stdin=str(run / "image"))
    assert ended.code == 0, ended.output
    return ended


def check(ended: Ended, command: str, good: Path, more: int = MORE_MEBIBYTES) -> None:
    usual = of_good_input(command, good)
    assert ended.code in {0, 1, 2, *EXIT_CODES.values()}, ended.output
    assert "Traceback" not in ended.output, ended.output
    assert ended.seconds < usual.seconds + MORE_SECONDS, ended.output
    assert ended.mebibytes < usual.mebibytes + more, ended.output


def copied(good: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(good, place / "run"))


@settings(started, max_examples=20)
@given(data=st.data(), name=st.sampled_from(sorted(READ_BY)))
def test_commands_on_damaged_files(data: st.DataObject, name: str, good: Path, tmp_path: Path) -> None:
    run = copied(good, tmp_path / "runs")
    (path,) = run.glob(name)
    content = path.read_bytes()
    path.write_bytes(data.draw(any_json(json.loads(content)) if path.suffix == ".json" else damaged(content)))
    command = data.draw(st.sampled_from(READ_BY[name]))
    check(start(command, run), command, good)


@settings(started, max_examples=8)
@given(
    names=st.sampled_from([("variables", OF_LAUNCHERS), ("entrypoint", OF_CONTAINERS)]),
    values=st.lists(NUMBERS.filter(lambda value: "\0" not in value), min_size=4, max_size=4),
    data=st.data(),
)
def test_commands_with_variables(
    names: tuple[str, list[str]], values: list[str], data: st.DataObject, good: Path, tmp_path: Path
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(names[1]), min_size=1, max_size=4, unique=True))
    variables = dict(zip(chosen, values, strict=False))
    check(start(names[0], copied(good, tmp_path / "runs"), **variables), names[0], good)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def in_json(**values: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | values).encode()


def wide_webp() -> bytes:
    """An animation of small pictures on 64 million pixels, in 160 bytes."""
    frame = Image.new("RGBA", (16, 16), (1, 2, 3, 4))
    content = saved(frame, "WEBP", save_all=True, append_images=[Image.new("RGBA", (16, 16))], lossless=True)
    return content[:24] + 2 * struct.pack("<I", 7999)[:3] + content[30:]


def tiff_of_one_tile(side: int) -> bytes:
    """A picture of 10 x 10 pixels in a tile that is far larger."""
    tile = zlib.compress(bytes(side * side))
    values = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(tile)}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + struct.pack("<H", len(values)) + tags + bytes(4)


def with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def with_picture(content: bytes) -> bytes:
    evaluation = json.loads(content)
    address = base64.b64encode(png_claiming(13_000, 13_000)).decode()
    evaluation["examples"][0]["image"] = f"data:image/png;base64,{address}"
    return json.dumps(evaluation).encode()


MANY = b"{%s}" % b",".join(
    b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(300_000)
)
MERGED = b"a: &a {b: 1}\n" + b"".join(
    b"%c: &%c {<<: [%s]}\n" % (it, it, b", ".join([b"*%c" % (it - 1)] * 9)) for it in b"bcdefghij"
)
HUGE = b'{"a":{"dtype":"F32","shape":[0,4000000000,4000000000],"data_offsets":[0,0]}}'
LARGE = {"architecture": "vgg19", "image_size": [1024, 1024], "channels": 3, "class_names": ["x"] * 50_000}
IDX = f"KMNIST/raw/{FILES[0]}"
HOSTILE: dict[str, tuple[str, str, Callable[[bytes], bytes] | None]] = {  # None: gigabytes of zeros, on no disk
    "settings without end": ("runs", "config.yaml", None),
    "a long config.yaml": ("report", "config.yaml", lambda _: b"x: 1\n" * 400_000),
    "merged again and again": ("report", "config.yaml", lambda _: MERGED),
    "a number of 10,000 digits": ("resume", "config.yaml", lambda it: it + b"epochs: 0x" + b"f" * 9999),
    "a state without end": ("runs", "state.json", None),
    "a heart without end": ("healthcheck", "state.json", None),
    "deep values": ("runs", "state.json", lambda _: b"[" * 1_000_000),
    "figures without end": ("runs", "metrics.jsonl", None),
    "an infinite figure": ("report", "metrics.jsonl", lambda it: it + b'{"step": 1, "test/loss": 1e999}\n'),
    "a large picture": ("report", "evaluation.json", with_picture),
    "a description without end": ("predict", "model/config.json", None),
    "images of a million pixels": ("predict", "model/config.json", in_json(image_size=[1024, 1024], channels=3)),
    "a large network": ("predict", "model/config.json", in_json(**LARGE)),
    "weights without end": ("predict", "model/model.safetensors", None),
    "300,000 tensors": ("predict", "model/model.safetensors", lambda _: with_header(MANY)),
    "a tensor of no size and many": ("predict", "model/model.safetensors", lambda _: with_header(HUGE)),
    "a checkpoint without end": ("resume", "checkpoints/*/optimizer.safetensors", None),
    "a picture without end": ("predict", "image", None),
    "a picture of many pixels": ("predict", "image", lambda _: saved(Image.new("RGBA", (8000, 8000)), "PNG")),
    "an animation of many pixels": ("predict", "image", lambda _: wide_webp()),
    "a large tile": ("predict", "image", lambda _: tiff_of_one_tile(20_000)),
    "a gigabyte, compressed": ("idx", f"{IDX}.gz", lambda _: gzip.compress(bytes(2**30), 1)),
    "an idx file of many dimensions": ("idx", f"{IDX}.gz", lambda _: gzip.compress(b"\0\0\x08\xff" + bytes(1020))),
    "an idx file without end": ("idx", f"{IDX}.gz", None),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_commands_on_what_asks_for_much(name: str, good: Path, tmp_path: Path) -> None:
    command, place, change = HOSTILE[name]
    run = copied(good, tmp_path / "runs")
    if command == "idx":
        shutil.copytree(PROJECT_FOLDER / "data" / "MNIST", run / "KMNIST")
    (path,) = run.glob(place)
    if change is None:
        os.truncate(path, 8 << 30)
    else:
        path.write_bytes(change(path.read_bytes()))
    ended = start(command, run)
    check(ended, command, good, MEBIBYTES_OF_A_PICTURE if "many pixels" in name else MORE_MEBIBYTES)


@pytest.mark.parametrize(("command", "variables"), [("stdin", {}), ("entrypoint", {"WANDB_API_KEY_FILE": "/dev/zero"})])
def test_commands_on_a_stream_without_end(command: str, variables: dict[str, str], good: Path, tmp_path: Path) -> None:
    more = 1024 if command == "stdin" else MORE_MEBIBYTES
    check(start(command, copied(good, tmp_path / "runs"), "/dev/zero", **variables), command, good, more)
