"""Accelerate's trackers besides W&B and TensorBoard, offline, read back with their own tools.

Needs large packages: `pip install -e '.[test,trackers]'` before `make test-slow`.
"""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mnist.config.settings import PROJECT_FOLDER

Points = dict[str, list[tuple[int, float]]]  # step and value by key

LOG = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from mnist.tracking.trackers import Tracking

Accelerator(cpu=True)
folder = Path("named").resolve()
folder.mkdir()
settings = {"learning_rate": 1e-3, "batch_size": 10, "resume": None, "recipe": "tutorial", "git_dirty": True}
with Tracking(True, folder, "7f3e", settings, [sys.argv[1]]) as tracking:
    described = tracking.start(0)
    for step in (100, 200, 300):
        values = {"train/loss": 50 / step, "test/accuracy": 0.5, "test/class_accuracy/T-shirt/top": 0.25}
        tracking.log({"step": step, "epoch": 1, **values})
print("outcome", json.dumps([described, tracking.warnings]))
"""
EXPECTED: Points = {
    "epoch": [(100, 1), (200, 1), (300, 1)],
    "train/loss": [(100, 0.5), (200, 0.25), (300, 50 / 300)],
    "test/accuracy": [(100, 0.5), (200, 0.5), (300, 0.5)],
    "test/class_accuracy/T-shirt/top": [(100, 0.25), (200, 0.25), (300, 0.25)],
}


def of_mlflow(place: Path) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    (experiment,) = (it for it in client.search_experiments() if it.name == "mnist")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "named"
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: [(it.step, it.value) for it in points] for key, points in history.items()}


def of_trackio(place: Path) -> Points:
    # its folder is chosen when it is imported
    script = "import json; from trackio.sqlite_storage import SQLiteStorage as storage\n"
    script += "print(json.dumps(storage.get_logs('mnist', 'named')))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment(place), capture_output=True, text=True, check=True)
    lines = json.loads(done.stdout.splitlines()[-1])
    return {key: [(line["step"], line[key]) for line in lines] for key in lines[0] if "/" in key or key == "epoch"}


def of_dvclive(place: Path) -> Points:
    root, found = place / "named" / "dvclive" / "plots" / "metrics", {}
    for path in root.rglob("*.tsv"):
        rows = list(csv.reader(path.open(), delimiter="\t"))[1:]
        found[str(path.relative_to(root).with_suffix(""))] = [(int(step), float(value)) for step, value in rows]
    return found


def of_comet(place: Path) -> Points:
    (path,) = (place / "named" / "comet").glob("*.zip")
    found: Points = {}
    for line in zipfile.ZipFile(path).read("messages.json").decode().splitlines():
        message = json.loads(line)
        if message["type"] == "metric_msg":
            metric = message["payload"]["metric"]
            found.setdefault(metric["metricName"], []).append((metric["step"], metric["metricValue"]))
    return {key: points for key, points in found.items() if key in EXPECTED}  # without Comet's own


def of_clearml(place: Path) -> Points:
    (path,) = place.glob("clearml/offline/*/metrics.jsonl")
    found: Points = {}
    for line in path.read_text().splitlines():
        for event in json.loads(line):
            if event["type"] == "training_stats_scalar":
                found.setdefault(event["metric"], []).append((event["iter"], event["value"]))
    return {key: points for key, points in found.items() if key in EXPECTED}


def of_swanlab(place: Path) -> Points:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (path,) = place.glob("named/swanlab/run-*/run-*.swanlab")
    reader, found = DataStoreReader(), {}  # type: ignore[var-annotated]
    reader.open(str(path))
    for content in reader:
        record = Record()
        record.ParseFromString(content)
        if record.HasField("scalar"):
            scalar = record.scalar
            found.setdefault(scalar.key, []).append((scalar.step, scalar.value.number))
    return found


def of_aim(place: Path) -> Points:
    subprocess.run([Path(sys.executable).parent / "aim", "storage", "reindex", "-y"], cwd=place, check=True)
    from aim import Repo

    found = {}
    for run in Repo(str(place)).iter_runs():
        assert run.name == "named"
        for metric in run.metrics():
            steps, (values, *_) = metric.data.items_list()
            found[metric.name] = list(zip(steps, values, strict=True))
    return found


READERS: dict[str, Callable[[Path], Points]] = {
    "aim": of_aim,
    "clearml": of_clearml,
    "comet_ml": of_comet,
    "dvclive": of_dvclive,
    "mlflow": of_mlflow,
    "swanlab": of_swanlab,
    "trackio": of_trackio,
}


def environment(place: Path) -> dict[str, str]:
    offline = {"CLEARML_OFFLINE_MODE": "1", "CLEARML_CACHE_DIR": str(place / "clearml")}
    return os.environ | {"HOME": str(place / "home"), "PYTHONPATH": str(PROJECT_FOLDER)} | offline


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_tracker_logs_the_same_values_under_the_same_keys_without_prompts(name: str, tmp_path: Path) -> None:
    assert importlib.util.find_spec(name), "pip install -e '.[trackers]'"
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOG, name],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (outcome,) = (line.removeprefix("outcome ") for line in done.stdout.splitlines() if line.startswith("outcome "))
    assert json.loads(outcome) == [name, []]
    assert READERS[name](tmp_path) == EXPECTED
