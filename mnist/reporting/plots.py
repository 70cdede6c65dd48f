"""Plots of a run by matplotlib: PNG files, and SVG for a page in light or dark mode.

curves([Record.read(folder)]).savefig("curves.png")
panels([record])                                # for an HTML page
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from mnist.runs.record import MAX_POINTS, Record, downsample, pixels

TRAIN, TEST, VALIDATION, TRUTH, REST = "#4078c0", "#e0812b", "#8f6bbf", "#3a9a63", "#c8ccd4"
RUN_COLORS = ("#4078c0", "#e0812b", "#3a9a63", "#c44e6a", "#8f6bbf", "#8c6d46", "#3aa3b5", "#7f7f7f")
INK = "#1c2733"  # text and axes; replaced by the text color of an HTML page
SPLITS = (
    ("train", TRAIN, "train (in sample)"),
    ("val", VALIDATION, "validation"),
    ("test", TEST, "test (out of sample)"),
)
METRICS = {
    "train/loss": "Training loss",
    "optim/learning_rate": "Learning rate",
    "optim/gradient_norm": "Gradient norm",
}
STYLE: Any = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "grid.color"), INK),
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "text.parse_math": False,  # names may hold a dollar sign
    "font.family": "sans-serif",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.alpha": 0.12,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text, in the page's font
}


@contextmanager
def drawing() -> Iterator[Any]:
    """matplotlib's Figure in our style, without its warnings about a read-only home folder."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box
        yield Figure


