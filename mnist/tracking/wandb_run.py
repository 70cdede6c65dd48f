"""A run in Weights & Biases: metrics, charts, tables, artifacts. The only module that knows it.

    run = WandbRun("mnist", folder, "4f2a91c0", settings)
    run.log({"step": 100, "epoch": 1, "train/loss": 0.5})
    run.finish(None)

Online where there is a key and a server that answers, offline otherwise; neither end takes more than ten seconds, and
what fails in between ends W&B's part only. W&B's own variables are honoured: WANDB_PROJECT, WANDB_ENTITY, WANDB_TAGS,
WANDB_RUN_GROUP, WANDB_JOB_TYPE, WANDB_NOTES, WANDB_MODE, WANDB_BASE_URL and the like.
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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mnist.errors import DivergedError, UserError
from mnist.launch.signals import Interrupted
from mnist.runs.record import MOST_MOMENTS, evenly, pixels

SECONDS_FOR_SERVER = 5  # W&B needs up to three more: its own start, and what it does between its waits
SECONDS_FOR_ANSWER = 2
SECONDS_BETWEEN_QUESTIONS = 10
SECONDS_FOR_RESULTS = 2.5
SLOWEST = 1e6  # bytes a second that a model is given time for


class Used(NamedTuple):
    """A data set."""

    name: str
    files: Sequence[Path]
    metadata: Mapping[str, Any]


class Made(NamedTuple):
    """A model."""

    folder: Path
    aliases: Sequence[str]
    metadata: Mapping[str, Any]


class WandbRun:
    """Started when it is built. Raises UserError where W&B cannot use what the user's variables say."""

    def __init__(self, project: str, folder: Path, run_id: str, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run_id = run_id
        self.settings = dict(settings)
        self.project = os.environ.get("WANDB_PROJECT") or project
        self.warning: str | None = None  # to be shown, once
        self.sync_command: str | None = None  # sends to the server what lies on the disk only
        self.sync: str | None = None
        self.dotted: set[str] = set()  # metrics with a dot in their names that are defined
        self.run: Any = None
        try:
            self._start()
            self._define_metrics()
            self.description = self._describe()
        except UserError:
            raise
        except Exception as error:  # its own process cannot start, say: errors of many types
            self._lose(error)
            self.description = "wandb, which failed"

    def _start(self) -> None:
        # W&B's own error reporting waits up to 22 s at Python's exit for a server that does not answer (measured)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if not _home_is_writable():
            for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
                place = self.folder / "wandb" / variable.split("_")[1].lower()
                os.environ.setdefault(variable, str(place))
        import pydantic  # wandb's
        import wandb

        with contextlib.suppress(ImportError):  # of some versions
            from wandb.analytics.opentelemetry import opentelemetry_proxy

            # Telemetry waits for ever for a lock that is its own caller's where W&B's process cannot start (wandb 0.31)
            opentelemetry_proxy.disable()
        try:
            wandb.setup(wandb.Settings(silent=True))  # silent: also asks no question
        except pydantic.ValidationError as error:
            wrong = [f"WANDB_{str(it['loc'][0]).upper()}={it['input']}: {it['msg']}" for it in error.errors()]
            raise UserError(f"W&B cannot read its settings from the environment: {'; '.join(wrong)}.") from error
        except wandb.errors.UsageError as error:  # a name that W&B does not allow: WANDB_PROJECT, WANDB_RUN_ID
            raise UserError(f"W&B cannot use its settings from the environment: {first_line(error)}.") from error
        mode, self.reason = None, ""
        if wandb.setup().settings.mode in ("online", "run", "shared"):
            try:
                if not wandb.login(prompt=False, verify=False):
                    mode, self.reason = "offline", "not logged in"
            except wandb.errors.Error as error:
                mode, self.reason = "offline", first_line(error)
                self.warning = f"W&B cannot use its API key ({self.reason}): this run is logged offline."
        try:
            self._init(mode)
        except wandb.errors.Error as error:
            self.reason = "the server cannot be used"
            self.warning = f"W&B cannot be reached ({first_line(error)}): this run is logged offline."
            wandb.teardown()  # else the run's id would be in use
            self._init("offline")

    def _init(self, mode: Any) -> None:
        # An argument beats the environment in W&B: so what the user's variables say is looked up first.
        import wandb

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
                console="off",  # metrics are logged, not what is printed: capturing it costs ten times the printing
                init_timeout=SECONDS_FOR_SERVER,
                finish_timeout=SECONDS_FOR_SERVER,
                finish_timeout_raises=True,
            ),
        )

    def _define_metrics(self) -> None:
        """Each metric over the optimizer steps; W&B makes a section of charts of what stands before the slash."""
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("epoch", hidden=True)
        for part in ("train", "val", "test"):
            self.run.define_metric(f"{part}/loss", step_metric="step", summary="min,last")
            self.run.define_metric(f"{part}/accuracy", step_metric="step", summary="max,last")
        self.run.define_metric("val/class_accuracy/*", step_metric="step", summary="max,last")
        self.run.define_metric("test/class_accuracy/*", step_metric="step", summary="max,last")
        self.run.define_metric("optim/*", step_metric="step", summary="last")
        self.run.define_metric("perf/*", step_metric="step", summary="mean,last")

    def _describe(self) -> str:
        run = self.run
        if run.disabled:
            return "wandb, disabled"
        sync_folder = Path(os.path.relpath(run.settings.sync_dir))
        sync_folder = Path(run.settings.sync_dir) if ".." in sync_folder.parts else sync_folder
        all_of_run = f"{'offline-' * run.offline}run-*-{run.id}"
        if len(list(sync_folder.parent.glob(all_of_run))) > 1:  # one for each time that the run was taken up
            self.sync = f"wandb sync {shlex.quote(str(sync_folder.parent))}/{all_of_run}"
        else:
            self.sync = f"wandb sync {shlex.quote(str(sync_folder))}"
        if run.offline:
            self.sync_command = self.sync
            return f"wandb, offline{f' ({self.reason})' if self.reason else ''}"
        return f"wandb, {run.url}"

    def log(self, values: Mapping[str, Any]) -> None:
        """Log one line of numbers, `step` among them."""
        dotted = {name for name in values if "." in name} - self.dotted  # which the definitions' * does not meet
        self.dotted |= dotted

        def log(run: Any) -> None:
            for name in sorted(dotted):
                run.define_metric(name.replace(".", "\\."), step_metric="step", summary="max,last")
            run.log(dict(values))

        self._attempt(log)

    def log_results(self, evaluation: Mapping[str, Any], data: Used, models: Sequence[Made]) -> None:
        """What is to be seen at the end, and what the run has used and made, as artifacts.

        `evaluation` is what snapshots.py keeps in a run's folder, bounded in size: the confusion matrix becomes a
        chart, the surest mistakes and the images that are followed become tables. W&B asks the server about each of
        them; it has the time that a slow line needs, if it answers when asked now and then.
        """
        if self.run is None or self.run.disabled:
            return
        failed: list[Exception] = []
        size = sum(path.stat().st_size for model in models for path in model.folder.iterdir())

        def send(run: Any) -> None:
            makers = [*(partial(_make, run, model) for model in models), partial(_use, run, data)]  # what counts first
            for make in [*makers, partial(_log_media, run, evaluation)]:
                try:
                    artifact = make()
                    if artifact is not None and not run.offline:
                        artifact.wait()
                except Exception as error:  # of many types; what comes next may be taken all the same
                    failed.append(error)

        sending = threading.Thread(target=send, args=(self.run,), daemon=True)
        sending.start()
        latest = time.monotonic() + SECONDS_FOR_RESULTS + size / SLOWEST
        sending.join(None if self.run.offline else SECONDS_FOR_RESULTS)
        while sending.is_alive() and time.monotonic() + 1 < latest and _answers(self.run.settings.base_url):
            sending.join(min(SECONDS_BETWEEN_QUESTIONS, latest - time.monotonic()))
        if failed or sending.is_alive():
            why = first_line(failed[0]) if failed else "no answer"
            self.warning = f"W&B did not take all of the results ({why}): they are kept on disk."
            self.sync_command = self.sync

    def _attempt(self, action: Callable[[Any], object]) -> None:
        if self.run is not None:
            try:
                action(self.run)
            except Exception as error:  # W&B's own process is gone, out of memory for one: errors of many types
                self._lose(error)

    def finish(self, error: BaseException | None) -> None:
        """End the run as what became of it: finished, failed, or preempted and to be gone on with."""
        if self.run is None:
            return
        import wandb

        exit_code = 0 if error is None else 1
        try:
            if isinstance(error, Interrupted):
                if "WANDB_SWEEP_ID" not in os.environ:  # an agent that ends a bad run does not want it again
                    self.run.mark_preempting()
                exit_code = error.exit_code
            if isinstance(error, DivergedError):
                self.run.alert("Training has diverged", str(error), level="ERROR")
            self.run.finish(exit_code=exit_code)
        except (TimeoutError, wandb.errors.Error) as late:
            self.warning = f"The W&B server did not take the last of the run ({first_line(late)}): it is kept on disk."
            self.sync_command = self.sync
        except Exception as late:
            self._lose(late)

    def _lose(self, error: Exception) -> None:
        """Go on without W&B; metrics.jsonl has it all."""
        self.run = None
        self.warning = f"W&B stopped ({first_line(error)}): what it has of this run may lack the end."
        self.sync_command = self.sync


