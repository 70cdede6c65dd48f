"""What a person sees, and the pictures of a run."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mnist.data import ImageData
from mnist.report import draw_curves, draw_prediction
from mnist.terminal import Terminal, draw_image


def test_a_digit_in_characters_shows_its_ink(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    seven = digits.test.images[0]
    lines = draw_image(seven).splitlines()
    assert 8 <= len(lines) <= 14
    assert all(len(line) <= 28 for line in lines)
    assert "█" in lines[1]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert draw_image(seven).isascii()
    assert draw_image(torch.zeros(28, 28, dtype=torch.uint8)) == ""


def test_where_there_is_no_terminal_lines_come_at_intervals_and_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(prints=True, epochs=3)
    terminal.start_epoch(1, 1000)
    for _ in range(100):
        terminal.step()
    terminal.report(0.5, 12345.6)
    assert capsys.readouterr().out == ""  # too soon
    monkeypatch.setattr(Terminal, "SECONDS_BETWEEN_LINES", 0.0)
    terminal.report(0.5, 12345.6)
    terminal.end_epoch()
    assert capsys.readouterr().out == "epoch 1/3  step 100/1,000  loss 0.5000  12,346 images/s\n"


def test_only_the_process_that_prints_prints(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(prints=False, epochs=1)
    terminal.row("device", "cpu")
    terminal.start_epoch(1, 10)
    terminal.report(0.5, 1.0)
    terminal.end_epoch()
    assert capsys.readouterr().out == ""


def test_an_epoch_line_shows_loss_and_accuracy_in_and_out_of_sample(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(prints=True, epochs=2)
    terminal.start_epoch(2, 10)
    figures = {"train/loss": 0.1, "train/accuracy": 0.97, "test/loss": 0.2, "test/accuracy": 0.9567}
    terminal.epoch_line(figures | {"epoch_seconds": 3.21, "images_per_second": 18700.0})
    line = capsys.readouterr().out
    assert "epoch 2/2   train loss 0.1000 accuracy 97.00 %   test loss 0.2000 accuracy 95.67 %" in line
    assert "3.2 s  18,700 images/s" in line


def test_curves_are_drawn_from_any_metrics(tmp_path: Path) -> None:
    line = {"step": 10, "epoch": 1, "train/loss": 0.3, "train/accuracy": 0.9, "test/loss": 0.4, "test/accuracy": 0.8}
    running = {"step": 5, "epoch": 1, "train/loss": 0.7}
    for name, lines in (("usual", [running, line]), ("no running loss", [line]), ("no epoch", [running]), ("none", [])):
        metrics = tmp_path / f"{name}.jsonl"
        metrics.write_text("".join(json.dumps(values) + "\n" for values in lines))
        draw_curves(metrics, tmp_path / f"{name}.png", title=name)
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 1000
            assert len(picture.convert("RGB").getcolors(2**20) or []) > 10  # something is drawn


def test_a_prediction_is_drawn_for_any_class_names(tmp_path: Path, digits: ImageData) -> None:
    names = tuple(f"a long name, number {index}" for index in range(10))
    image, label = digits.test.images[0], digits.test.labels[0]
    draw_prediction(image, label, torch.full((10,), 0.1), names, tmp_path / "prediction.png")
    with Image.open(tmp_path / "prediction.png") as picture:
        assert picture.width > 900
