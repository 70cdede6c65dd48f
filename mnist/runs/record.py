"""A run's folder, read back: settings, state, metrics, the last evaluation. Loads quickly, for torch is not needed.

record = Record.read(Path("runs/latest"))
record.last["test/accuracy"], record.status
[found.name for found in find_records(Path("runs"))]
"""

import base64
import io
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mnist.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_POINTS = 1000  # of a curve, in a report
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
        import yaml

        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: no run is there, for it has no config.yaml. `mnist runs` lists them.")
        try:
            config = dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
            state, environment, evaluation = (
                _read_json(folder / f"{name}.json") for name in ("state", "environment", "evaluation")
            )
            lines = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
            if not {"epochs", "recipe", "dataset", "model"} <= config.keys() or not all(
                "step" in line for line in lines
            ):
                raise ValueError("it is not of this version")
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ConfigError(f"{folder}: a file of this run cannot be read: {' '.join(str(error).split())}") from error
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
        status = str(self.state.get("status", "unknown"))
        if status == "running":
            process, _, host = str(self.state.get("process", "")).partition(" on ")
            if host == socket.gethostname() and not (process.isdecimal() and psutil.pid_exists(int(process))):
                return "killed"
        return status


def read_state(path: Path) -> dict[str, Any]:
    """What a state.json says; nothing where it is none, or cannot be read: other programs may call a file so too."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
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
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _read_json(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def pixels(address: str) -> "Image":
    """The image in an address that begins with `data:`."""
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, from the first to the last, as far apart as can be."""
    count = min(len(items), most)
    return [items[round(place * (len(items) - 1) / max(1, count - 1))] for place in range(count)]
