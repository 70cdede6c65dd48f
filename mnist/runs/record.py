"""A run's folder, read back: settings, state, metrics, the last evaluation. Loads quickly, for torch is not needed.

record = Record.read(Path("runs/latest"))
record.last["test/accuracy"], record.status
[found.name for found in find_records(Path("runs"))]
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

MOST_POINTS = 1000  # of a curve, in a report
DATA_ADDRESS = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]*$")  # an address that calls nobody
OF_EVALUATION = {"epoch": int, "train/loss": float, "train/accuracy": float, "test/accuracy": float}
LARGEST_SIDE = 1024  # pixels of an image in evaluation.json: those that are kept are smaller
MOST_SHOWN = 100  # classes in a confusion matrix, likeliest classes of an image: fewer are kept
LONGEST_LINE = 1 << 20  # characters, of metrics.jsonl
LARGEST_FIGURE = 1e40  # float32 ends at 3.4e38; what is drawn and added up far beyond it overflows
MOST_MOMENTS = 12  # of the training, where images are followed through it


@dataclass(frozen=True)
class Record:
    """What the files of a run say; of a run that goes on, as it is at this moment."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    evaluation: dict[str, Any] | None  # as reporting/snapshots.py has written it

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Raises ConfigError for a folder that is not a run's, or whose files are not what was written."""
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: no run is there, for it has no config.yaml. `mnist runs` lists them.")
        try:
            config = read_settings(folder / "config.yaml")
            state, environment, evaluation = (
                _read_json(folder / f"{name}.json") for name in ("state", "environment", "evaluation")
            )
            lines = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
            expect(config, {"epochs": int, "recipe": str, "dataset": str, "model": str}, "config.yaml")
            if not all(type(it) is str for it in (state or {}).get("commands", [])):
                raise ValueError("state.json: commands are lines of text")
            if type((environment or {}).get("parameters", 0)) is not int:
                raise ValueError("environment.json: parameters is no number")
            if evaluation is not None:
                check_evaluation(evaluation)
        except (ConfigError, OSError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            problem = printable(" ".join(str(error).split()) or type(error).__name__)
            raise ConfigError(f"{folder}: a file of this run cannot be read: {problem[:300]}") from error
        return cls(folder.resolve(), config, state or {}, environment or {}, lines, evaluation)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of the evaluations, one an epoch."""
        return [line for line in self.lines if "test/loss" in line]

    @cached_property
    def losses(self) -> list[dict[str, Any]]:
        """The lines of the loss while training."""
        return [line for line in self.lines if "train/loss" in line and "test/loss" not in line]

    @property
    def last(self) -> dict[str, Any]:
        """The line of the last evaluation; empty where there was none."""
        return (self.evaluations or [{}])[-1]

    @property
    def best(self) -> dict[str, Any]:
        """The line of the evaluation with the lowest validation loss; empty where nothing was cut off to validate."""
        return min(
            (line for line in self.evaluations if "val/loss" in line), key=lambda line: line["val/loss"], default={}
        )

    @property
    def seconds(self) -> float:
        """What training and evaluating took, as far as it was counted."""
        parts = ("perf/epoch_seconds", "perf/evaluation_seconds")
        return float(sum(line.get(part, 0) for line in self.evaluations for part in parts))

    @property
    def status(self) -> str:
        """`finished`, `failed`, `interrupted`, `running`, or `killed` where nothing runs that should."""
        status = printable(str(self.state.get("status", "unknown")))
        if status == "running":
            process, _, host = str(self.state.get("process", "")).partition(" on ")
            is_number = process.isdecimal() and len(process) < 10
            if host == socket.gethostname() and not (is_number and psutil.pid_exists(int(process))):
                return "killed"
        return status


def read_state(path: Path) -> dict[str, Any]:
    """What a state.json says; nothing where it is none, or cannot be read: other programs may call a file so too."""
    if not path.is_file():  # a pipe would never end
        return {}
    try:
        state = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def find_records(parent: Path) -> tuple[list[Record], list[str]]:
    """The runs in a folder of runs, by the time when they were last heard of, and what is wrong with others."""
    records, problems = [], []
    for folder in {path.parent.resolve() for path in parent.glob("*/config.yaml")}:  # `latest` is another's name
        try:
            records.append(Record.read(folder))
        except ConfigError as error:
            problems.append(str(error))
    return sorted(records, key=lambda it: (str(it.state.get("time", "")), it.name)), sorted(problems)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that is being written is left out."""
    lines = []
    with path.open(encoding="utf-8", newline="\n") as file:
        while (text := file.readline(LONGEST_LINE)).endswith("\n") or len(text) == LONGEST_LINE:
            line = json.loads(text, parse_constant=_refuse)
            expect(line, {"step": int}, "a line of metrics.jsonl")
            for name, value in line.items():
                # JSON's 1e999 is infinite
                if type(value) not in (int, float) or not abs(value) <= LARGEST_FIGURE:
                    raise ValueError(f"{name} is {value!r:.50} in metrics.jsonl, where a number is needed")
            if "test/loss" in line:
                expect(line, OF_EVALUATION, "an evaluation in metrics.jsonl")
            lines.append(line)
    return lines


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    values = json.loads(read_text(path), parse_constant=_refuse)
    expect(values, {}, path.name)
    return dict(values)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number that is written here")


def expect(values: Any, kinds: Mapping[str, type], where: str) -> None:
    """Raise ValueError unless these are named values, those of `kinds` among them and of these kinds."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r:.50}, where named values are needed")
    for name, kind in kinds.items():
        value = values.get(name)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{where}: {name} is {value!r:.50}, where {kind.__name__} is needed")


def check_evaluation(evaluation: Mapping[str, Any]) -> None:
    """Raise ValueError, or what it is made of raises, for an evaluation.json that snapshots.py cannot have written."""
    kinds = {"step": int, "epoch": int, "class_names": list, "images": list, "correct": list, "confusion": dict}
    kinds |= {"bright_on_black": bool}
    expect(evaluation, kinds | {"mistakes": list, "examples": list, "history": list}, "evaluation.json")
    classes = range(len(evaluation["class_names"]))
    counts, names = evaluation["confusion"]["counts"], evaluation["confusion"]["names"]
    numbers = [*evaluation["images"], *evaluation["correct"], evaluation["confusion"]["within"]]
    numbers += [count for row in counts for count in row]
    fits = (
        len(classes) == len(evaluation["images"]) == len(evaluation["correct"])
        and len(names) == len(counts) == len(counts[0])
        and len({len(row) for row in counts}) == 1
        and len(names) <= MOST_SHOWN
        and all(type(it) is int and 0 <= it <= MAX_INTEGER for it in numbers)
        and all(type(name) is str for name in (*evaluation["class_names"], *names))
        and all(
            len(it["predictions"]) == len(it["probabilities"]) == len(evaluation["examples"])
            and all(prediction in classes for prediction in it["predictions"])
            and all(0 <= probability <= 1 for probability in it["probabilities"])
            and type(it["step"]) is int
            for it in evaluation["history"]
        )
    )
    if not fits:
        raise ValueError("evaluation.json: its figures do not belong together")
    for it in (*evaluation["mistakes"], *evaluation["examples"]):
        expect(it, {"place": int, "truth": int, "image": str}, "an image in evaluation.json")
        if it["truth"] not in classes or not DATA_ADDRESS.match(it["image"]):
            raise ValueError(f"evaluation.json: no image of a class: {it['truth']}, {it['image']:.50}")
        pixels(it["image"])
    for it in evaluation["mistakes"]:
        expect(it, {"prediction": int, "second": int, "probability": float, "second_probability": float}, "a mistake")
        if it["prediction"] not in classes or it["second"] not in classes:
            raise ValueError("evaluation.json: a mistake without a class")
    for it in evaluation["examples"]:
        likeliest = it["likeliest"]
        if len(likeliest) > MOST_SHOWN or not all(number in classes and 0 <= p <= 1 for number, p in likeliest):
            raise ValueError("evaluation.json: an example without a class")


def pixels(address: str) -> "Image":
    """The image in an address that begins with `data:`; ConfigError for what snapshots.py cannot have written."""
    from PIL import Image

    try:
        # these formats alone: EPS is drawn by another program
        image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])), formats=["PNG", "JPEG"])
        if max(image.size) > LARGEST_SIDE:  # a small file may unpack to gigabytes
            raise ValueError(f"{image.width} x {image.height} pixels")
        image.load()
    except Exception as error:  # whatever a damaged file makes of a parser
        raise ConfigError(f"evaluation.json: an image in it cannot be read: {error}") from error
    return image


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    count = min(len(items), most)
    return [items[round(place * (len(items) - 1) / max(1, count - 1))] for place in range(count)]
