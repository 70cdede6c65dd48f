"""The report of a run, or of several side by side: one HTML file that holds all it needs and asks no network.

write_report([Record.read(Path("runs/latest"))], Path("report.html"))
write_pictures(Record.read(Path("runs/latest")))       # curves.png, confusion.png, mistakes.png, prediction.png in it
"""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from mnist.files import write_file
from mnist.reporting import plots
from mnist.runs.record import MOST_MOMENTS, MOST_POINTS, Record, evenly

MOST_CLASSES = 20  # whose accuracy is shown: of more, the worst
MOST_EPOCHS = 100  # in the table of epochs: of more, the last
PLACES = ("run_name", "output_dir", "resume", "data_dir", "trackers")  # settings that say where, not what


class LiveReport:
    """The report of a run that goes on, renewed after an epoch as often as that costs little of its time.

    It is a guest: what fails in it becomes a warning. A run that fails or is interrupted has it renewed on its way out.
    """

    SHARE_OF_TIME = 0.02  # with all else that is logged, less than the twentieth that may be spent

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder = folder
        self.writes = writes
        self.warnings: list[str] = []  # to be shown at the end
        self.cost = 3.0  # seconds for the next: at first a guess, as matplotlib has to be loaded
        self.written_at = time.monotonic()

    def after_epoch(self) -> None:
        """Write it again, if it is time for it."""
        waited = time.monotonic() - self.written_at
        if self.cost <= self.SHARE_OF_TIME * (waited + self.cost):
            self.write()

    def __enter__(self) -> "LiveReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self.writes:
            self.write()

    def write(self, status: str | None = None) -> None:
        """report.html, and the pictures beside it; `status` is what the run is by now, where its state lags behind."""
        started = time.monotonic()
        try:
            record = Record.read(self.folder)
            if status is not None:
                record = replace(record, state=record.state | {"status": status})
            write_pictures(record)
            write_report([record], self.folder / "report.html")
        except Exception as error:
            self.warnings = [f"The report could not be written ({type(error).__name__}: {error})."]
        self.written_at = time.monotonic()
        self.cost = self.written_at - started


def write_pictures(record: Record) -> None:
    """curves.png and, where the run was evaluated, confusion.png, mistakes.png and prediction.png in its folder."""
    figures = {"curves": plots.curves([record])}
    if record.evaluation is not None:
        figures["confusion"] = plots.confusion(record.evaluation)
        figures["prediction"] = plots.prediction(record.evaluation)
        figures["mistakes"] = plots.mistakes(record.evaluation)
    for name, figure in figures.items():
        path = record.folder / f"{name}.png"
        if figure is None:  # no mistakes any more
            path.unlink(missing_ok=True)
        else:
            with plots.drawing():
                content = io.BytesIO()
                figure.savefig(content, format="png")
            write_file(path, content.getvalue())


def write_report(records: Sequence[Record], output: Path) -> None:
    """One run in full, or several with their curves over one another and the settings in which they differ."""
    write_file(output, render(records).encode(errors="backslashreplace"))  # a path may hold bytes that are no text


def render(records: Sequence[Record]) -> str:
    """The report as HTML. Whatever names hold is escaped by the template."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "setting": setting}
    record = records[0]
    several = len(records) > 1
    panels: list[Callable[[Any, Sequence[Record]], None]] = [plots.draw_loss, plots.draw_accuracy]
    panels += [plots.draw_training_loss] if several else []
    panels += [plots.draw_learning_rate, plots.draw_gradient_norm]
    return environment.get_template("report.html").render(
        records=records,
        record=record,
        several=several,
        colors=plots.RUN_COLORS,
        best=best_values(records),
        panels=[plots.svg(panel, records) for panel in panels],
        evaluation=record.evaluation,
        classes=class_accuracies(record.evaluation) if record.evaluation else [],
        matrix=matrix(record.evaluation) if record.evaluation else [],
        moments=evenly(record.evaluation["history"], MOST_MOMENTS) if record.evaluation else [],
        epochs=record.evaluations[-MOST_EPOCHS:],
        differences=differences(records),
        settings={name: value for name, value in record.config.items() if name not in PLACES},
        metrics=[
            {
                "name": it.name,
                "evaluations": evenly(it.evaluations, MOST_EPOCHS),
                "losses": evenly(it.losses, MOST_POINTS),
            }
            for it in records
        ],
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def class_accuracies(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, images, correct and accuracy of each class that has images; of very many, of the worst."""
    columns = (evaluation["class_names"], evaluation["images"], evaluation["correct"])
    classes = [
        {"name": name, "images": images, "correct": correct, "accuracy": correct / images}
        for name, images, correct in zip(*columns, strict=True)
        if images
    ]
    most = max((1 - it["accuracy"] for it in classes), default=0) or 1
    for it in classes:
        it["strength"] = (1 - it["accuracy"]) / most  # of the bar, from 0 to 1
    return classes if len(classes) <= MOST_CLASSES else sorted(classes, key=lambda it: it["accuracy"])[:MOST_CLASSES]


def matrix(evaluation: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The cells of the confusion matrix: count, share of its row, and strength of its colour from 0 to 1."""
    counts = evaluation["confusion"]["counts"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    worst = max((share for i, row in enumerate(shares) for j, share in enumerate(row) if i != j), default=0) or 1
    return [
        [
            {"count": counts[i][j], "share": share, "right": i == j, "strength": share if i == j else share / worst}
            for j, share in enumerate(row)
        ]
        for i, row in enumerate(shares)
    ]


def differences(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The settings, and what of the environment matters, in which runs differ: a value for each run."""
    told = [
        {k: v for k, v in record.config.items() if k not in PLACES}
        | {k: record.environment.get(k) for k in ("device", "processes", "threads", "precision", "torch", "git_commit")}
        for record in records
    ]
    names = dict.fromkeys(name for values in told for name in values)
    columns = {name: [values.get(name) for values in told] for name in names}
    return {name: column for name, column in columns.items() if any(value != column[0] for value in column)}


def best_values(records: Sequence[Record]) -> dict[str, float]:
    """The best of each figure over several runs: the highest accuracy, the lowest loss."""
    found: dict[str, float] = {}
    for key in ("val/loss", "val/accuracy", "test/loss", "test/accuracy"):
        values = [record.last[key] for record in records if key in record.last]
        if values:
            found[key] = min(values) if key.endswith("loss") else max(values)
    return found


def number(value: Any, digits: int = 4) -> str:
    """`12,345` for whole numbers, `0.1234` for others, a dash for nothing."""
    if value is None or value == "":
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def percent(value: Any, digits: int = 2) -> str:
    """`96.18 %` for 0.9618, a dash for nothing."""
    return "-" if value is None or value == "" else f"{100 * value:.{digits}f} %"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def setting(value: Any) -> str:
    """A setting as it is written on the command line; a dash for none."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
