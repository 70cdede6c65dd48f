"""What the terminal shows during a run: a header, a progress bar and a line per epoch, and the result.

If the output is not a terminal but a file, a pipe or a scheduler's log, a line every ten seconds replaces the bar.
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
SPLITS = ("train", "val", "test")


class Terminal:
    """Prints to standard output, in the main process only."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, prints: bool, epochs: int) -> None:
        self.prints = prints
        self.interactive = prints and sys.stdout.isatty()
        self.colors = prints and supports_color(sys.stdout)
        self.epochs = epochs
        self.bar: Any = None
        self.last_line = time.monotonic()

    def print(self, text: str = "") -> None:
        """Print a line and flush it."""
        if self.prints:
            print(text, flush=True)

    def header(self, config: TrainConfig, resolved: Mapping[str, Any], folder: Path, notes: Sequence[str]) -> None:
        """Print the device, data, model, batch size, steps and run folder."""
        self.print(self.styled(f"Recipe {printable(config.recipe)}", BOLD))
        gpu = ", {gpus} visible, compute capability {capability}, CUDA {cuda}, cuDNN {cudnn}"
        self.row("device", ("{device}" + gpu if resolved["gpus"] else "{device}").format_map(resolved))
        threads = "1 CPU thread" if resolved["threads"] == 1 else f"{resolved['threads']} CPU threads"
        with_threads = f" with {threads}" if resolved["num_processes"] == 1 else f", each with {threads}"
        self.row("launched", f"{resolved['processes']}{with_threads}")
        self.row("precision", resolved["precision"])
        if resolved["compiler"] != "no":
            self.row("compiler", resolved["compiler"])
        elif resolved["not_compiled"]:
            self.row("compiler", f"none, no graph can be made: {resolved['not_compiled']}")
        counts = f"{resolved['train_images']:,} training and {resolved['test_images']:,} test images"
        self.row("data", f"{resolved['data']}, {counts}")
        for note in notes:
            self.row("", note)
        frozen = " in the last layer; the others keep their values" * (config.pretrained == "head")
        self.row("model", f"{config.model}, {resolved['parameters']:,} parameters{frozen}")
        if resolved["pretrained_weights"]:
            self.row("weights", resolved["pretrained_weights"])
        accumulated = config.gradient_accumulation_steps
        window = f", {accumulated} batches per optimizer step" if accumulated > 1 else ""
        batch, per_process = resolved["global_batch_size"], resolved["batch_size"]
        self.row("batch", f"{batch:,} images ({per_process:,} per process){window}")
        self.row("steps", f"{resolved['total_steps']:,} ({resolved['steps_per_epoch']:,} per epoch)")
        self.row("run folder", str(folder))

    def row(self, name: str, value: str, codes: str = "") -> None:
        """Print a name and its value in columns; `codes` color the value."""
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
        metrics = f"loss {loss:.4f}  {images_per_second:,.0f} images/s"
        if self.bar is not None:
            self.bar.set_description_str(f"{self.epoch}  {metrics}", refresh=False)
        elif time.monotonic() - self.last_line > self.SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self.print(f"{self.epoch}  step {self.done:,}/{self.steps:,}  {metrics}")

    def end_epoch(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def epoch_line(self, values: Mapping[str, float]) -> None:
        """Print the metrics of an epoch; every split was evaluated with the same weights."""
        splits = [
            f"{split} loss {values[f'{split}/loss']:.4f} accuracy {100 * values[f'{split}/accuracy']:.2f} %"
            for split in SPLITS
            if f"{split}/loss" in values
        ]
        speed = f"{values['perf/epoch_seconds']:.1f} s  {values['perf/images_per_second']:,.0f} images/s"
        self.print("   ".join([self.epoch, *splits, self.styled(speed, DIM)]))
        self.last_line = time.monotonic()

    def draw(self, evaluation: Evaluation) -> None:
        """On a terminal, draw a test image in characters with its prediction; no photographs, which are unreadable."""
        if self.interactive and evaluation.history and evaluation.bright_on_black:
            latest, names = evaluation.history[-1], evaluation.class_names
            prediction = self.styled(names[latest["predictions"][0]], BOLD)
            truth = names[int(evaluation.split.labels[evaluation.examples[0]])]
            self.print(f"\n{draw_image(evaluation.images[0])}\n")
            self.print(f"Predicted {prediction} ({100 * latest['probabilities'][0]:.1f} %), true class {truth}")

    def result(
        self, folder: Path, values: Mapping[str, float], warnings: Sequence[str], sync_command: str | None
    ) -> None:
        """Print the final metrics, the paths of the results, and what to do next."""
        self.print(self.styled(f"\n  {'':<11} {'loss':>8} {'accuracy':>10}", DIM))
        for split in SPLITS:
            if f"{split}/loss" in values:
                self.row(split, f"{values[f'{split}/loss']:>8.4f} {100 * values[f'{split}/accuracy']:>8.2f} %")
        accuracy = self.styled(f"Test accuracy {values['test/accuracy']:.4f}", BOLD + GREEN)
        self.print(f"\n{accuracy} after {values['step']:,} steps")
        self.row("report", f"{folder}/report.html")
        if (folder / "data.html").is_file():
            self.row("images", f"{folder}/data.html")
        self.row("model", f"{folder}/model/  (model.safetensors, config.json)")
        if (folder / "best").exists():
            self.row("best", f"{folder}/best/  (lowest validation loss)")
        self.row("metrics", f"{folder}/metrics.jsonl")
        for warning in warnings:
            self.row("warning", warning, YELLOW)
        if sync_command:
            self.row("W&B", f"{sync_command}   uploads this run (wandb login first)")
        self.row("next", f"mnist runs {folder.parent}   lists all runs")
        self.row("", "python train.py --help   lists every setting")

    def styled(self, text: str, codes: str) -> str:
        """`text` with terminal codes around it, if the output supports color."""
        return f"{codes}{text}{PLAIN}" if self.colors and codes else text


def supports_color(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that supports color and does not opt out (NO_COLOR, https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def draw_image(image: Tensor) -> str:
    """An image, uint8 [height, width], in characters. A line shows two rows of pixels, because characters are tall."""
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
