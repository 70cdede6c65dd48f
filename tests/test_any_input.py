"""Whatever stands in a file that is read back, or in a variable that is honored: it is used, or refused in a message.

Hypothesis makes the inputs up, the same ones every time. Nothing but the project's own errors may come out.
"""

import base64
import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from entrypoint import UsageError, exit_code, plan
from healthcheck import verdict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mnist.config.command_line import parse_command_line
from mnist.config.recipes import RECIPES
from mnist.config.settings import TrainConfig
from mnist.data.datasets import load_dataset, read_idx
from mnist.data.folders import find_files
from mnist.data.images import read_image
from mnist.errors import ConfigError, ImageError, UserError
from mnist.launch.processes import FLAGS, RANK_OF, check_environment, check_values
from mnist.models.networks import Net
from mnist.models.saved import ModelConfig, load_model, save_model
from mnist.reporting.report import duration, render, write_pictures
from mnist.runs.folder import find_run_here
from mnist.runs.record import Record, pixels, read_state
from mnist.training.checkpoint import DamagedError, checksum, read_whole
from tests.data.test_folders import write_images
from tests.support.made_up import make_run

each = settings(
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
few = settings(each, max_examples=20)
T = TypeVar("T")
TEXT = st.text(max_size=12)
EXTREME = st.sampled_from([10**30, -(10**400), 1e308, float("inf")])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | EXTREME
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=8)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file cut off, with other bytes in it, or with something else in its place."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "other", "json"]))
    place = draw(st.integers(0, len(content)))
    match kind:
        case "cut":
            return content[:place]
        case "flip":
            return content[:place] + bytes(255 - byte for byte in content[place : place + 4]) + content[place + 4 :]
        case "insert":
            return content[:place] + draw(st.binary(max_size=20)) + content[place:]
        case "other":
            return draw(st.binary(max_size=60))
    return json.dumps(draw(JSON)).encode()


