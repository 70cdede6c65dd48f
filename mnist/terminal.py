"""What a person sees while a run goes on: a header, a bar an epoch, a line an epoch, the result.

On a terminal a progress bar moves; elsewhere (a file, a pipe, a scheduler's log) a plain line comes every ten seconds.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mnist.config import TrainConfig


class Terminal:
    """Prints to the standard output, if this process is the one that prints."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, prints: bool, epochs: int) -> None:
        self.prints = prints
        self.interactive = prints and sys.stdout.isatty()
        self.epochs = epochs
        self.bar: Any = None
        self.last_line = time.monotonic()

    def print(self, text: str = "") -> None:
        """A line now, not when a buffer is full."""
        if self.prints:
            try:
                print(text, flush=True)
            except BrokenPipeError:  # `| tee`, ended by the same Ctrl-C: a run outlives those who listen
                self.prints = self.interactive = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def header(self, config: TrainConfig, resolved: Mapping[str, Any], folder: Path, notes: Sequence[str]) -> None:
        """What is going to be trained, on what, how and into which folder."""
        self.print(f"Recipe {config.recipe}")
        self.row("device", resolved["device"])
        threads = "1 CPU thread" if resolved["threads"] == 1 else f"{resolved['threads']} CPU threads"
        joined = " with" if resolved["num_processes"] == 1 else ", each with"
        self.row("launched", f"{resolved['processes']}{joined} {threads}")
        self.row("precision", resolved["precision"])
        if resolved["compiler"] != "no":
            self.row("compiler", resolved["compiler"])
        counts = f"{resolved['train_images']:,} training and {resolved['test_images']:,} test images"
        self.row("data", f"{config.dataset}, {counts}")
        for note in notes:
            self.row("", note)
        self.row("model", f"{config.model}, {resolved['parameters']:,} parameters")
        accumulated = config.gradient_accumulation_steps
        window = f", {accumulated} batches an optimizer step" if accumulated > 1 else ""
        self.row("batch", f"{config.global_batch_size:,} images ({config.batch_size:,} a process){window}")
        self.row("steps", f"{resolved['total_steps']:,} ({resolved['steps_per_epoch']:,} an epoch)")
        self.row("run folder", str(folder))

    def row(self, name: str, value: str) -> None:
        """A name and its value, in columns."""
        self.print(f"  {name:<11} {value}")

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
            for part in ("train", "val", "test")
            if f"{part}/loss" in values
        ]
        speed = f"{values['epoch_seconds']:.1f} s  {values['images_per_second']:,.0f} images/s"
        self.print("   ".join([self.epoch, *parts, speed]))
        self.last_line = time.monotonic()

    def draw(self, image: Tensor, label: Tensor, probabilities: Tensor, class_names: tuple[str, ...]) -> None:
        """An image in characters with the network's answer, on a terminal only."""
        if self.interactive:
            answer = int(probabilities.argmax())
            sure = f"{100 * float(probabilities[answer]):.1f} % sure"
            self.print(f"\n{draw_image(image)}\n")
            self.print(f"The network's answer: {class_names[answer]} ({sure}). The truth: {class_names[int(label)]}.")

    def result(self, folder: Path, values: Mapping[str, float], warning: str | None, sync_command: str | None) -> None:
        """The figure that counts, where everything is, and what to do next."""
        self.print(f"\nTest accuracy {values['test/accuracy']:.4f} after {values['step']:,} steps")
        self.row("model", f"{folder}/model/  (model.safetensors, config.json)")
        if (folder / "best").exists():
            self.row("best", f"{folder}/best/  (the weights with the lowest validation loss)")
        self.row("metrics", f"{folder}/metrics.jsonl")
        self.row("pictures", f"{folder}/curves.png, prediction.png")
        if warning:
            self.row("warning", warning)
        if sync_command:
            self.row("W&B", f"{sync_command}   sends this run to your dashboard (wandb login first)")
        self.row("next", "python train.py --help   lists every setting; --recipe cnn reaches 99 %")


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
