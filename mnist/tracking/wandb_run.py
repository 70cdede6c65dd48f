"""A run logged to Weights & Biases.

    run = WandbRun("mnist", folder, "4f2a91c0", settings)
    run.log({"step": 100, "epoch": 1, "train/loss": 0.5})
    run.finish(None)

The run is online if there is a key and the server answers, otherwise offline. Starting and finishing take at most ten
seconds each. Errors in between stop only the logging to W&B. W&B's own variables apply: WANDB_PROJECT, WANDB_ENTITY,
WANDB_TAGS, WANDB_RUN_GROUP, WANDB_JOB_TYPE, WANDB_NOTES, WANDB_MODE, WANDB_BASE_URL and others.
"""

import contextlib
import os
import re
import shlex
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mnist.errors import DivergedError, UserError
from mnist.launch.signals import Interrupted
from mnist.runs.record import MAX_MOMENTS, class_accuracies, downsample, pixels

SERVER_SECONDS = 5  # to which W&B adds up to three seconds
ANSWER_SECONDS = 2
POLL_SECONDS = 10
RESULTS_SECONDS = 2.5
SLOWEST_UPLOAD = 1e6  # bytes per second; gives large models time to upload


class DatasetArtifact(NamedTuple):
    name: str
    files: Sequence[Path]
    metadata: Mapping[str, Any]


class ModelArtifact(NamedTuple):
    folder: Path
    aliases: Sequence[str]
    metadata: Mapping[str, Any]


