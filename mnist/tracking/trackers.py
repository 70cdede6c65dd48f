"""Log metrics to metrics.jsonl and to trackers, which are chosen by name.

    with Tracking(True, run.folder, "4f2a91c0", settings, ["wandb", "tensorboard"]) as tracking:
        print(tracking.start(step=0))
        tracking.log({"step": 100, "epoch": 1, "train/loss": 0.5})

Every row is written and flushed to metrics.jsonl first, then sent to the trackers under the same keys: `train/ val/
test/` for loss and accuracy, `optim/` for the optimizer, `perf/` for speed and memory. No account, key, network or
server is needed, and a tracker that fails does not stop the run. W&B is in wandb_run.py; the others are Accelerate's.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from mnist.data.splits import ImageData
from mnist.errors import ConfigError, UserError
from mnist.runs.record import Record
from mnist.tracking.wandb_run import DatasetArtifact, ModelArtifact, WandbRun, first_line

PROJECT = "mnist"  # the trackers' default project
PACKAGES = {"comet_ml": "comet-ml"}  # name for pip, if different from the module's
UNATTENDED = {  # variables that prevent prompts and long waits for a server
    "mlflow": {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"},  # otherwise 247 s, measured
    "swanlab": {"SWANLAB_INTERACTIVE": "false", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
}


def arguments_of(name: str, folder: Path, step: int) -> dict[str, Any]:
    """The arguments of Accelerate's tracker class for the run in `folder`, which continues after `step`.

    Files go into the run's folder, unless the tracker has one place for all runs.
    """
    match name:
        case "tensorboard":
            return {"run_name": "tensorboard", "logging_dir": str(folder), "purge_step": step + 1}
        case "aim":  # ./.aim
            quiet = {"system_tracking_interval": None, "capture_terminal_logs": False}
            return {"run_name": folder.name, "logging_dir": ".", "experiment": PROJECT, **quiet}
        case "clearml":
            return {"project_name": PROJECT, "task_name": folder.name}
        case "comet_ml":
            import comet_ml

            settings = comet_ml.ExperimentConfig(name=folder.name, offline_directory=str(folder / "comet"))
            has_key = bool(comet_ml.get_config("comet.api_key"))
            return {"run_name": PROJECT, "online": None if has_key else False, "experiment_config": settings}
        case "dvclive":
            return {"dir": str(folder / "dvclive"), "dvcyaml": None, "save_dvc_exp": False, "resume": step > 0}
        case "mlflow":  # ./mlflow.db, unless MLFLOW_TRACKING_URI is set
            return {"experiment_name": PROJECT, "run_name": folder.name}
        case "swanlab":
            has_key = "SWANLAB_API_KEY" in os.environ
            mode = os.environ.get("SWANLAB_MODE") or ("cloud" if has_key else "offline")
            return {"run_name": PROJECT, "name": folder.name, "mode": mode, "log_dir": str(folder / "swanlab")}
        case "trackio":  # its own folder in the user's cache
            return {"run_name": PROJECT, "name": folder.name}
    raise AssertionError(f"{name}: not a tracker of CHOICES")


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if a tracker's package is missing; Accelerate would silently skip it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--trackers {','.join(names)}: {', '.join(missing)} not installed. Run: pip install"
            f" {' '.join(PACKAGES.get(name, name) for name in missing)} (or drop it from --trackers)."
        )


def _overall(line: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and accuracy of each split, without the accuracy per class: W&B allows 100 metadata keys."""
    return {key: line[key] for key in line if key.endswith(("/loss", "/accuracy"))}