def draw_loss(axes: Any, records: Sequence[Record]) -> None:
    """Loss over the optimizer steps: of one run on every split, of several runs on the test split."""
    shown = [
        value
        for record in records
        for line in record.evaluations
        for key, value in line.items()
        if key.endswith("/loss")
    ]
    if len(records) == 1:
        losses = records[0].losses
        points = _points(losses, "train/loss")
        axes.plot(*points, color=TRAIN, alpha=0.5, linewidth=1, label="during training", zorder=1)
        shown += [line["train/loss"] for line in losses[len(losses) // 20 + 1 :]]  # the first 5 % would dwarf the rest
    _draw_splits(axes, records, "loss", scale=1)
    axes.set_ylim(0, 1.05 * (max(shown, default=0) or 1))
    _finish(axes, "Loss" if len(records) == 1 else "Test loss")


def draw_accuracy(axes: Any, records: Sequence[Record]) -> None:
    """Accuracy in percent over the optimizer steps, of the same splits as draw_loss."""
    _draw_splits(axes, records, "accuracy", scale=100)
    _finish(axes, "Accuracy (%)" if len(records) == 1 else "Test accuracy (%)")


def draw_metric(axes: Any, records: Sequence[Record], key: str) -> None:
    """One of METRICS over the optimizer steps, of each run."""
    for record, color in zip(records, cycle(RUN_COLORS)):
        lines = record.losses if key == "train/loss" else record.lines
        axes.plot(*_points(lines, key), color=color, linewidth=1, alpha=0.8, label=shortened(record.name, 28))
    axes.set_ylim(bottom=0)
    _finish(axes, METRICS[key], legend=len(records) > 1)


def _draw_splits(axes: Any, records: Sequence[Record], key: str, scale: float) -> None:
    if len(records) == 1:
        curves = [(records[0], *split) for split in SPLITS]
    else:
        colored = zip(records, cycle(RUN_COLORS))
        curves = [(record, "test", color, shortened(record.name, 28)) for record, color in colored]
    for record, split, color, label in curves:
        steps, values = _points(record.evaluations, f"{split}/{key}")
        if steps:
            size = 5 if len(steps) <= 30 else 0
            axes.plot(steps, [scale * value for value in values], color=color, marker="o", markersize=size, label=label)


def _points(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    with_key = downsample([line for line in lines if key in line], MAX_POINTS)
    return [line["step"] for line in with_key], [line[key] for line in with_key]


def _finish(axes: Any, title: str, legend: bool = True) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.set_xlim(left=0)
    if legend and axes.lines:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=9)


def curves(records: Sequence[Record]) -> Any:
    """A figure with loss and accuracy side by side."""
    with drawing() as Figure:
        figure = Figure(figsize=(10, 4.2))
        loss, accuracy = figure.subplots(1, 2)
        draw_loss(loss, records)
        draw_accuracy(accuracy, records)
        figure.suptitle(", ".join(record.name for record in records), fontweight="bold")
        return figure


def confusion(evaluation: dict[str, Any]) -> Any:
    """A figure of the confusion matrix: rows are true classes, and the color shows the share of the row."""
    import numpy as np

    names, counts = evaluation["confusion"]["names"], np.array(evaluation["confusion"]["counts"])
    names = [shortened(name) for name in names]
    shares = np.where(counts == 0, np.nan, counts / np.maximum(1, counts.sum(axis=1, keepdims=True)))
    on_diagonal = np.eye(len(counts), dtype=bool)
    wrong, right = np.where(on_diagonal, np.nan, shares), np.where(on_diagonal, shares, np.nan)
    with drawing() as Figure:
        side = 2.2 + 0.42 * len(names)
        figure = Figure(figsize=(side + 0.1, side))
        axes = figure.subplots()
        axes.grid(visible=False)
        # up to twice the largest value, so colors stay light behind the numbers
        axes.imshow(right, cmap="Blues", vmin=0, vmax=2)
        axes.imshow(wrong, cmap="Oranges", vmin=0, vmax=2 * (np.nan_to_num(wrong).max() or 1))
        for row, column in zip(*counts.nonzero(), strict=True):
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=8)
        long = max(map(len, names)) > 2
        axes.set_xticks(range(len(names)), names, rotation=45 * long, ha="right" if long else "center")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title("Confusion matrix (test images)")
        return figure


def mistakes(evaluation: dict[str, Any], most: int = 32) -> Any:
    """A figure of the most confident mistakes; None if there are none."""
    shown, names, columns = evaluation["mistakes"][:most], evaluation["class_names"], 8
    if not shown:
        return None
    rows = -(-len(shown) // columns)
    with drawing() as Figure:
        figure = Figure(figsize=(10, 0.6 + 1.55 * rows))
        # one axes for all images (1 x 1.25 each, with text), because one axes per image took most of a second
        axes = figure.subplots()
        axes.set_axis_off()
        centered: dict[str, Any] = {"ha": "center", "va": "center"}
        for index, mistake in enumerate(shown):
            x, y = index % columns, 1.25 * (index // columns)
            extent = (x + 0.12, x + 0.88, y + 0.98, y + 0.22)
            axes.imshow(pixels(mistake["image"]), cmap=gray_of(evaluation), extent=extent)
            truth, prediction = (shortened(names[mistake[key]], 8) for key in ("truth", "prediction"))
            axes.text(x + 0.5, y + 0.12, f"{truth} → {prediction}", fontsize=9, fontweight="bold", **centered)
            axes.text(x + 0.5, y + 1.06, f"{100 * mistake['probability']:.1f} %", fontsize=8, **centered)
        axes.set(xlim=(0, columns), ylim=(1.25 * rows, 0), aspect="equal")
        figure.suptitle("Most confident mistakes: true class → prediction, probability", fontweight="bold")
        return figure


def gray_of(evaluation: dict[str, Any]) -> str:
    """The color map for grayscale images: bright ink on black is shown dark on white."""
    return "gray_r" if evaluation["bright_on_black"] else "gray"


def prediction(evaluation: dict[str, Any]) -> Any:
    """A figure of a test image and the probabilities of its classes."""
    example, names = evaluation["examples"][0], evaluation["class_names"]
    with drawing() as Figure:
        figure = Figure(figsize=(7, 3.2))
        picture, bars = figure.subplots(1, 2, width_ratios=(1, 1.4))
        picture.imshow(pixels(example["image"]), cmap=gray_of(evaluation))
        picture.set_title(f"Test image, true class: {shortened(names[example['truth']])}")
        picture.set_axis_off()
        classes, probabilities = zip(*example["likeliest"], strict=True)
        predicted = classes[probabilities.index(max(probabilities))]
        color = TRUTH if predicted == example["truth"] else TEST
        colors = [color if number == predicted else REST for number in classes]
        bars.barh(range(len(classes)), [100 * probability for probability in probabilities], color=colors)
        bars.set_yticks(range(len(classes)), [shortened(names[number]) for number in classes])
        bars.invert_yaxis()
        bars.set_xlim(0, 100)
        bars.grid(visible=False)
        bars.set_xlabel("probability (%)")
        bars.set_title(f"Prediction: {shortened(names[predicted])}")
        return figure


def write_answers(answers: Sequence[tuple[str, Any, Any]], path: Path) -> None:
    """Draw names, images and Predictions (inference/predict.py): one row per image, with the network's inputs."""
    import numpy as np

    with drawing() as Figure:
        figure = Figure(figsize=(7, 0.4 + 1.7 * len(answers)))
        rows = figure.subplots(len(answers), 3, squeeze=False, width_ratios=(1, 1, 2))
        for (original, prepared, words), (name, image, found) in zip(rows, answers, strict=True):
            for axes in (original, prepared, words):
                axes.set_axis_off()
            original.imshow(image, cmap="gray", vmin=0, vmax=255)
            if found.digits:
                inputs = [digit.network_input.numpy() for digit in found.digits[:8]]
                prepared.imshow(np.hstack(inputs), cmap="gray", vmin=0, vmax=255)
            sure = "" if found.confident else ", not sure"
            label = found.reason or f"{shortened(found.text)}, {100 * found.probability:.1f} %{sure}"
            words.text(0, 0.62, label, fontsize=15, fontweight="bold", transform=words.transAxes)
            words.text(0, 0.35, shortened(name, 40), fontsize=9, transform=words.transAxes)
        rows[0][0].set_title("image", fontsize=9)
        rows[0][1].set_title("network input", fontsize=9)
        figure.savefig(path)


def shortened(name: str, most: int = 20) -> str:
    """`name` cut to at most `most` characters, with a space before an underscore: matplotlib omits labels with one."""
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= most else name[: most - 1] + "…"


def panels(records: Sequence[Record]) -> list[str]:
    """The curves as SVG elements for an HTML page; they use its text color."""
    one_run = len(records) == 1  # draw_loss already shows its training loss
    draws: list[Any] = [draw_loss, draw_accuracy, *(partial(draw_metric, key=key) for key in list(METRICS)[one_run:])]
    return [as_svg(draw, records, number) for number, draw in enumerate(draws)]


def as_svg(draw: Callable[[Any, Any], None], content: Any, number: int = 99) -> str:
    """An SVG element that `draw` fills, in the text color of its page, in which `number` makes its ids unique."""
    import matplotlib

    with drawing() as Figure, matplotlib.rc_context({"svg.hashsalt": str(number)}):
        figure = Figure(figsize=(4.6, 3.4))
        draw(figure.subplots(), content)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def draw_reliability(axes: Any, bins: Sequence[Sequence[float]]) -> None:
    """Accuracy by the probability of the prediction (bins as in training/figures.py); on the line both are the same."""
    filled = [(100 * total / images, 100 * right / images, images) for images, total, right in bins if images]
    axes.plot([0, 100], [0, 100], color=INK, alpha=0.3, linewidth=1)
    if filled:
        confidence, accuracy, images = zip(*filled, strict=True)
        sizes = [20 + 180 * (count / max(images)) ** 0.5 for count in images]
        axes.scatter(confidence, accuracy, s=sizes, color=TEST, alpha=0.7, linewidth=0)
    axes.set(xlim=(0, 102), ylim=(0, 102), xlabel="probability of the prediction (%)")
    axes.set_title("Accuracy (%)")