def _use(run: Any, data: Used) -> Any:
    """By reference, with the checksums of the files: no image is sent."""
    import wandb

    artifact = wandb.Artifact(artifact_name(data.name), type="dataset", metadata=dict(data.metadata))
    for path in data.files:
        artifact.add_reference(path.resolve().as_uri(), name=path.name)
    if not data.files:  # a folder of many pictures: its content is told from another's by this line
        with artifact.new_file("pixels.md5") as file:
            file.write(data.metadata["md5"])
    # what use_artifact does with a new artifact, but it refuses to offline
    return run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def artifact_name(name: str) -> str:
    """A name as W&B takes it: letters of ASCII, digits, `-_.`, 128 at most. `Übung 1` becomes `Ubung-1`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-")[:128] or "dataset"


def _make(run: Any, model: Made) -> Any:
    import wandb

    name = artifact_name(f"model-{run.id}")  # the id may be the user's, in WANDB_RUN_ID
    artifact = wandb.Artifact(name, type="model", metadata=dict(model.metadata))
    for path in sorted(model.folder.iterdir()):  # one by one, for add_dir prints what it does
        artifact.add_file(str(path))
    return run.log_artifact(artifact, aliases=list(model.aliases))


def _answers(url: str) -> bool:
    """Whether the server answers at once, whatever it says, unless that is a failure of its own."""
    try:
        with urllib.request.urlopen(url, timeout=SECONDS_FOR_ANSWER):
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
    confusion = evaluation["confusion"]
    shown, counts = confusion["names"], torch.tensor(confusion["counts"])
    cells = torch.arange(counts.numel()).repeat_interleave(counts.flatten())  # [images]: where each image is counted
    mistakes = wandb.Table(columns=["image", "truth", "prediction", "probability", "second choice", "its probability"])
    for it in evaluation["mistakes"]:
        chosen = names[it["truth"]], names[it["prediction"]], it["probability"]
        mistakes.add_data(_image(it["image"]), *chosen, names[it["second"]], it["second_probability"])
    moments = evenly(evaluation["history"], MOST_MOMENTS)
    examples = wandb.Table(columns=["image", "truth", *(f"step {moment['step']}" for moment in moments)])
    for place, it in enumerate(evaluation["examples"]):
        answers = [
            f"{names[moment['predictions'][place]]} ({moment['probabilities'][place]:.0%})" for moment in moments
        ]
        examples.add_data(_image(it["image"]), names[it["truth"]], *answers)
    return {
        "test/confusion": wandb.plot.confusion_matrix(
            y_true=(cells // len(shown)).tolist(),
            preds=(cells % len(shown)).tolist(),
            class_names=shown,
            title="Test images: true class and prediction",
        ),
        "test/mistakes": mistakes,
        "test/examples": examples,
    }


def _image(address: str) -> Any:
    import wandb

    return wandb.Image(pixels(address))


def first_line(error: Exception) -> str:
    """What an error says in its first line, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")


def _home_is_writable() -> bool:
    """Whether W&B can make its cache where it would by itself, below the home folder."""
    try:
        (Path.home() / ".cache" / "wandb").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return False
    return os.access(Path.home() / ".cache" / "wandb", os.W_OK)
