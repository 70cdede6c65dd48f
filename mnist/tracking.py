"""What is logged, under which key, to which trackers. The only module that knows W&B.

    with Tracking(accelerator, run.folder, "4f2a91c0", settings, ["wandb"]) as tracking:
        tracking.log({"step": 100, "epoch": 1, "train/loss": 0.5})

Every line goes to metrics.jsonl first, flushed at once, then to the trackers that Accelerate was built with
(`Accelerator(log_with=...)`). A tracker is a guest: no account, no key, no network and no server may stop a run, or
delay it by more than ten seconds at either end.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator

from mnist.errors import UserError

PROJECT = "mnist"  # the W&B project, unless WANDB_PROJECT names another
SECONDS_FOR_SERVER = 6  # W&B needs up to three more: its own start, and what it does between its waits


class Tracking:
    """The metrics of one run, written by the main process; on the others it does nothing."""

    def __init__(
        self, accelerator: Accelerator, folder: Path, run_id: str, settings: Mapping[str, Any], names: Sequence[str]
    ) -> None:
        """`run_id` is what a run that is resumed keeps."""
        self.accelerator = accelerator
        self.folder = folder
        self.run_id = run_id
        self.kept_bytes: int | None = 0  # of metrics.jsonl, until the first line of this process
        self.settings = dict(settings)
        self.names = names
        self.description = "none"
        self.warning: str | None = None  # to be shown, once
        self.sync: str | None = None
        self.sync_command: str | None = None  # sends to the server what lies on the disk only

    def __enter__(self) -> "Tracking":
        if self.accelerator.is_main_process:
            self.file = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
            if "wandb" in self.names:
                self._start_wandb()
        return self

    def state_dict(self) -> dict[str, Any]:
        """How much of metrics.jsonl, by now on the disk, there is."""
        if not self.accelerator.is_main_process:
            return {}
        self._cut()
        os.fsync(self.file.fileno())
        return {"metrics_bytes": self.file.tell()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; to be called before the first `log`."""
        self.kept_bytes = state["metrics_bytes"]

    def _cut(self) -> None:
        """Before the first line: cut off what came after the point from which the run goes on, for it comes again."""
        if self.kept_bytes is not None:
            self.file.truncate(min(self.kept_bytes, self.file.seek(0, os.SEEK_END)))
            self.file.seek(0, os.SEEK_END)
            self.kept_bytes = None

    def log(self, values: Mapping[str, Any]) -> None:
        """Log one line of numbers, `step` and `epoch` among them. Never writes NaN or infinity: ValueError."""
        if self.accelerator.is_main_process:
            self._cut()
            self.file.write(json.dumps(values, allow_nan=False) + "\n")
            self.file.flush()
            try:
                for tracker in self.accelerator.trackers:
                    tracker.log(dict(values))
            except Exception as error:  # W&B's own process is gone, out of memory for one: errors of many types
                self._lose_wandb(error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.accelerator.is_main_process:
            self.file.close()
            if self.accelerator.trackers:
                self._finish_wandb(exit_code=0 if error is None else 1)

    def _start_wandb(self) -> None:
        """Start a W&B run: online where there is a key and a server that answers, offline otherwise."""
        # W&B's own error reporting waits up to 22 s at Python's exit for a server that does not answer (measured)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if not _home_is_writable():
            os.environ.setdefault("WANDB_CACHE_DIR", str(self.folder / "wandb" / "cache"))
            os.environ.setdefault("WANDB_CONFIG_DIR", str(self.folder / "wandb" / "config"))
        try:
            import pydantic  # wandb's
            import wandb
        except ImportError as error:
            raise UserError(
                f"--trackers wandb: {error}. Install it (pip install wandb), or --trackers none."
            ) from error
        try:
            wandb.setup(wandb.Settings(silent=True))  # silent: also asks no question
        except pydantic.ValidationError as error:
            wrong = [f"WANDB_{str(it['loc'][0]).upper()}={it['input']}: {it['msg']}" for it in error.errors()]
            raise UserError(f"W&B cannot read its settings from the environment: {'; '.join(wrong)}.") from error
        except wandb.errors.UsageError as error:  # a name that W&B does not allow: WANDB_PROJECT, WANDB_RUN_ID
            raise UserError(f"W&B cannot use its settings from the environment: {_first_line(error)}.") from error
        mode, reason = None, ""
        if wandb.setup().settings.mode in ("online", "run", "shared"):
            try:
                if not wandb.login(prompt=False, verify=False):
                    mode, reason = "offline", "not logged in"
            except wandb.errors.Error as error:
                mode, reason = "offline", _first_line(error)
                self.warning = f"W&B cannot use its API key ({reason}): this run is logged offline."
        try:
            self._init_wandb(mode)
        except wandb.errors.Error as error:
            self.accelerator.trackers.clear()
            mode, reason = "offline", "the server cannot be used"
            self.warning = f"W&B cannot be reached ({_first_line(error)}): this run is logged offline."
            wandb.teardown()  # else the run's id would be in use
            self._init_wandb(mode)

        run = self.accelerator.get_tracker("wandb", unwrap=True)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        run.define_metric("test/accuracy", step_metric="step", summary="max,last")
        if run.disabled:
            self.description = "wandb, disabled"
            return
        sync_folder = Path(os.path.relpath(run.settings.sync_dir))
        sync_folder = Path(run.settings.sync_dir) if ".." in sync_folder.parts else sync_folder
        all_of_run = f"{'offline-' * run.offline}run-*-{run.id}"
        if len(list(sync_folder.parent.glob(all_of_run))) > 1:  # one for each time that the run was taken up
            self.sync = f"wandb sync {shlex.quote(str(sync_folder.parent))}/{all_of_run}"
        else:
            self.sync = f"wandb sync {shlex.quote(str(sync_folder))}"
        if run.offline:
            self.description = f"wandb, offline{f' ({reason})' if reason else ''}"
            self.sync_command = self.sync
        else:
            self.description = f"wandb, {run.url}"

    def _init_wandb(self, mode: str | None) -> None:
        # An argument beats the environment in W&B: so what the user's variables say is looked up first.
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",  # metrics are logged, not what is printed: capturing it costs ten times the printing
            init_timeout=SECONDS_FOR_SERVER,
            finish_timeout=SECONDS_FOR_SERVER,
            finish_timeout_raises=True,
        )
        keywords = {
            "mode": mode,
            "id": os.environ.get("WANDB_RUN_ID") or self.run_id,
            "resume": os.environ.get("WANDB_RESUME") or "allow",
            "name": os.environ.get("WANDB_NAME") or self.folder.name,
            "dir": os.environ.get("WANDB_DIR") or str(self.folder),
            "settings": settings,
        }
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        self.accelerator.init_trackers(project, config=self.settings, init_kwargs={"wandb": keywords})

    def _finish_wandb(self, exit_code: int) -> None:
        import wandb

        try:
            self.accelerator.get_tracker("wandb", unwrap=True).finish(exit_code=exit_code)
        except (TimeoutError, wandb.errors.Error) as error:
            self.warning = (
                f"The W&B server did not take the last of the run ({_first_line(error)}): it is kept on disk."
            )
            self.sync_command = self.sync
        except Exception as error:
            self._lose_wandb(error)

    def _lose_wandb(self, error: Exception) -> None:
        """Go on without W&B; metrics.jsonl has it all."""
        self.accelerator.trackers.clear()
        self.warning = f"W&B stopped ({_first_line(error)}): what it has of this run may lack the end."
        self.sync_command = self.sync


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")


def _home_is_writable() -> bool:
    """Whether W&B can make its cache where it would by itself, below the home folder."""
    try:
        (Path.home() / ".cache" / "wandb").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return False
    return os.access(Path.home() / ".cache" / "wandb", os.W_OK)
