"""The folder of a run: its settings and state. An existing run is never overwritten.

    config = find_run(config, explicit_settings)  # --resume: the settings of the run to resume
    with Run.open(config, data.checksum) as run:
        run.update_state(step=100, epoch=1)
    json.loads((run.folder / "state.json").read_text())["status"]     # running, finished, interrupted or failed

Programs that watch a job should read state.json, because launchers return 1 for every run that does not finish.
"""

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from filelock import FileLock

from mnist.config.settings import MAY_CHANGE, TrainConfig, is_path
from mnist.errors import ConfigError, UserError
from mnist.files import lock_folder, remove_leftovers, storage_errors, temporary_name, write_file
from mnist.launch.processes import on_main_process
from mnist.launch.signals import Interrupted, launcher_command
from mnist.launch.streams import lost_output
from mnist.runs.record import read_state

SECONDS_BETWEEN_HEARTBEATS = 10.0


def find_run(config: TrainConfig, explicit_settings: Collection[str]) -> TrainConfig:
    """The settings to train with: those of the run to resume, if there is one. All processes must call this.

    That run is the one given by --resume, or the one that this job started before torchrun restarted it. Only the main
    process looks, because other machines may not have the folder. `explicit_settings` are those named on the command
    line. Raises ConfigError if there is no such run or if an explicit setting must not change.
    """
    return on_main_process(lambda: _find(config, explicit_settings))


def find_run_here(config: TrainConfig, explicit_settings: Collection[str]) -> TrainConfig:
    """Like `find_run`, but before the processes have joined, and only on this machine. Leaves errors to `find_run`."""
    with contextlib.suppress(UserError, OSError):
        return _find(config, explicit_settings)
    return config


def _find(config: TrainConfig, explicit_settings: Collection[str]) -> TrainConfig:
    folder, parent = None, Path(config.output_dir)
    if config.resume not in (None, "auto"):
        folder = Path(str(config.resume)).resolve()
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"--resume {config.resume}: no run there (config.yaml is missing). Name the folder of a run, e.g."
                f" {parent / 'latest'}, or use `auto` with --run-name."
            )
    elif config.resume == "auto":
        if config.run_name is None:
            raise ConfigError("--resume auto: requires --run-name NAME.")
        folder = parent / config.run_name
    elif os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        folder = _folder_of_job(parent)
    if folder is None or not (folder / "config.yaml").is_file():
        return dataclasses.replace(config, resume=None)
    resumed = TrainConfig.load(folder / "config.yaml").resumed(config, explicit_settings, folder)
    # config.yaml may have only the batch size per process, and the number of processes may have changed since
    saved = read_state(folder / "environment.json").get("global_batch_size")
    return resumed if saved is None else dataclasses.replace(resumed, global_batch_size=saved)


def has_checkpoint(config: TrainConfig) -> bool:
    """Whether this run is resumed from a checkpoint. All processes must call this."""
    folder = Path(config.resume or "") / "checkpoints"
    return config.resume is not None and on_main_process(lambda: any(folder.glob("step-*")))


