"""Read a run's folder: settings, state, metrics and the last evaluation. Does not import torch.

record = Record.read(Path("runs/latest"))
record.last["test/accuracy"], record.status
"""

import base64
import io
import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mnist.config.settings import MAX_INTEGER, read_settings
from mnist.errors import ConfigError
from mnist.files import read_text
from mnist.launch.streams import printable

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_POINTS = 1000  # per curve in a report
MAX_MOMENTS = 12  # evaluations shown per example image
DATA_URL = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]*$")  # makes no network request
OF_EVALUATION = {"epoch": int, "train/loss": float, "train/accuracy": float, "test/accuracy": float}
MAX_READ_SIDE = 1024  # pixels of an image in evaluation.json; snapshots.py writes smaller ones
MAX_CLASS_ROWS = 20  # in a table of classes; if there are more, the least accurate ones
MAX_CLASSES_READ = 100  # classes in a confusion matrix or of an image; snapshots.py writes fewer
MAX_LINE = 1 << 20  # characters, of metrics.jsonl
MAX_NUMBER = 1e40  # float32 ends at 3.4e38; plots and sums of far larger numbers overflow


@dataclass(frozen=True)
class Record:
    """The files of a run, which may still be running."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    evaluation: dict[str, Any] | None  # written by reporting/snapshots.py

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Raises ConfigError if the folder is not a run's or one of its files is invalid."""
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: no run there (config.yaml is missing). List runs: mnist runs")
        try:
            config = read_settings(folder / "config.yaml")
            state, environment, evaluation = (
                _read_json(folder / f"{name}.json") for name in ("state", "environment", "evaluation")
            )
            lines = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
            expect(config, {"recipe": str, "dataset": str, "model": str}, "config.yaml")
            if config.get("epochs", "") is not None:  # open, as in the recipe for photographs
                expect(config, {"epochs": int}, "config.yaml")
            if not all(type(command) is str for command in (state or {}).get("commands", [])):
                raise ValueError("state.json: commands must be strings")
            for name in ("parameters", "epochs"):
                if type((environment or {}).get(name, 0)) is not int:
                    raise ValueError(f"environment.json: {name} must be a number")
            if evaluation is not None:
                check_evaluation(evaluation)
        except (ConfigError, OSError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            problem = printable(" ".join(str(error).split()) or type(error).__name__)
            raise ConfigError(f"{folder}: a file of this run is invalid: {problem[:300]}") from error
        return cls(folder.resolve(), config, state or {}, environment or {}, lines, evaluation)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def epochs(self) -> int | str:
        """The number of epochs that the run was started for."""
        asked: int | None = self.config["epochs"]
        return asked or self.environment.get("epochs", "?")

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations, one per epoch."""
        return [line for line in self.lines if "test/loss" in line]

    @cached_property
    def losses(self) -> list[dict[str, Any]]:
        """The lines of training losses between evaluations."""
        return [line for line in self.lines if "train/loss" in line and "test/loss" not in line]

    @property
    def last(self) -> dict[str, Any]:
        """The line of the last evaluation; empty if there is none."""
        return (self.evaluations or [{}])[-1]

    @property
    def best(self) -> dict[str, Any]:
        """The line of the evaluation with the lowest validation loss; empty without validation images."""
        return min(
            (line for line in self.evaluations if "val/loss" in line), key=lambda line: line["val/loss"], default={}
        )

    @property
    def seconds(self) -> float:
        """Seconds of training and evaluation, up to the last evaluation."""
        parts = ("perf/epoch_seconds", "perf/evaluation_seconds")
        return float(sum(line.get(part, 0) for line in self.evaluations for part in parts))

    @property
    def status(self) -> str:
        """`finished`, `failed`, `interrupted`, `running`, or `killed` if its process no longer exists."""
        status = printable(str(self.state.get("status", "unknown")))
        if status == "running":
            process, _, host = str(self.state.get("process", "")).partition(" on ")
            is_number = process.isdecimal() and len(process) < 10
            if host == socket.gethostname() and not (is_number and psutil.pid_exists(int(process))):
                return "killed"
        return status


def read_state(path: Path) -> dict[str, Any]:
    """The values of a state.json; empty if it is unreadable or not an object (another program's file)."""
    if not path.is_file():  # a pipe would never end
        return {}
    try:
        state = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def find_records(parent: Path) -> tuple[list[Record], list[str]]:
    """The valid runs in a folder, sorted by the time in state.json, and an error message per invalid run."""
    records, problems = [], []
    for folder in {path.parent.resolve() for path in parent.glob("*/config.yaml")}:  # `latest` is a link
        try:
            records.append(Record.read(folder))
        except ConfigError as error:
            problems.append(str(error))
    return sorted(records, key=lambda run: (str(run.state.get("time", "")), run.name)), sorted(problems)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; the last one may still be being written."""
    lines = []
    with path.open(encoding="utf-8", newline="\n") as file:
        while (text := file.readline(MAX_LINE)).endswith("\n") or len(text) == MAX_LINE:
            line = _parse_json(text)
            expect(line, {"step": int}, "a line of metrics.jsonl")
            for name, value in line.items():
                if type(value) not in (int, float):
                    raise ValueError(f"metrics.jsonl: {name} is {value!r:.50}, not a number")
            if "test/loss" in line:
                expect(line, OF_EVALUATION, "an evaluation in metrics.jsonl")
            lines.append(line)
    return lines


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    values = _parse_json(read_text(path))
    expect(values, {}, path.name)
    return dict(values)


def _parse_json(text: str) -> Any:
    """Raises ValueError for invalid JSON and for numbers beyond `MAX_NUMBER`."""
    return json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_number)


def _number(text: str) -> int | float:
    value = int(text) if text.removeprefix("-").isdecimal() else float(text)
    if not abs(value) <= MAX_NUMBER:  # NaN too
        raise ValueError(f"{text:.50} is not a valid number")
    return value


def expect(values: Any, kinds: Mapping[str, type], where: str) -> None:
    """Raise ValueError unless `values` is a dict with at least the names in `kinds`, of these types."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r:.50} is not an object")
    for name, kind in kinds.items():
        value = values.get(name)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{where}: {name} is {value!r:.50}, not {kind.__name__}")


def check_evaluation(evaluation: dict[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError if snapshots.py cannot have written this evaluation.json."""
    kinds = {"step": int, "epoch": int, "class_names": list, "images": list, "correct": list, "confusion": dict}
    kinds |= {"bright_on_black": bool}
    expect(evaluation, kinds | {"mistakes": list, "examples": list, "history": list}, "evaluation.json")
    classes = range(len(evaluation["class_names"]))
    counts, names = evaluation["confusion"]["counts"], evaluation["confusion"]["names"]
    numbers = [*evaluation["images"], *evaluation["correct"], evaluation["confusion"]["within"]]
    numbers += [count for row in counts for count in row]
    for name in ("predicted", "bins"):  # which earlier runs lack
        evaluation.setdefault(name, [])
    numbers += evaluation["predicted"]
    fits = (
        len(classes) == len(evaluation["images"]) == len(evaluation["correct"])
        and len(evaluation["predicted"]) in (0, len(classes))
        and all(0 <= right <= images and 0 <= total < images + 1 for images, total, right in evaluation["bins"])
        and len(names) == len(counts) == len(counts[0])
        and len({len(row) for row in counts}) == 1
        and len(names) <= MAX_CLASSES_READ
        and all(type(number) is int and 0 <= number <= MAX_INTEGER for number in numbers)
        and all(type(name) is str for name in (*evaluation["class_names"], *names))
        and all(
            len(moment["predictions"]) == len(moment["probabilities"]) == len(evaluation["examples"])
            and all(prediction in classes for prediction in moment["predictions"])
            and all(0 <= probability <= 1 for probability in moment["probabilities"])
            and type(moment["step"]) is int
            for moment in evaluation["history"]
        )
    )
    if not fits:
        raise ValueError("evaluation.json: inconsistent sizes or values out of range")
    for item in (*evaluation["mistakes"], *evaluation["examples"]):
        expect(item, {"place": int, "truth": int, "image": str}, "an image in evaluation.json")
        if item["truth"] not in classes or not DATA_URL.match(item["image"]):
            raise ValueError(f"evaluation.json: not an image of a class: {item['truth']}, {item['image']:.50}")
    for item in evaluation["mistakes"]:
        kinds = {"prediction": int, "second": int, "probability": float, "second_probability": float}
        expect(item, kinds, "a mistake in evaluation.json")
        if item["prediction"] not in classes or item["second"] not in classes:
            raise ValueError("evaluation.json: a mistake without a class")
        if not (0 <= item["probability"] <= 1 and 0 <= item["second_probability"] <= 1):
            raise ValueError("evaluation.json: a probability outside 0 to 1")
    for item in evaluation["examples"]:
        likeliest = item["likeliest"]
        if len(likeliest) > MAX_CLASSES_READ or not all(number in classes and 0 <= p <= 1 for number, p in likeliest):
            raise ValueError("evaluation.json: an example without a class")


def class_accuracies(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of each class that has images, or of the MAX_CLASS_ROWS least accurate: accuracy is its recall."""
    names = evaluation["class_names"]
    columns = (names, evaluation["images"], evaluation["correct"], evaluation["predicted"] or [None] * len(names))
    classes = [
        {
            "name": name,
            "images": images,
            "accuracy": correct / images,
            "precision": correct / predicted if predicted else None,
            "f1": None if predicted is None else 2 * correct / (images + predicted),
        }
        for name, images, correct, predicted in zip(*columns, strict=True)
        if images
    ]
    if len(classes) > MAX_CLASS_ROWS:
        return sorted(classes, key=lambda row: row["accuracy"])[:MAX_CLASS_ROWS]
    return classes


def pixels(url: str) -> "Image":
    """Decode the image in a `data:` URL. Raises ConfigError if snapshots.py cannot have written it."""
    from PIL import Image

    try:
        # only these formats: Pillow would start Ghostscript for EPS
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])), formats=["PNG", "JPEG"])
        if max(image.size) > MAX_READ_SIDE:  # a small file may unpack to gigabytes
            raise ValueError(f"{image.width} x {image.height} pixels")
        image.load()
    except Exception as error:  # a parser may raise anything for a damaged file
        raise ConfigError(f"evaluation.json: an image in it cannot be read: {error}") from error
    return image


def downsample(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` evenly spaced items, including the first and the last."""
    count = min(len(items), most)
    return [items[round(index * (len(items) - 1) / max(1, count - 1))] for index in range(count)]
