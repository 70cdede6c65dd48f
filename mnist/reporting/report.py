"""The report of a run, or a comparison of several: one self-contained HTML file.

write_report([Record.read(Path("runs/latest"))], Path("report.html"))
write_pictures(Record.read(Path("runs/latest")))       # curves.png, confusion.png, mistakes.png, prediction.png
"""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist.files import write_file
from mnist.reporting import plots
from mnist.runs.record import MAX_MOMENTS, MAX_POINTS, Record, class_accuracies, downsample

if TYPE_CHECKING:
    from mnist.data.splits import ImageData

MAX_EPOCH_ROWS = 100  # in the table of epochs; if there are more, the last ones
PATHS = ("run_name", "output_dir", "resume", "data_dir", "trackers")  # settings that do not affect the result
ENVIRONMENT = ("device", "processes", "threads", "precision", "torch", "git_commit")  # compared between runs
COMPARED = ("val/loss", "val/accuracy", "test/loss", "test/accuracy")


class LiveReport:
    """The report of a run in progress, rewritten after an epoch if that takes at most SHARE_OF_TIME of the run's time.

    Errors become warnings. The report is also written when a run fails or is interrupted.
    """

    SHARE_OF_TIME = 0.02  # all logging together may take 5 %

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder = folder
        self.writes = writes
        self.problems: dict[str, str] = {}  # by file
        self.cost = 3.0  # seconds that writing takes; the first guess includes loading matplotlib
        self.written_at = time.monotonic()

    @property
    def warnings(self) -> list[str]:
        """Lines for the end of the run."""
        return [f"{name} could not be written ({problem})." for name, problem in self.problems.items()]

    def after_epoch(self) -> None:
        """Rewrite the report if enough time has passed."""
        waited = time.monotonic() - self.written_at
        if self.cost <= self.SHARE_OF_TIME * (waited + self.cost):
            self.write()

    def __enter__(self) -> "LiveReport":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and self.writes:
            self.write()

    def write_data(self, data: "ImageData") -> None:
        """Write data.html, about the folder of images, unless it is there."""
        path = self.folder / "data.html"
        if self.writes and data.listing is not None and not path.exists():
            from mnist.reporting.data_page import write_data_page

            try:
                write_data_page(data, path)
            except Exception as error:
                self.problems["data.html"] = f"{type(error).__name__}: {error}"

    def write(self, status: str | None = None) -> None:
        """Write report.html and the plots beside it; `status` overrides that of a state.json not yet updated."""
        started = time.monotonic()
        try:
            record = Record.read(self.folder)
            if status is not None:
                record = replace(record, state=record.state | {"status": status})
            write_pictures(record)
            write_report([record], self.folder / "report.html")
        except Exception as error:
            self.problems["report.html"] = f"{type(error).__name__}: {error}"
        self.written_at = time.monotonic()
        self.cost = self.written_at - started


def write_pictures(record: Record) -> None:
    """Write curves.png and, after an evaluation, confusion.png, mistakes.png and prediction.png to the run's folder."""
    figures = {"curves": plots.curves([record])}
    if record.evaluation is not None:
        figures["confusion"] = plots.confusion(record.evaluation)
        figures["prediction"] = plots.prediction(record.evaluation)
        figures["mistakes"] = plots.mistakes(record.evaluation)
    for name, figure in figures.items():
        path = record.folder / f"{name}.png"
        if figure is None:  # there are no mistakes any more
            path.unlink(missing_ok=True)
        else:
            with plots.drawing():
                content = io.BytesIO()
                figure.savefig(content, format="png")
            write_file(path, content.getvalue())


def write_report(records: Sequence[Record], output: Path) -> None:
    """Write the report of one run, or the comparison of several: curves in shared charts, and settings that differ."""
    write_file(output, render(records, output.parent).encode(errors="backslashreplace"))  # of undecodable paths


def fill_template(name: str, **values: Any) -> str:
    """A page of this folder as HTML; names are escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "setting": setting}
    return environment.get_template(name).render(values)


def render(records: Sequence[Record], folder: Path | None = None) -> str:
    """The report as HTML, which will be in `folder`."""
    record, evaluation, several = records[0], records[0].evaluation, len(records) > 1
    beside = folder is not None and folder.resolve() == record.folder
    return fill_template(
        "report.html",
        records=records,
        record=record,
        several=several,
        has_data_page=beside and (record.folder / "data.html").is_file(),
        colors=plots.RUN_COLORS,
        best=best_values(records),
        panels=plots.panels(records),
        reliability=plots.as_svg(plots.draw_reliability, evaluation["bins"]) if evaluation and not several else "",
        evaluation=evaluation,
        classes=class_accuracies(evaluation) if evaluation else [],
        matrix=matrix(evaluation) if evaluation else [],
        moments=downsample(evaluation["history"], MAX_MOMENTS) if evaluation else [],
        epochs=record.evaluations[-MAX_EPOCH_ROWS:],
        differences=differences(records),
        settings={name: value for name, value in record.config.items() if name not in PATHS},
        metrics=[_metrics(record) for record in records],
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def _metrics(record: Record) -> dict[str, Any]:
    evaluations, losses = downsample(record.evaluations, MAX_EPOCH_ROWS), downsample(record.losses, MAX_POINTS)
    return {"name": record.name, "evaluations": evaluations, "losses": losses}


def matrix(evaluation: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The cells of the confusion matrix: count, share of its row, and strength of its color from 0 to 1."""
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
    """The settings and parts of the environment that differ between runs: one value per run."""
    rows = [
        {name: value for name, value in record.config.items() if name not in PATHS}
        | {name: record.environment.get(name) for name in ENVIRONMENT}
        for record in records
    ]
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    return {name: column for name, column in columns.items() if any(value != column[0] for value in column)}


def best_values(records: Sequence[Record]) -> dict[str, float]:
    """The best value of each metric over several runs: the highest accuracy or the lowest loss."""
    values = {key: [record.last[key] for record in records if key in record.last] for key in COMPARED}
    return {key: (min if "loss" in key else max)(column) for key, column in values.items() if column}


def number(value: Any, digits: int = 4) -> str:
    """`12,345` for integers, `0.1234` for floats, a dash for no value."""
    if value is None or value == "":
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def percent(value: Any, digits: int = 2) -> str:
    """`96.18 %` for 0.9618, a dash for no value."""
    return "-" if value is None or value == "" else f"{100 * value:.{digits}f} %"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def setting(value: Any) -> str:
    """A setting as written on the command line; a dash for none."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
