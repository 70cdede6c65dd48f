"""What is logged, under which key, to which trackers.

    with Tracking(True, run.folder, "4f2a91c0", settings, ["wandb", "tensorboard"]) as tracking:
        print(tracking.start(step=0))
        tracking.log({"step": 100, "epoch": 1, "train/loss": 0.5})

Every line goes to metrics.jsonl first, flushed at once, then to the trackers under the same keys: `train/ val/ test/`
for how well it does, `optim/` for how it learns, `perf/` for how fast and with how much memory. A tracker is a guest:
no account, no key, no network and no server may stop a run. W&B has a module of its own, wandb_run.py; the others are
Accelerate's, by its names.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from mnist.data.splits import ImageData
from mnist.errors import ConfigError, UserError
from mnist.runs.record import Record
from mnist.tracking.wandb_run import Made, Used, WandbRun, first_line

PROJECT = "mnist"  # what trackers call it, unless a variable of theirs names another
PACKAGES = {"comet_ml": "comet-ml"}  # as pip calls them, where that is not the module's name
UNATTENDED = {  # what keeps a tracker from asking questions, or from waiting minutes for a server
    "mlflow": {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"},  # 247 s without (measured)
    "swanlab": {"SWANLAB_INTERACTIVE": "false", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
}


def arguments_of(name: str, folder: Path, step: int) -> dict[str, Any]:
    """What Accelerate's class of a tracker is to be built with, for the run in `folder` that goes on after `step`.

    Files go into the run's folder, but where users of a tracker expect one place for all runs.
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
        case "mlflow":  # ./mlflow.db, unless MLFLOW_TRACKING_URI says otherwise
            return {"experiment_name": PROJECT, "run_name": folder.name}
        case "swanlab":
            has_key = "SWANLAB_API_KEY" in os.environ
            mode = os.environ.get("SWANLAB_MODE") or ("cloud" if has_key else "offline")
            return {"run_name": PROJECT, "name": folder.name, "mode": mode, "log_dir": str(folder / "swanlab")}
        case _:  # trackio: a folder of its own below the user's cache
            return {"run_name": PROJECT, "name": folder.name}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError where the package of a tracker is missing; Accelerate would go on without a word."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--trackers {','.join(names)}: it cannot be done without {', '.join(missing)}. Either pip install"
            f" {' '.join(PACKAGES.get(name, name) for name in missing)}, or leave it out: --trackers none."
        )