def job_id() -> str | None:
    """Identifies a torchrun job across its restarts: its rendezvous id and its launcher."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    launcher = psutil.Process(os.getppid())
    origin = f"{socket.gethostname()}, process {launcher.pid} since {launcher.create_time():.2f}"
    return f"{os.environ['TORCHELASTIC_RUN_ID']} on {origin}"


def _folder_of_job(parent: Path) -> Path | None:
    """The run that this job started before it was restarted."""
    for path in parent.glob("*/state.json"):
        if (job := read_state(path).get("job")) is not None and job == job_id():
            return path.parent.resolve()
    return None


@dataclass
class Run:
    """A run's folder and state. All processes know the path; only the main process writes."""

    folder: Path = Path()
    writes: bool = False
    state: dict[str, Any] = field(default_factory=dict, init=False)
    lock: FileLock | None = field(default=None, init=False)
    resume_command: str = field(default="", init=False)
    updated_at: float = field(default=0.0, init=False)  # by time.monotonic()
    identity: tuple[int, int] | None = field(default=None, init=False)  # device and inode, to detect that it was moved
    warnings: list[str] = field(default_factory=list, init=False)  # shown at the end

    @classmethod
    def open(cls, config: TrainConfig, dataset_md5: str) -> "Run":
        """Create a run, or resume the one that `find_run` returned. All processes must call this.

        Raises ConfigError if the folder already exists or the images have changed since the run began, UserError if the
        folder cannot be written or another job is using it.
        """
        opened: list[Run] = []  # its lock cannot be sent to other processes

        def open_here() -> Path:
            opened.append(cls.reopen(config, dataset_md5) if config.resume else cls.create(config))
            return opened[0].folder

        folder = on_main_process(open_here)
        return opened[0] if opened else cls(folder)

    @classmethod
    def create(cls, config: TrainConfig) -> "Run":
        """Create `<output_dir>/<run_name>/` with config.yaml, and point `<output_dir>/latest` to it."""
        parent = Path(config.output_dir)
        name = config.run_name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = None
        try:
            run = cls(_make_folder(parent, name, config), writes=True)
            run._lock_and_start()
        except FileExistsError as error:
            raise ConfigError(
                f"--run-name {name}: {parent / name} already exists and is not overwritten. Choose another name, omit"
                f" the flag, or resume that run: --resume {shlex.quote(str(parent / name))}."
            ) from error
        except OSError as error:
            if run is not None:
                shutil.rmtree(run.folder, ignore_errors=True)
            raise UserError(
                f"--output-dir {parent}: cannot be written ({error}). Try another one: --output-dir /tmp/runs."
            ) from error
        return run

    @classmethod
    def reopen(cls, config: TrainConfig, dataset_md5: str) -> "Run":
        """Resume the run in the folder `config.resume`, and save the settings that have changed."""
        folder = Path(str(config.resume))
        _check_files(folder)
        if (path := folder / "environment.json").is_file():
            environment = read_state(path)
            before = environment.get("dataset_md5")
            if before is None:
                raise UserError(
                    f"{path}: cannot be read, but holds the checksum of this run's images. Restore it from a backup,"
                    " or start a new run."
                )
            if before != dataset_md5 and "version" not in environment and is_path(config.dataset):
                raise ConfigError(
                    f"--resume {folder}: was started by a version of this project that did not normalize the images"
                    " of a folder, and cannot be resumed. Its model still works. Start a new run."
                )
            if before != dataset_md5:
                raise ConfigError(
                    f"--resume {folder}: the images of {config.dataset} have changed since the run began (MD5 {before},"
                    f" now {dataset_md5}). Restore them, or start a new run."
                )
        run = cls(folder, writes=True)
        with storage_errors(folder, "try again"):
            run._lock_and_start()
            saved = TrainConfig.load(folder / "config.yaml")
            changed = {name: getattr(config, name) for name in MAY_CHANGE}
            write_file(folder / "config.yaml", dataclasses.replace(saved, **changed).to_yaml())
        return run

    @property
    def id(self) -> str:
        """Identifies this run, also after it is resumed. Only the main process has it."""
        return str(self.state.get("id", ""))

    def _lock_and_start(self) -> None:
        """Lock the folder, read the state and mark the run as running."""
        path = self.folder / "state.json"
        holder = read_state(path).get("process")
        self.lock = lock_folder(self.folder, f", process {holder}" if holder else "")
        if self.lock is None:
            self.warnings.append(f"{self.folder}: its file system has no locks. Run only one job in this folder.")
        self.identity = _identity(self.folder)
        remove_leftovers(self.folder)
        self.state = {"id": secrets.token_hex(4), "checkpoint": None, "step": 0, "epoch": 0} | read_state(path)
        self.resume_command = shlex.join([*_script_command(), "--resume", _as_typed(self.folder)])
        earlier = self.state.get("commands")
        earlier = [command for command in earlier if isinstance(command, str)] if isinstance(earlier, list) else []
        commands = [*earlier, shlex.join([*_script_command(), *sys.argv[1:]])]
        try:
            _point_latest(self.folder)
        except OSError as error:
            latest = self.folder.with_name("latest")
            self.warnings.append(f"{latest} does not point to this run: {error.strerror}.")
        started = {"job": job_id(), "process": f"{os.getpid()} on {socket.gethostname()}", "commands": commands}
        self.update_state(status="running", error=None, exit_code=None, **started)

    def write_environment(self, environment: Mapping[str, Any], skipped: Collection[tuple[str, str]] = ()) -> None:
        """Write environment.json, and skipped.txt: (name, reason) of each skipped file of the dataset."""
        if self.writes:
            write_file(self.folder / "environment.json", json.dumps(environment, indent=2) + "\n")
        if self.writes and skipped:
            write_file(self.folder / "skipped.txt", "".join(f"{name}: {reason}\n" for name, reason in skipped))

    def update_state(self, **values: Any) -> None:
        """Update state.json atomically with these values."""
        if self.writes:
            self.check_folder()
            self.state |= values | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            if lost := lost_output():
                self.state["output"] = lost
            write_file(self.folder / "state.json", json.dumps(self.state, indent=2) + "\n")
            self.updated_at = time.monotonic()

    def check_folder(self) -> None:
        """Before a write: raise UserError if the folder was moved or removed during the run."""
        if self.identity is None or (identity := _identity(self.folder)) == self.identity:
            return
        if read_state(self.folder / "state.json").get("id") != self.id:
            raise UserError(
                f"{self.folder}: was moved or removed during the run. No further files will be written. If it was"
                " moved, resume from its new place: --resume PATH"
            )
        self.identity = identity  # some network file systems change inode numbers

    @property
    def heartbeat_due(self) -> bool:
        """Whether state.json is due for a heartbeat.

        The training loop itself must check this: a separate thread would keep updating while the loop hangs.
        """
        return self.writes and time.monotonic() - self.updated_at > SECONDS_BETWEEN_HEARTBEATS

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status, reason, exit_code = "finished", None, 0
        if isinstance(error, Interrupted):
            status, reason, exit_code = "interrupted", error.signal, error.exit_code
            if self.writes:
                error.message = f"\nInterrupted by {error.signal}. To resume:\n{self.resume_command}\n"
        elif error is not None:
            status, reason = "failed", f"{type(error).__name__}: {error}"
            exit_code = error.exit_code if isinstance(error, UserError) else 1
        with storage_errors(self.folder, f"resume: {self.resume_command}"):
            if isinstance(error, OSError):
                self.check_folder()
            try:
                self.update_state(status=status, error=reason, exit_code=exit_code)
            except (OSError, UserError):  # the first error is the one to report
                if error is None:
                    raise
            finally:
                if self.lock is not None:
                    self.lock.release()
            if isinstance(error, OSError):
                raise error