class WandbRun:
    """A W&B run, started on creation. Raises UserError if W&B rejects the user's WANDB_* variables."""

    def __init__(self, project: str, folder: Path, run_id: str, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run_id = run_id
        self.settings = dict(settings)
        self.project = os.environ.get("WANDB_PROJECT") or project
        self.warning: str | None = None  # shown once
        self.sync_command: str | None = None  # uploads a run that is only on disk
        self.sync: str | None = None
        self.dotted: set[str] = set()  # metrics with a dot in their name that are already defined
        self.run: Any = None
        try:
            self._start()
            self._define_metrics()
            self.description = self._describe()
        except UserError:
            raise
        except Exception as error:  # of many types, e.g. if W&B's process cannot start
            self._disable(error)
            self.description = "wandb (failed)"

    def _start(self) -> None:
        # at exit, W&B's error reporting waits up to 22 s (measured) for a server that does not answer
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if not _home_is_writable():
            for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
                os.environ.setdefault(variable, str(self.folder / "wandb" / variable.split("_")[1].lower()))
        import pydantic  # a dependency of wandb
        import wandb

        with contextlib.suppress(ImportError):  # not in all versions
            from wandb.analytics.opentelemetry import opentelemetry_proxy

            # wandb 0.31's telemetry deadlocks if W&B's process cannot start
            opentelemetry_proxy.disable()
        try:
            wandb.setup(wandb.Settings(silent=True))  # silent also means no prompts
        except pydantic.ValidationError as error:
            wrong = [f"WANDB_{str(item['loc'][0]).upper()}={item['input']}: {item['msg']}" for item in error.errors()]
            raise UserError(f"W&B rejects its environment variables: {'; '.join(wrong)}.") from error
        except wandb.errors.UsageError as error:  # an invalid name: WANDB_PROJECT, WANDB_RUN_ID
            raise UserError(f"W&B rejects its environment variables: {first_line(error)}.") from error
        mode, self.reason = None, ""
        if wandb.setup().settings.mode in ("online", "run", "shared"):
            try:
                if not wandb.login(prompt=False, verify=False):
                    mode, self.reason = "offline", "not logged in"
            except wandb.errors.Error as error:
                mode, self.reason = "offline", first_line(error)
                self.warning = f"W&B rejects its API key ({self.reason}); logging offline."
        try:
            self._init(mode)
        except wandb.errors.Error as error:
            self.reason = "server unavailable"
            self.warning = f"W&B is not available ({first_line(error)}); logging offline."
            wandb.teardown()  # releases the run's id
            self._init("offline")

    def _init(self, mode: Any) -> None:
        import wandb  # its arguments override the environment, so use the user's variables first

        self.run = wandb.init(
            project=self.project,
            config=self.settings,
            mode=mode,
            id=os.environ.get("WANDB_RUN_ID") or self.run_id,
            resume=os.environ.get("WANDB_RESUME") or "allow",  # type: ignore[arg-type]
            name=os.environ.get("WANDB_NAME") or self.folder.name,
            dir=os.environ.get("WANDB_DIR") or str(self.folder),
            settings=wandb.Settings(
                silent=True,
                console="off",  # capturing the output costs ten times as much as printing it
                init_timeout=SERVER_SECONDS,
                finish_timeout=SERVER_SECONDS,
                finish_timeout_raises=True,
            ),
        )

    def _define_metrics(self) -> None:
        """Plot each metric over optimizer steps; the prefix before the slash names its section of charts."""
        for name in ("step", "epoch"):
            self.run.define_metric(name, hidden=True)
        summaries = {"optim/*": "last", "perf/*": "mean,last"}
        for split in ("train", "val", "test"):
            summaries |= {f"{split}/loss": "min,last", f"{split}/accuracy": "max,last"}
        for split in ("val", "test"):
            summaries |= {f"{split}/{name}": "max,last" for name in ("macro_f1", "balanced_accuracy", "top5_accuracy")}
            summaries |= {f"{split}/class_accuracy/*": "max,last", f"{split}/calibration_error": "min,last"}
        for name, summary in summaries.items():
            self.run.define_metric(name, step_metric="step", summary=summary)

    def _describe(self) -> str:
        run = self.run
        if run.disabled:
            return "wandb (disabled)"
        folder = Path(os.path.relpath(run.settings.sync_dir))
        folder = Path(run.settings.sync_dir) if ".." in folder.parts else folder
        pattern = f"{'offline-' * run.offline}run-*-{run.id}"
        resumed = len(list(folder.parent.glob(pattern))) > 1  # each start of the run has its own folder
        self.sync = f"wandb sync {shlex.quote(str(folder.parent if resumed else folder))}{f'/{pattern}' * resumed}"
        if run.offline:
            self.sync_command = self.sync
            return f"wandb, offline{f' ({self.reason})' if self.reason else ''}"
        return f"wandb, {run.url}"

    def log(self, values: Mapping[str, Any]) -> None:
        """Log one row of numbers, including `step`."""
        if self.run is None:
            return
        dotted = {name for name in values if "." in name} - self.dotted  # not matched by the * in definitions
        self.dotted |= dotted
        try:
            for name in sorted(dotted):
                self.run.define_metric(name.replace(".", "\\."), step_metric="step", summary="max,last")
            self.run.log(dict(values))
        except Exception as error:  # of many types, e.g. if W&B's process was killed
            self._disable(error)

    def log_results(
        self, evaluation: Mapping[str, Any], data: DatasetArtifact, models: Sequence[ModelArtifact]
    ) -> None:
        """Log the confusion matrix, mistakes and example images, and the dataset and models as artifacts.

        `evaluation` is the content of evaluation.json (reporting/snapshots.py), bounded in size. Waits for the
        uploads; on a slow connection, for as long as the server keeps answering.
        """
        if self.run is None or self.run.disabled:
            return
        failed: list[Exception] = []
        size = sum(path.stat().st_size for model in models for path in model.folder.iterdir())

        def send(run: Any) -> None:
            # most important first
            makers = [*(partial(_log_model, run, model) for model in models), partial(_use_dataset, run, data)]
            for make in [*makers, partial(_log_media, run, evaluation)]:
                try:
                    artifact = make()
                    if artifact is not None and not run.offline:
                        artifact.wait()
                except Exception as error:  # of many types; the rest may still succeed
                    failed.append(error)

        sending = threading.Thread(target=send, args=(self.run,), daemon=True)
        sending.start()
        latest = time.monotonic() + RESULTS_SECONDS + size / SLOWEST_UPLOAD
        sending.join(None if self.run.offline else RESULTS_SECONDS)
        while sending.is_alive() and time.monotonic() + 1 < latest and _answers(self.run.settings.base_url):
            sending.join(min(POLL_SECONDS, latest - time.monotonic()))
        if failed or sending.is_alive():
            why = first_line(failed[0]) if failed else "no answer"
            self.warning = f"W&B did not receive all results ({why}); they are on disk."
            self.sync_command = self.sync

    def finish(self, error: BaseException | None) -> None:
        """Mark the run as finished, failed or preempted."""
        if self.run is None:
            return
        import wandb

        exit_code = 0 if error is None else 1
        try:
            if isinstance(error, Interrupted):
                if "WANDB_SWEEP_ID" not in os.environ:  # sweep agents stop bad runs, which must not be requeued
                    self.run.mark_preempting()
                exit_code = error.exit_code
            if isinstance(error, DivergedError):
                self.run.alert("Training has diverged", str(error), level="ERROR")
            self.run.finish(exit_code=exit_code)
        except (TimeoutError, wandb.errors.Error) as late:
            self.warning = f"W&B did not receive the end of the run ({first_line(late)}); it is on disk."
            self.sync_command = self.sync
        except Exception as late:
            self._disable(late)

    def _disable(self, error: Exception) -> None:
        """Continue without W&B."""
        self.run = None
        self.warning = f"W&B stopped ({first_line(error)}); its copy of the run may be incomplete. See metrics.jsonl."
        self.sync_command = self.sync


def _use_dataset(run: Any, data: DatasetArtifact) -> Any:
    """Log the files by reference with their checksums; no images are uploaded."""
    import wandb

    artifact = wandb.Artifact(artifact_name(data.name), type="dataset", metadata=dict(data.metadata))
    for path in data.files:
        artifact.add_reference(path.resolve().as_uri(), name=path.name)
    if not data.files:  # a folder of images, identified by its checksum
        with artifact.new_file("pixels.md5") as file:
            file.write(data.metadata["md5"])
    try:  # as an input of the run; offline, use_artifact cannot do this for a new artifact
        return run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    except (AttributeError, TypeError):  # private: another version of wandb may lack it
        return run.log_artifact(artifact)


def artifact_name(name: str) -> str:
    """`name` in characters that W&B accepts: ASCII letters, digits, `-_.`; 128 at most. `Übung 1` becomes `Ubung-1`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-")[:128] or "dataset"


def _log_model(run: Any, model: ModelArtifact) -> Any:
    import wandb

    name = artifact_name(f"model-{run.id}")  # the user may have set the id with WANDB_RUN_ID
    artifact = wandb.Artifact(name, type="model", metadata=dict(model.metadata))
    for path in sorted(model.folder.iterdir()):  # add_dir would print
        artifact.add_file(str(path))
    return run.log_artifact(artifact, aliases=list(model.aliases))


def _answers(url: str) -> bool:
    """Whether the server answers in time and without a server error (5xx)."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def _log_media(run: Any, evaluation: Mapping[str, Any]) -> None:
    run.log({"step": evaluation["step"], "epoch": evaluation["epoch"], **_media(evaluation)})


def _media(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    import wandb

    names = evaluation["class_names"]
    shown, counts = evaluation["confusion"]["names"], torch.tensor(evaluation["confusion"]["counts"])
    cells = torch.arange(counts.numel()).repeat_interleave(counts.flatten())  # [images]: the cell of each image
    columns: list[Any] = ["image", "true class", "prediction", "probability", "second prediction", "second probability"]
    mistakes = wandb.Table(columns=columns)
    for mistake in evaluation["mistakes"]:
        first = names[mistake["truth"]], names[mistake["prediction"]], mistake["probability"]
        second = names[mistake["second"]], mistake["second_probability"]
        mistakes.add_data(wandb.Image(pixels(mistake["image"])), *first, *second)
    moments = downsample(evaluation["history"], MAX_MOMENTS)
    examples = wandb.Table(columns=["image", "true class", *(f"step {moment['step']}" for moment in moments)])
    for index, example in enumerate(evaluation["examples"]):
        answers = [
            f"{names[moment['predictions'][index]]} ({moment['probabilities'][index]:.0%})" for moment in moments
        ]
        examples.add_data(wandb.Image(pixels(example["image"])), names[example["truth"]], *answers)
    classes = wandb.Table(columns=["class", "images", "recall", "precision", "F1"])
    for row in class_accuracies(evaluation):
        classes.add_data(*(row[name] for name in ("name", "images", "accuracy", "precision", "f1")))
    reliability = wandb.Table(columns=["probability", "accuracy", "images"])
    for images, total, right in evaluation["bins"]:
        if images:
            reliability.add_data(total / images, right / images, images)
    return {
        "test/classes": classes,
        "test/reliability": wandb.plot.scatter(reliability, "probability", "accuracy", "Reliability (test images)"),
        "test/confusion": wandb.plot.confusion_matrix(
            y_true=(cells // len(shown)).tolist(),
            preds=(cells % len(shown)).tolist(),
            class_names=shown,
            title="Confusion matrix (test images)",
        ),
        "test/mistakes": mistakes,
        "test/examples": examples,
    }


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")


def _home_is_writable() -> bool:
    """Whether W&B can create its default cache in the home folder."""
    try:
        (Path.home() / ".cache" / "wandb").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return False
    return os.access(Path.home() / ".cache" / "wandb", os.W_OK)
