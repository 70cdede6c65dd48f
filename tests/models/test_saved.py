"""Damaged model folders: one message, whatever the damage."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mnist.cli import main
from mnist.errors import UserError
from mnist.models.networks import Net
from mnist.models.saved import ModelConfig, load_model, save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(Net(), tmp_path / "model", ModelConfig("mlp", tuple("0123456789"), (28, 28), "mnist", 1, "digit"))
    return tmp_path / "model"


def with_values(**values: Any) -> Callable[[Path], None]:
    """Change values of config.json; None removes one."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        known = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in known.items() if value is not None}))

    return change


def with_bytes(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def with_pipe(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 240000\n"
PAGE = b"<!DOCTYPE html><html><body>404: not found</body></html>"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_bytes("model.safetensors", POINTER), "a Git LFS pointer, not the weights"),
        (with_bytes("model.safetensors", b""), "an empty file"),
        (with_bytes("model.safetensors", PAGE), "truncated, or in another format"),
        (with_bytes("model.safetensors", b"\xff" * 64), "truncated, or in another format"),
        (truncated, "truncated, or in another format"),
        (with_pipe("model.safetensors"), "not a regular file"),
        (with_tensors(lambda it: it.pop("fc1.weight")), "does not match config.json: .*fc1.weight"),
        (with_tensors(lambda it: it.update(more=torch.zeros(1))), "does not match config.json"),
        (with_tensors(lambda it: it.update({"fc4.bias": torch.zeros(9)})), "size mismatch for fc4.bias"),
        (with_tensors(lambda it: it["fc2.bias"].fill_(float("nan"))), "the weights fc2.bias contain NaN or infinity"),
        (with_bytes("config.json", b""), "not a valid model description"),
        (with_bytes("config.json", PAGE), "not a valid model description"),
        (with_bytes("config.json", b"\xff\xfe"), "not a valid model description"),
        (with_bytes("config.json", b"[" * 100_000), "not a valid model description"),
        (with_bytes("config.json", b"[]"), "not a valid model description"),
        (with_bytes("config.json", b"null"), "not a valid model description"),
        (with_pipe("config.json"), "not a regular file"),
        (with_values(architecture=None), "not a valid model description .KeyError: 'architecture'"),
        (with_values(architecture=7), "7 is not a string"),
        (with_values(architecture="no-such"), "config.json: --model no-such"),
        (with_values(class_names=None), "KeyError: 'class_names'"),
        (with_values(class_names=5), "not a valid model description"),
        (with_values(class_names=[]), "0 classes"),
        (with_values(class_names=[1, 2]), "1 is not a string"),
        (with_values(class_names=["a", "b"]), "size mismatch"),
        (with_values(image_size=None), "KeyError: 'image_size'"),
        (with_values(image_size=[28]), "not a valid model description"),
        (with_values(image_size="2828"), "a side of '2' pixels"),
        (with_values(image_size=[1_000_000, 1_000_000]), "a side of 1000000 pixels; must be 1 to 1,024"),
        (with_values(image_size=[0, 28]), "a side of 0 pixels"),
        (with_values(image_size=[28.5, 28]), "a side of 28.5 pixels"),
        (with_values(image_size=[14, 14]), "size mismatch"),
        (with_values(channels=2), "not a valid model description"),
        (with_values(channels=3), "size mismatch"),
        (with_values(dataset=None), "KeyError: 'dataset'"),
        (with_values(scale=[1]), "not a valid model description"),
        (with_values(scale=[7, 7]), "a scale from 7.0 to 7.0"),
        (with_values(scale=["nan", "inf"]), "a scale from nan to inf"),
        (with_values(normalized=True), "does not match config.json"),
    ],
)
def test_a_damaged_model_is_an_error_of_one_line(
    damage: Callable[[Path], None], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_model(folder)
    (tmp_path / "x.png").write_bytes(b"")
    assert main(["predict", str(tmp_path / "x.png"), "--model", str(folder)]) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mnist predict: ")


def test_control_characters_in_a_models_names_are_escaped(folder: Path) -> None:
    with_values(class_names=["\x1b[2J\x1b[Hhacked", *"123456789"], dataset="\x1b]0;title\x07")(folder)
    _, config = load_model(folder)
    assert config.class_names[0] == r"\x1b[2J\x1b[Hhacked"
    assert config.dataset == r"\x1b]0;title\x07"
