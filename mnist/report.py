"""Pictures of a run: its curves, and a test image beside the network's answer.

draw_curves(folder / "metrics.jsonl", folder / "curves.png")
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

TRAIN, TEST, TRUTH = "#3b6ea8", "#d9822b", "#3a8f5c"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _figure_class() -> Any:
    """matplotlib's Figure, without the warnings about a home folder that cannot be written: it then uses another."""
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    return Figure


def draw_curves(metrics: Path, output: Path, title: str = "") -> None:
    """Loss and accuracy, in and out of sample, over the optimizer steps, as a PNG."""
    Figure = _figure_class()
    lines = read_metrics(metrics)
    epochs = [line for line in lines if "test/loss" in line]
    running = [line for line in lines if "train/loss" in line and "test/loss" not in line]
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    if running:
        loss.plot(*_points(running, "train/loss"), color=TRAIN, alpha=0.35, linewidth=1, label="while training")
    for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
        scale = 100 if key == "accuracy" else 1
        for part, color, label in (("train", TRAIN, "in sample (train)"), ("test", TEST, "out of sample (test)")):
            steps, values = _points(epochs, f"{part}/{key}")
            axes.plot(steps, [scale * value for value in values], color=color, marker="o", markersize=5, label=label)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlim(left=0)
        axes.legend(frameon=False)
    # the first values of an untrained network would press everything else to the ground
    top = max([value for _, value in zip(*_points(running[1:] + epochs, "train/loss"), strict=True)], default=1.0)
    loss.set_ylim(0, 1.05 * top)
    loss.set_title("loss")
    accuracy.set_title("accuracy, %")
    if title:
        figure.suptitle(title, fontweight="bold")
    figure.savefig(output)


def _points(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines], [line[key] for line in lines]


def draw_prediction(
    image: Tensor, label: Tensor, probabilities: Tensor, class_names: tuple[str, ...], output: Path
) -> None:
    """A test image (uint8 [height, width]) beside the network's answer (probabilities [classes]), as a PNG."""
    Figure = _figure_class()
    answer, truth = int(probabilities.argmax()), int(label)
    figure = Figure(figsize=(7, 3.2), dpi=150, layout="constrained")
    picture, bars = figure.subplots(1, 2, width_ratios=(1, 1.4))
    picture.imshow(image.numpy(), cmap="gray_r")
    picture.set_title(f"a test image: {class_names[truth]}")
    picture.set_axis_off()
    right = answer == truth
    colors = [(TRUTH if right else TEST) if index == answer else "#c8ccd0" for index in range(len(class_names))]
    bars.barh(range(len(class_names)), 100 * probabilities.numpy(), color=colors)
    bars.set_yticks(range(len(class_names)), class_names)
    bars.invert_yaxis()
    bars.set_xlim(0, 100)
    bars.set_xlabel("probability, %")
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_title(f"the network's answer: {class_names[answer]}")
    figure.savefig(output)
