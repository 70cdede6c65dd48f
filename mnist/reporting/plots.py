"""A run drawn with matplotlib, as PNG files for papers and as SVG for a page that is light or dark.

curves([Record.read(folder)]).savefig("curves.png")
svg(draw_loss, [record])                        # its lines have the page's colour of text
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnist.runs.record import MOST_POINTS, Record, evenly, pixels

TRAIN, TEST, VALIDATION, TRUTH, REST = "#4078c0", "#e0812b", "#8f6bbf", "#3a9a63", "#c8ccd4"
RUN_COLORS = ("#4078c0", "#e0812b", "#3a9a63", "#c44e6a", "#8f6bbf", "#8c6d46", "#3aa3b5", "#7f7f7f")
INK = "#1c2733"  # text and axes; in a page the colour of its text
PARTS = (
    ("train", TRAIN, "in sample (train)"),
    ("val", VALIDATION, "validation"),
    ("test", TEST, "out of sample (test)"),
)
STYLE: Any = {
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "sans-serif",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text, in the page's font
}


@contextmanager
def drawing() -> Iterator[Any]:
    """matplotlib's Figure, in our style, without warnings about a home folder that cannot be written."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        yield Figure


def draw_loss(axes: Any, records: Sequence[Record]) -> None:
    """Loss over the optimizer steps: of one run in and out of sample, of several out of sample."""
    shown = [value for it in records for line in it.evaluations for key, value in line.items() if key.endswith("/loss")]
    if len(records) == 1:
        losses = records[0].losses
        points = _points(losses, "train/loss")
        axes.plot(*points, color=TRAIN, alpha=0.5, linewidth=1, label="while training", zorder=1)
        # the first values of an untrained network would press everything else to the ground
        shown += [line["train/loss"] for line in losses[len(losses) // 20 + 1 :]]
    _draw_parts(axes, records, "loss", scale=1)
    axes.set_ylim(0, 1.05 * (max(shown, default=0) or 1))
    axes.set_title("Loss" if len(records) == 1 else "Test loss")
    _finish(axes)


def draw_accuracy(axes: Any, records: Sequence[Record]) -> None:
    """Accuracy in percent over the optimizer steps, as draw_loss."""
    _draw_parts(axes, records, "accuracy", scale=100)
    axes.set_title("Accuracy, %" if len(records) == 1 else "Test accuracy, %")
    _finish(axes)


def draw_training_loss(axes: Any, records: Sequence[Record]) -> None:
    """The loss while training, of each run."""
    for record, color in zip(records, _colors(records), strict=True):
        axes.plot(
            *_points(record.losses, "train/loss"), color=color, linewidth=1, alpha=0.8, label=shortened(record.name, 28)
        )
    axes.set_title("Loss while training")
    _finish(axes)


def draw_learning_rate(axes: Any, records: Sequence[Record]) -> None:
    """The learning rate of each run."""
    for record, color in zip(records, _colors(records), strict=True):
        axes.plot(
            *_points(record.lines, "optim/learning_rate"), color=color, linewidth=1.5, label=shortened(record.name, 28)
        )
    axes.set_ylim(bottom=0)
    axes.set_title("Learning rate")
    _finish(axes, legend=len(records) > 1)


def draw_gradient_norm(axes: Any, records: Sequence[Record]) -> None:
    """The length of the gradient of each run."""
    for record, color in zip(records, _colors(records), strict=True):
        points = _points(record.lines, "optim/gradient_norm")
        axes.plot(*points, color=color, linewidth=1, alpha=0.8, label=shortened(record.name, 28))
    axes.set_ylim(bottom=0)
    axes.set_title("Length of the gradient")
    _finish(axes, legend=len(records) > 1)


def _draw_parts(axes: Any, records: Sequence[Record], key: str, scale: float) -> None:
    if len(records) == 1:
        lines = [(records[0], *part) for part in PARTS]
    else:
        lines = [
            (record, "test", color, shortened(record.name, 28))
            for record, color in zip(records, _colors(records), strict=True)
        ]
    for record, part, color, label in lines:
        steps, values = _points(record.evaluations, f"{part}/{key}")
        if steps:
            size = 5 if len(steps) <= 30 else 0
            axes.plot(steps, [scale * value for value in values], color=color, marker="o", markersize=size, label=label)


def _colors(records: Sequence[Record]) -> list[str]:
    return [RUN_COLORS[number % len(RUN_COLORS)] for number in range(len(records))]


def _points(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    there = evenly([line for line in lines if key in line], MOST_POINTS)
    return [line["step"] for line in there], [line[key] for line in there]


def _finish(axes: Any, legend: bool = True) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.set_xlim(left=0)
    if legend and axes.lines:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=9)


def curves(records: Sequence[Record]) -> Any:
    """Loss and accuracy side by side, as a figure with the run's name."""
    with drawing() as Figure:
        figure = Figure(figsize=(10, 4.2))
        loss, accuracy = figure.subplots(1, 2)
        draw_loss(loss, records)
        draw_accuracy(accuracy, records)
        figure.suptitle(", ".join(record.name for record in records), fontweight="bold")
        return figure


def confusion(evaluation: dict[str, Any]) -> Any:
    """The confusion matrix as a figure: rows are the true classes, and the colour is the share of the row."""
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
        # twice as far as the values go, so that the colours stay light behind the figures
        axes.imshow(right, cmap="Blues", vmin=0, vmax=2)
        axes.imshow(wrong, cmap="Oranges", vmin=0, vmax=2 * (np.nan_to_num(wrong).max() or 1))
        for row, column in zip(*counts.nonzero(), strict=True):
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=8)
        long = max(map(len, names)) > 2
        axes.set_xticks(range(len(names)), names, rotation=45 * long, ha="right" if long else "center")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="prediction", ylabel="true class")
        axes.set_title("Test images by true class and prediction")
        return figure