def _script_command() -> list[str]:
    """The command that started this process, up to and including the script."""
    return launcher_command() or ["python", _as_typed(Path(sys.argv[0]))]


def _as_typed(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative


def _make_folder(parent: Path, name: str, config: TrainConfig) -> Path:
    """Create a folder with config.yaml. If it exists, raise FileExistsError, or number the default name."""
    parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(parent / name, "new")
    temporary.mkdir()
    try:
        write_file(temporary / "config.yaml", config.to_yaml())
        attempt = 1
        while True:  # two jobs may start in the same second
            folder = parent / (name if attempt == 1 else f"{name}-{attempt}")
            try:
                return temporary.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                if config.run_name is not None:
                    raise FileExistsError(folder) from error
                attempt += 1
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _point_latest(folder: Path) -> None:
    latest = folder.with_name("latest")
    if latest.exists() and not latest.is_symlink():  # not created by a run
        raise FileExistsError(errno.EEXIST, "it is a file or folder, not a link")
    link = temporary_name(latest, "new")
    link.symlink_to(folder.name)
    try:
        os.replace(link, latest)
    except OSError:
        link.unlink(missing_ok=True)
        raise


def _check_files(folder: Path) -> None:
    """Raise UserError for a pipe, which could be read forever, or a folder in the place of a file."""
    for path in folder.iterdir():
        is_data = path.suffix in (".json", ".jsonl", ".yaml", ".txt")
        if path.exists() and not path.is_file() and (is_data or not path.is_dir()):
            raise UserError(f"{path}: must be a regular file. Remove it.")


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