class Tracking:
    """Logs the metrics of one run in the main process; does nothing in the others."""

    def __init__(
        self, writes: bool, folder: Path, run_id: str, settings: Mapping[str, Any], names: Sequence[str]
    ) -> None:
        """`run_id` stays the same when the run is resumed."""
        self.writes = writes
        self.folder = folder
        self.run_id = run_id
        self.settings = dict(settings)
        self.names = names
        self.kept_bytes: int | None = 0  # size of metrics.jsonl at the checkpoint; None once this process has written
        self.wandb: WandbRun | None = None
        self.others: dict[str, GeneralTracker] = {}
        self.resume_notes: list[str] = []  # shown when the run is resumed
        self.warnings: list[str] = []  # shown at the end of the run
        self.sync_command: str | None = None  # uploads a W&B run that is only on disk

    def __enter__(self) -> "Tracking":
        if self.writes:
            self.file = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        return self

    def state_dict(self) -> dict[str, Any]:
        """The length of metrics.jsonl, after flushing it to disk."""
        if not self.writes:
            return {}
        self._cut()
        os.fsync(self.file.fileno())
        return {"metrics_bytes": self.file.tell()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Call this before `start`. Raises ValueError for a negative length."""
        kept = state["metrics_bytes"]
        size = self.file.seek(0, os.SEEK_END) if self.writes else kept
        if kept < 0:
            raise ValueError(f"{kept} bytes of metrics.jsonl")
        if size < kept:
            self.resume_notes.append(
                f"metrics.jsonl has {size:,} of the {kept:,} bytes it had at the checkpoint; the curves are incomplete."
            )
        self.kept_bytes = kept

    def _cut(self) -> None:
        """Before the first row, remove the rows after the checkpoint, because they will be logged again."""
        if self.kept_bytes is not None:
            self.file.truncate(min(self.kept_bytes, self.file.seek(0, os.SEEK_END)))
            self.file.seek(0, os.SEEK_END)
            self.kept_bytes = None

    def start(self, step: int) -> str:
        """Start the trackers of a run that continues after `step`; returns their description.

        Raises UserError if W&B rejects the user's WANDB_* variables. Other failing trackers are dropped with a warning.
        """
        descriptions = []
        for name in self.names if self.writes else ():
            if name == "wandb":
                self.wandb = WandbRun(PROJECT, self.folder, self.run_id, self.settings)
                descriptions.append(self.wandb.description)
            else:
                self._attempt(name, partial(self._start, name, step))
                descriptions.append(name if name in self.others else f"{name} (failed)")
        return "; ".join(descriptions) or "none"

    def _start(self, name: str, step: int) -> None:
        for variable, value in UNATTENDED.get(name, {}).items():
            os.environ.setdefault(variable, value)
        tracker = LOGGER_TYPE_TO_CLASS[name](**arguments_of(name, self.folder, step))
        tracker.start()
        self.others[name] = tracker
        if name == "tensorboard":  # Accelerate would write the settings to a second event file
            tracker.tracker.add_text("settings", "".join(f"    {key}: {self.settings[key]}\n" for key in self.settings))
        else:
            plain = {key: "None" if value is None else value for key, value in self.settings.items()}
            tracker.store_init_configuration(plain)

    def log(self, values: Mapping[str, Any]) -> None:
        """Log one row of numbers, including `step` and `epoch`. Raises ValueError for NaN and infinity."""
        if not self.writes:
            return
        self._cut()
        self.file.write(json.dumps(values, allow_nan=False) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(values)
        for name, tracker in list(self.others.items()):
            without_step = {key: value for key, value in values.items() if key != "step"}
            self._attempt(name, partial(tracker.log, without_step, step=values["step"]))

    def log_results(self, data: ImageData) -> None:
        """Log the run's last evaluation, its models and a reference to `data` to W&B, at the end of a run."""
        if self.wandb is None:
            return
        try:
            record = Record.read(self.folder)
        except UserError as error:  # e.g. an edited file
            self.warnings.append(f"W&B did not receive the results: {error}")
            return
        if record.evaluation is None:
            return
        has_best = (self.folder / "best").exists()  # without a validation split, the last weights count as the best
        last = self.folder / "model", ["latest"] if has_best else ["latest", "best"], record.last
        saved = [(self.folder / "best", ["best"], record.best), last] if has_best else [last]
        models = [ModelArtifact(folder, aliases, self.settings | _overall(line)) for folder, aliases, line in saved]
        size = {"train_images": len(data.train), "test_images": len(data.test)}
        dataset = DatasetArtifact(data.name, list(data.files), {"md5": data.checksum, **size})
        self.wandb.log_results(record.evaluation, dataset, models)

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        """Call a tracker; if it raises anything, drop it with a warning."""
        try:
            action()
        except Exception as error:
            self.others.pop(name, None)
            self.warnings.append(f"{name} stopped ({first_line(error)}); see metrics.jsonl for the whole run.")

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not self.writes:
            return
        self.file.close()
        for name, tracker in list(self.others.items()):
            self._attempt(name, tracker.finish)
        if self.wandb is not None:
            self.wandb.finish(error)
            self.sync_command = self.wandb.sync_command
            self.warnings += [self.wandb.warning] if self.wandb.warning else []
