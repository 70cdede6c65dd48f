"""What the terminal shows."""

import io
import os
import pty
import sys
from pathlib import Path

import pytest
import torch

from mnist.data.splits import ImageData
from mnist.reporting.terminal import YELLOW, Terminal, draw_image, supports_color


def test_a_digit_in_characters_shows_its_ink(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    seven = digits.test.images[0]
    lines = draw_image(seven).splitlines()
    assert 8 <= len(lines) <= 14
    assert all(len(line) <= 28 for line in lines)
    assert "█" in lines[1]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert draw_image(seven).isascii()
    assert draw_image(torch.zeros(28, 28, dtype=torch.uint8)) == ""


def test_without_a_terminal_lines_are_printed_at_intervals(
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


def test_an_epoch_line_shows_loss_and_accuracy_of_every_split(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(prints=True, epochs=2)
    terminal.start_epoch(2, 10)
    figures = {"train/loss": 0.1, "train/accuracy": 0.97, "test/loss": 0.2, "test/accuracy": 0.9567}
    terminal.epoch_line(figures | {"perf/epoch_seconds": 3.21, "perf/images_per_second": 18700.0})
    line = capsys.readouterr().out
    assert "epoch 2/2   train loss 0.1000 accuracy 97.00 %   test loss 0.2000 accuracy 95.67 %" in line
    assert "3.2 s  18,700 images/s" in line


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_only_terminals_that_want_color_get_it(
    variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    stream = os.fdopen(theirs, "w")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert supports_color(stream)
    monkeypatch.setenv(variable, value)
    assert not supports_color(stream)
    monkeypatch.undo()
    with (tmp_path / "log").open("w") as log:
        assert not supports_color(log)
    stream.close()
    os.close(ours)


def test_the_result_is_a_small_table_with_all_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"train/loss": 0.1, "train/accuracy": 0.97, "test/loss": 0.2, "test/accuracy": 0.9567, "step": 6000}
    Terminal(prints=True, epochs=1).result(Path("runs/x"), values, ["one", "two"], "wandb sync runs/x/wandb/y")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["loss", "accuracy"] in lines
    assert ["train", "0.1000", "97.00", "%"] in lines
    assert ["test", "0.2000", "95.67", "%"] in lines
    assert ["warning", "one"] in lines
    assert ["warning", "two"] in lines
    assert not any("\033" in word for line in lines for word in line)


def test_control_characters_in_values_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(True, 1)
    terminal.row("run folder", "runs/\x1b[2J\x1b]0;x\x07")
    terminal.row("warning", "a\rb", YELLOW)
    assert capsys.readouterr().out.splitlines() == [
        r"  run folder  runs/\x1b[2J\x1b]0;x\x07",
        r"  warning     a\rb",
    ]