def _overall(line: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and accuracy of each part: W&B takes a hundred keys, and so not those of each class."""
    return {key: line[key] for key in line if key.endswith(("/loss", "/accuracy"))}


class Tracking:
    """The metrics of one run, written by the main process; on the others it does nothing."""

    def __init__(
        self, writes: bool, folder: Path, run_id: str, settings: Mapping[str, Any], names: Sequence[str]
    ) -> None:
        """`run_id` is what a run that is resumed keeps."""
        self.writes = writes
        self.folder = folder
        self.run_id = run_id
        self.settings = dict(settings)
        self.names = names
        self.kept_bytes: int | None = 0  # of metrics.jsonl, until the first line of this process
        self.wandb: WandbRun | None = None
        self.others: dict[str, GeneralTracker] = {}
        self.warnings: list[str] = []  # to be shown at the end
        self.sync_command: str | None = None  # sends to the server what lies on the disk only

    def __enter__(self) -> "Tracking":
        if self.writes:
            self.file = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        return self

    def state_dict(self) -> dict[str, Any]:
        """How much of metrics.jsonl, by now on the disk, there is."""
        if not self.writes:
            return {}
        self._cut()
        os.fsync(self.file.fileno())
        return {"metrics_bytes": self.file.tell()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; to be called before `start`."""
        kept = state["metrics_bytes"]
        found = self.file.seek(0, os.SEEK_END) if self.writes else kept
        if kept < 0:
            raise ValueError(f"{kept} bytes of metrics.jsonl")
        if found < kept:
            self.warnings.append(
                f"metrics.jsonl has {found:,} of the {kept:,} bytes that it had at the checkpoint: the curves lack what"
                " is gone."
            )
        self.kept_bytes = kept

    def _cut(self) -> None:
        """Before the first line: cut off what came after the point from which the run goes on, for it comes again."""
        if self.kept_bytes is not None:
            self.file.truncate(min(self.kept_bytes, self.file.seek(0, os.SEEK_END)))
            self.file.seek(0, os.SEEK_END)
            self.kept_bytes = None

    def start(self, step: int) -> str:
        """Start the trackers of a run that goes on after `step`; what they are, for a person to read.

        Raises UserError where W&B cannot read the user's variables. Others that fail are left out, with a warning.
        """
        descriptions = []
        for name in self.names if self.writes else ():
            if name == "wandb":
                self.wandb = WandbRun(PROJECT, self.folder, self.run_id, self.settings)
                descriptions.append(self.wandb.description)
            else:
                self._guest(name, partial(self._start, name, step))
                descriptions.append(name if name in self.others else f"{name}, which failed")
        return "; ".join(descriptions) or "none"

    def _start(self, name: str, step: int) -> None:
        for variable, value in UNATTENDED.get(name, {}).items():
            os.environ.setdefault(variable, value)
        tracker = LOGGER_TYPE_TO_CLASS[name](**arguments_of(name, self.folder, step))
        tracker.start()
        self.others[name] = tracker
        if name == "tensorboard":  # Accelerate would write the settings into an event file of their own
            tracker.tracker.add_text("settings", "".join(f"    {key}: {self.settings[key]}\n" for key in self.settings))
        else:
            plain = {key: "None" if value is None else value for key, value in self.settings.items()}
            tracker.store_init_configuration(plain)

    def log(self, values: Mapping[str, Any]) -> None:
        """Log one line of numbers, `step` and `epoch` among them. Never writes NaN or infinity: ValueError."""
        if not self.writes:
            return
        self._cut()
        self.file.write(json.dumps(values, allow_nan=False) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(values)
        for name, tracker in list(self.others.items()):
            rest = {key: value for key, value in values.items() if key != "step"}
            self._guest(name, partial(tracker.log, rest, step=values["step"]))

    def log_results(self, data: ImageData) -> None:
        """At the end of a run on `data`: what it got right and wrong, and its models, for W&B."""
        if self.wandb is None:
            return
        try:
            record = Record.read(self.folder)
        except UserError as error:  # somebody has written into its files
            self.warnings.append(f"W&B was not sent the results: {error}")
            return
        if record.evaluation is None:
            return
        has_best = (self.folder / "best").exists()  # else there is nothing to choose by: the last one is the result
        models = [Made(self.folder / "best", ["best"], self.settings | _overall(record.best))] if has_best else []
        aliases = ["latest"] if has_best else ["latest", "best"]
        models.append(Made(self.folder / "model", aliases, self.settings | _overall(record.last)))
        size = {"train_images": len(data.train), "test_images": len(data.test)}
        used = Used(data.name, list(data.files), {"md5": data.checksum, **size})
        self.wandb.log_results(record.evaluation, used, models)

    def _guest(self, name: str, action: Callable[[], None]) -> None:
        """Let a tracker do something; one that fails, with errors of many types, is done without from then on."""
        try:
            action()
        except Exception as error:
            self.others.pop(name, None)
            self.warnings.append(f"{name} stopped ({first_line(error)}): metrics.jsonl has all of the run.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.writes:
            return
        self.file.close()
        for name, tracker in list(self.others.items()):
            self._guest(name, tracker.finish)
        if self.wandb is not None:
            self.wandb.finish(error)
            self.sync_command = self.wandb.sync_command
            self.warnings += [self.wandb.warning] if self.wandb.warning else []
