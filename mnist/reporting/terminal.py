"""What a person sees while a run goes on: a header, a bar an epoch, a line an epoch, the result.

On a terminal a progress bar moves; elsewhere (a file, a pipe, a scheduler's log) a plain line comes every ten seconds.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from mnist.config.settings import TrainConfig
from mnist.launch.streams import printable
from mnist.reporting.snapshots import Evaluation

BOLD, DIM, GREEN, YELLOW, PLAIN = "\033[1m", "\033[2m", "\033[32m", "\033[33m", "\033[0m"
PARTS = ("train", "val", "test")


class Terminal:
    """Prints to the standard output, if this process is the one that prints."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, prints: bool, epochs: int) -> None:
        self.prints = prints
        self.interactive = prints and sys.stdout.isatty()
        self.colors = prints and understands_colors(sys.stdout)
        self.epochs = epochs
        self.bar: Any = None
        self.last_line = time.monotonic()

    def print(self, text: str = "") -> None:
        """A line now, not when a buffer is full."""
        if self.prints:
            print(text, flush=True)

    def header(self, config: TrainConfig, resolved: Mapping[str, Any], folder: Path, notes: Sequence[str]) -> None:
        """What is going to be trained, on what, how and into which folder."""
        self.print(self.styled(f"Recipe {printable(config.recipe)}", BOLD))
        self.row("device", resolved["device"])
        threads = "1 CPU thread" if resolved["threads"] == 1 else f"{resolved['threads']} CPU threads"
        joined = " with" if resolved["num_processes"] == 1 else ", each with"
        self.row("launched", f"{resolved['processes']}{joined} {threads}")
        self.row("precision", resolved["precision"])
        if resolved["compiler"] != "no":
            self.row("compiler", resolved["compiler"])
        elif resolved["not_compiled"]:
            self.row("compiler", f"none, --compile is left out: {resolved['not_compiled']}")
        counts = f"{resolved['train_images']:,} training and {resolved['test_images']:,} test images"
        self.row("data", f"{resolved['data']}, {counts}")
        for note in notes:
            self.row("", note)
        self.row("model", f"{config.model}, {resolved['parameters']:,} parameters")
        accumulated = config.gradient_accumulation_steps
        window = f", {accumulated} batches per optimizer step" if accumulated > 1 else ""
        batch, per_process = resolved["global_batch_size"], resolved["batch_size"]
        self.row("batch", f"{batch:,} images ({per_process:,} per process){window}")
        self.row("steps", f"{resolved['total_steps']:,} ({resolved['steps_per_epoch']:,} per epoch)")
        self.row("run folder", str(folder))

    def row(self, name: str, value: str, codes: str = "") -> None:
        """A name and its value, in columns; the value in a color, if one is named."""
        self.print(f"  {self.styled(f'{name:<11}', DIM)} {self.styled(printable(value), codes)}")

    def start_epoch(self, epoch: int, steps: int) -> None:
        self.epoch, self.steps, self.done = f"epoch {epoch}/{self.epochs}", steps, 0
        if self.interactive:
            from tqdm import tqdm

            layout = "{desc}  {percentage:3.0f}% |{bar:30}| {n:,}/{total:,} steps  {elapsed}<{remaining}"
            self.bar = tqdm(total=steps, desc=self.epoch, file=sys.stdout, leave=False, bar_format=layout)

    def step(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def report(self, loss: float, images_per_second: float) -> None:
        figures = f"loss {loss:.4f}  {images_per_second:,.0f} images/s"
        if self.bar is not None:
            self.bar.set_description_str(f"{self.epoch}  {figures}", refresh=False)
        elif time.monotonic() - self.last_line > self.SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self.print(f"{self.epoch}  step {self.done:,}/{self.steps:,}  {figures}")

    def end_epoch(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def epoch_line(self, values: Mapping[str, float]) -> None:
        """The figures of an epoch, of the same weights in and out of sample."""
        parts = [
            f"{part} loss {values[f'{part}/loss']:.4f} accuracy {100 * values[f'{part}/accuracy']:.2f} %"
            for part in PARTS
            if f"{part}/loss" in values
        ]
        speed = f"{values['perf/epoch_seconds']:.1f} s  {values['perf/images_per_second']:,.0f} images/s"
        self.print("   ".join([self.epoch, *parts, self.styled(speed, DIM)]))
        self.last_line = time.monotonic()

    def draw(self, evaluation: Evaluation) -> None:
        """A test image in characters with the network's answer, on a terminal only; a photograph would not be seen."""
        if self.interactive and evaluation.history and evaluation.bright_on_black:
            seen, names = evaluation.history[-1], evaluation.class_names
            answer, truth = names[seen["predictions"][0]], names[int(evaluation.split.labels[evaluation.examples[0]])]
            self.print(f"\n{draw_image(evaluation.images[0])}\n")
            self.print(
                f"The network's answer: {self.styled(answer, BOLD)} ({100 * seen['probabilities'][0]:.1f} % sure)."
                f" The truth: {truth}."
            )

    def result(
        self, folder: Path, values: Mapping[str, float], warnings: Sequence[str], sync_command: str | None
    ) -> None:
        """The figures that count, where everything is, and what to do next."""
        self.print(self.styled(f"\n  {'':<11} {'loss':>8} {'accuracy':>10}", DIM))
        for part in PARTS:
            if f"{part}/loss" in values:
                self.row(part, f"{values[f'{part}/loss']:>8.4f} {100 * values[f'{part}/accuracy']:>8.2f} %")
        accuracy = self.styled(f"Test accuracy {values['test/accuracy']:.4f}", BOLD + GREEN)
        self.print(f"\n{accuracy} after {values['step']:,} steps")
        self.row("report", f"{folder}/report.html")
        self.row("model", f"{folder}/model/  (model.safetensors, config.json)")
        if (folder / "best").exists():
            self.row("best", f"{folder}/best/  (the weights with the lowest validation loss)")
        self.row("metrics", f"{folder}/metrics.jsonl")
        for warning in warnings:
            self.row("warning", warning, YELLOW)
        if sync_command:
            self.row("W&B", f"{sync_command}   sends this run to your dashboard (wandb login first)")
        self.row("next", f"mnist runs {folder.parent}   lists all runs; python train.py --help   lists every setting")

    def styled(self, text: str, codes: str) -> str:
        """Text in a colour or weight, on a terminal that does not ask for none (NO_COLOR, https://no-color.org)."""
        return f"{codes}{text}{PLAIN}" if self.colors and codes else text


def understands_colors(stream: TextIO) -> bool:
    """Whether what is written to `stream` may be coloured."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def draw_image(image: Tensor) -> str:
    """An image, uint8 [height, width], in characters: two rows of pixels a line, for characters are tall."""
    shades = " ░▒▓█"
    try:
        shades.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        shades = " .:*#"
    height, width = image.shape
    pairs = image[: height // 2 * 2].float().view(height // 2, 2, width).mean(dim=1) / 256  # [height / 2, width]
    lines = ["".join(shades[int(value * len(shades))] for value in row).rstrip() for row in pairs.tolist()]
    inked = [index for index, line in enumerate(lines) if line]
    return "\n".join(lines[inked[0] : inked[-1] + 1]) if inked else ""