def mistakes(evaluation: dict[str, Any], most: int = 32) -> Any:
    """The mistakes of which the network was surest, as a figure; None where it made none."""
    found, names = evaluation["mistakes"][:most], evaluation["class_names"]
    if not found:
        return None
    columns = 8
    rows = -(-len(found) // columns)
    with drawing() as Figure:
        figure = Figure(figsize=(10, 0.6 + 1.55 * rows))
        axes = figure.subplots()  # for all: a picture and its words take 1 by 1.25; one for each took most of a second
        axes.set_axis_off()
        for place, mistake in enumerate(found):
            row, column = divmod(place, columns)
            x, y = column, 1.25 * row
            place_on_paper = (x + 0.12, x + 0.88, y + 0.98, y + 0.22)
            axes.imshow(pixels(mistake["image"]), cmap=gray_of(evaluation), extent=place_on_paper)
            truth, taken = shortened(names[mistake["truth"]], 8), shortened(names[mistake["prediction"]], 8)
            axes.text(x + 0.5, y + 0.12, f"{truth} → {taken}", ha="center", va="center", fontsize=9, fontweight="bold")
            axes.text(x + 0.5, y + 1.06, f"{100 * mistake['probability']:.1f} %", ha="center", va="center", fontsize=8)
        axes.set(xlim=(0, columns), ylim=(1.25 * rows, 0), aspect="equal")
        figure.suptitle("The surest mistakes: true class → prediction, and its probability", fontweight="bold")
        return figure


def gray_of(evaluation: dict[str, Any]) -> str:
    """The colour map of images without colours: what is bright ink on black is shown as dark on the paper."""
    return "gray_r" if evaluation["bright_on_black"] else "gray"


def prediction(evaluation: dict[str, Any]) -> Any:
    """A test image beside the network's answer, as a figure."""
    example, names = evaluation["examples"][0], evaluation["class_names"]
    with drawing() as Figure:
        figure = Figure(figsize=(7, 3.2))
        picture, bars = figure.subplots(1, 2, width_ratios=(1, 1.4))
        picture.imshow(pixels(example["image"]), cmap=gray_of(evaluation))
        picture.set_title(f"A test image: {shortened(names[example['truth']])}")
        picture.set_axis_off()
        answer = max(example["likeliest"], key=lambda it: it[1])[0]
        color = TRUTH if answer == example["truth"] else TEST
        places = range(len(example["likeliest"]))
        colors = [color if number == answer else REST for number, _ in example["likeliest"]]
        bars.barh(places, [100 * probability for _, probability in example["likeliest"]], color=colors)
        bars.set_yticks(places, [shortened(names[number]) for number, _ in example["likeliest"]])
        bars.invert_yaxis()
        bars.set_xlim(0, 100)
        bars.grid(visible=False)
        bars.set_xlabel("probability, %")
        bars.set_title(f"The network's answer: {shortened(names[answer])}")
        return figure


def write_answers(answers: Sequence[tuple[str, Any, Any]], path: Path) -> None:
    """Names, images and Predictions (inference/predict.py) as a figure: image, what was seen and answer, a row each."""
    with drawing() as Figure:
        figure = Figure(figsize=(7, 0.4 + 1.7 * len(answers)))
        rows = figure.subplots(len(answers), 3, squeeze=False, width_ratios=(1, 1, 2))
        for (original, seen, words), (name, image, found) in zip(rows, answers, strict=True):
            for axes in (original, seen, words):
                axes.set_axis_off()
            original.imshow(image, cmap="gray")
            if found.seen is not None:
                seen.imshow(found.seen.numpy(), cmap="gray")
            sure = f"{100 * found.probability:.1f} %"
            label = "no digit found" if found.label is None else f"{shortened(found.label)}, {sure}"
            words.text(0, 0.62, label, fontsize=15, fontweight="bold", transform=words.transAxes)
            words.text(0, 0.35, shortened(name, 40), fontsize=9, transform=words.transAxes)
        rows[0][0].set_title("the image", fontsize=9)
        rows[0][1].set_title("what was seen", fontsize=9)
        figure.savefig(path)


def shortened(name: str, most: int = 20) -> str:
    """A name of at most so many characters; matplotlib leaves labels out that begin with an underscore."""
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= most else name[: most - 1] + "…"


def svg(draw: Callable[[Any, Sequence[Record]], None], records: Sequence[Record]) -> str:
    """A panel as an SVG element for a page of HTML: its lines and letters have the colour of the page's text."""
    import matplotlib

    with drawing() as Figure, matplotlib.rc_context({"svg.hashsalt": draw.__name__}):
        figure = Figure(figsize=(4.6, 3.4))
        draw(figure.subplots(), records)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