@st.composite
def with_another_value(draw: st.DrawFn, known: dict[str, Any]) -> dict[str, Any]:
    """Named values of which one, anywhere in them, is another one."""
    changed: dict[str, Any] = json.loads(json.dumps(known))
    container: Any = changed
    while True:
        key = draw(st.sampled_from(sorted(container) if isinstance(container, dict) else range(len(container))))
        inner = container[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
            container[key] = draw(JSON)
            return changed
        container = inner


def outcome(action: Callable[[], T], *refusals: type[BaseException]) -> tuple[T | None, str]:
    """What an action returns, or the message with which it refuses."""
    try:
        return action(), ""
    except refusals as error:
        return None, str(error) or type(error).__name__


def any_json(known: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A file of named values, damaged or with another value in it."""
    content = json.dumps(known).encode()
    changed = with_another_value(known).map(lambda values: json.dumps(values).encode())
    # infinity, as it can be written without its name
    return damaged(content) | changed | changed.map(lambda text: text.replace(b"Infinity", b"1e999"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(Net(), tmp_path / "model", ModelConfig("mlp", tuple("0123456789"), (28, 28), "mnist", 1, "digit"))
    return tmp_path / "model"


@each
@given(data=st.data())
def test_settings(data: st.DataObject, tmp_path: Path) -> None:
    path, known = tmp_path / "config.yaml", TrainConfig(run_name="x").to_yaml().encode()
    values = {"epochs": 3, "dataset": "mnist", "learning_rate": 0.1, "seed": 0, "augment": False, "run_name": "x"}
    path.write_bytes(data.draw(damaged(known) | any_json(values)))
    config, refusal = outcome(lambda: TrainConfig.load(path), ConfigError)
    assert config is not None or refusal.startswith(str(path))


@few
@given(words=st.lists(st.sampled_from(["--epochs", "--epochs=3", "--augment", "--seed=5"]) | TEXT, max_size=4))
def test_command_lines(words: list[str]) -> None:
    config, refusal = outcome(lambda: parse_command_line(RECIPES, words), ConfigError, SystemExit)
    assert config is not None or refusal in ("0", "2") or refusal.startswith("--")


@each
@given(data=st.data())
def test_models(data: st.DataObject, model: Path) -> None:
    path = model / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    kept = path.read_bytes()
    path.write_bytes(data.draw(any_json(json.loads(kept)) if path.suffix == ".json" else damaged(kept)))
    loaded, refusal = outcome(lambda: load_model(model), UserError)
    path.write_bytes(kept)
    assert loaded is not None or (refusal and "\n" not in refusal)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


IMAGES = [encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA")]


@settings(each, max_examples=200)
@given(content=st.sampled_from(IMAGES).flatmap(damaged))
def test_images(content: bytes) -> None:
    image, refusal = outcome(lambda: read_image(content), ImageError)
    assert image.mode in ("L", "RGB") if image is not None else "\n" not in refusal


@each
@given(start=st.sampled_from([b"", b"\0\0\x08\x01", b"\0\0\x08\x03"]), rest=st.binary(max_size=40))
def test_idx_files(start: bytes, rest: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(start + rest)
    found, refusal = outcome(lambda: read_idx(tmp_path / "x"), UserError)
    assert found is not None or str(tmp_path) in refusal


@each
@given(data=st.data())
def test_runs(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if not folder.exists():
        make_run(folder, classes=3, epochs=2)
        (folder / "environment.json").write_text(json.dumps({"device": "cpu", "parameters": 5}))
    names = ("config.yaml", "state.json", "metrics.jsonl", "evaluation.json", "environment.json")
    path = folder / data.draw(st.sampled_from(names))
    kept = path.read_bytes()
    *others, last = kept.splitlines(keepends=True) if path.suffix == ".jsonl" else [kept]
    changed = any_json(json.loads(last)) if path.suffix in (".json", ".jsonl") else damaged(kept)
    path.write_bytes(b"".join([*others, data.draw(changed), *([b"\n"] if others else [])]))
    record, refusal = outcome(lambda: Record.read(folder), ConfigError)
    path.write_bytes(kept)
    assert record is not None or refusal.startswith(str(folder))
    if record is not None:
        assert record.status.isprintable()
        assert duration(record.seconds)
        if data.draw(st.integers(0, 24)) == 0:  # drawing takes long
            assert render([record])
            write_pictures(record)


@each
@given(data=st.data())
def test_pictures_of_runs(data: st.DataObject) -> None:
    content = data.draw(st.sampled_from(IMAGES).flatmap(damaged))
    image, _ = outcome(lambda: pixels(f"data:image/png;base64,{base64.b64encode(content).decode()}"), ValueError)
    assert image is None or image.format in ("PNG", "JPEG")


STATE = {"status": "running", "process": "1 on here", "time": "2026-11-24T12:00:00+0000", "step": 5, "exit_code": None}


@each
@given(data=st.data(), status=st.sampled_from(["running", "failed"]))
def test_states_of_runs(data: st.DataObject, status: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / "state.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data.draw(any_json(STATE | {"status": status})))
    healthy, reason = verdict(tmp_path, "here", 0, 60)
    assert healthy in (True, False)
    assert reason
    assert exit_code(read_state(path), 3, []) in range(256)


@each
@given(content=JSON | st.binary(max_size=30))
def test_states_of_others(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "foreign" / "state.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert find_run_here(TrainConfig(output_dir=str(tmp_path)), ()).resume is None
    assert exit_code(read_state(path), 3, []) == 3


@each
@given(data=st.data())
def test_checkpoints(data: st.DataObject, tmp_path: Path) -> None:
    folder, names = tmp_path / "step-1", ("model.safetensors", "optimizer.safetensors", "state.json")
    shutil.rmtree(folder, ignore_errors=True)
    save_model(Net(), folder, ModelConfig("mlp", tuple("0123456789"), (28, 28), "mnist"))
    (folder / "config.json").rename(folder / "state.json")
    shutil.copy(folder / "model.safetensors", folder / "optimizer.safetensors")
    manifest = {name: checksum((folder / name).read_bytes()) for name in names}
    chosen = data.draw(st.sampled_from([*names, "manifest.json"]))
    if chosen != "manifest.json":
        (folder / chosen).write_bytes(data.draw(damaged((folder / chosen).read_bytes())))
        if data.draw(st.booleans()):  # by somebody who knows how
            manifest[chosen] = checksum((folder / chosen).read_bytes())
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(data.draw(any_json(manifest)) if chosen == "manifest.json" else content)
    files, refusal = outcome(lambda: read_whole(folder), DamagedError)
    assert set(files) >= set(names) if files is not None else refusal


@few
@given(data=st.data())
def test_caches(data: st.DataObject, tmp_path: Path) -> None:
    pets = tmp_path / "pets"
    if not pets.exists():
        for number, name in enumerate(("cat", "dog")):
            write_images(pets / name, 3, first=10 * number, side=8)
    expected = load_dataset(str(pets), tmp_path).train.images[:]
    (cache,) = (tmp_path / "cache").glob("*.u8")
    content = data.draw(damaged(cache.read_bytes()))
    cache.unlink()  # what is mapped stays as it is
    cache.write_bytes(content)
    after = load_dataset(str(pets), tmp_path)
    images, refusal = outcome(lambda: after.train.images[:], UserError)
    cache.unlink()
    assert torch.equal(images, expected) if images is not None else "does not match its checksum" in refusal


@each
@given(paths=st.lists(st.tuples(NAMES, NAMES, NAMES, st.booleans()), max_size=6))
def test_layouts(paths: list[tuple[str, str, str, bool]], tmp_path: Path) -> None:
    top = tmp_path / "data"
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir()
    for first, second, third, deep in paths:
        place = top / first / second / f"{third}.png" if deep else top / first / f"{second}.png"
        with contextlib.suppress(OSError):  # names in the way of each other
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    folder, refusal = outcome(lambda: find_files(top), UserError)
    if folder is None:
        assert refusal.startswith("--dataset ")
        return
    real = [os.path.realpath(top / file.name) for file in folder.files]
    assert len(set(real)) == len(real)
    assert {file.label for file in folder.files} <= set(range(len(folder.class_names)))
    assert all(name.isprintable() for name in folder.class_names)


NUMBERS = st.sampled_from(["0", "1", "2", "-1", "abc", "", "9" * 5000, "1.5", "\u0663"]) | TEXT
OF_LAUNCHERS = [*RANK_OF, *RANK_OF.values(), "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP"]
OF_LAUNCHERS += [*FLAGS, "ACCELERATE_TORCH_DEVICE", "ACCELERATE_DYNAMO_BACKEND"]
OF_CONTAINERS = ["NUM_PROCESSES", "MIXED_PRECISION", "PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK"]


@settings(each, max_examples=300)
@given(
    environment=st.dictionaries(st.sampled_from(OF_LAUNCHERS), NUMBERS, max_size=5),
    device=st.sampled_from([("cpu", 0), ("cuda", 2)]),
)
def test_variables_of_launchers(environment: dict[str, str], device: tuple[str, int]) -> None:
    _, refusal = outcome(lambda: check_environment(environment, *device), ConfigError)
    _, odd = outcome(lambda: check_values(environment), ConfigError)
    assert not odd or any(name in odd for name in environment)
    assert not refusal or any(name in refusal for name in environment) or "FSDP" in refusal


@settings(each, max_examples=300)
@given(environment=st.dictionaries(st.sampled_from(OF_CONTAINERS), NUMBERS, max_size=4), visible=st.integers(0, 4))
def test_variables_of_containers(environment: dict[str, str], visible: int) -> None:
    planned, refusal = outcome(lambda: plan([], environment, visible), UsageError)
    assert planned is not None or any(name in refusal for name in environment)
