"""The folder of a run: made once, never overwritten, with the settings and the state of the run in it.

    config = find_run(config, given)              # --resume: the settings of the run that goes on
    with Run.open(config) as run:
        run.note(step=100, epoch=1)
    json.loads((run.folder / "state.json").read_text())["status"]     # running, finished, interrupted or failed

state.json is the truth for whatever watches the job: launchers turn every exit code into 1.
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


def find_run(config: TrainConfig, given: Collection[str]) -> TrainConfig:
    """The settings to train with: those of the run that is to go on, if there is one; all processes must call it.

    That is what --resume names, or what torchrun has started before, when it has restarted these processes. `given`
    are the settings that the command line names. Only the main process looks: the others may be on machines that do
    not have the folder. Raises ConfigError where there is no such run, or a setting of it cannot be changed.
    """
    return on_main_process(lambda: _find(config, given))


def find_run_here(config: TrainConfig, given: Collection[str]) -> TrainConfig:
    """The same before the processes have met, as far as this machine has the folder; errors are left to `find_run`."""
    with contextlib.suppress(UserError, OSError):
        return _find(config, given)
    return config


def _find(config: TrainConfig, given: Collection[str]) -> TrainConfig:
    folder, parent = None, Path(config.output_dir)
    if config.resume not in (None, "auto"):
        folder = Path(str(config.resume)).resolve()
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"--resume {config.resume}: no run is there, for it has no config.yaml. Name the folder of one, as"
                f" {parent / 'latest'}, or `auto` with --run-name."
            )
    elif config.resume == "auto":
        if config.run_name is None:
            raise ConfigError("--resume auto: needs --run-name NAME, by which the run is found again.")
        folder = parent / config.run_name
    elif os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        folder = _folder_of_job(parent)
    if folder is None or not (folder / "config.yaml").is_file():
        return dataclasses.replace(config, resume=None)
    resumed = TrainConfig.load(folder / "config.yaml").resumed(config, given, folder)
    # config.yaml has what was asked for: perhaps a batch size per process, of another number of processes than now
    began_with = read_state(folder / "environment.json").get("global_batch_size")
    return resumed if began_with is None else dataclasses.replace(resumed, global_batch_size=began_with)


def has_checkpoint(config: TrainConfig) -> bool:
    """Whether the run to be resumed has a checkpoint, from which its weights come; all processes must call it.

    One that was ended before its first checkpoint starts as it did before.
    """
    folder = Path(config.resume or "") / "checkpoints"
    return config.resume is not None and on_main_process(lambda: any(folder.glob("step-*")))


def job_id() -> str | None:
    """What all restarts of a torchrun job have in common, and no other job: its rendezvous and its launcher."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    launcher = psutil.Process(os.getppid())
    place = f"{socket.gethostname()}, process {launcher.pid} since {launcher.create_time():.2f}"
    return f"{os.environ['TORCHELASTIC_RUN_ID']} on {place}"


def _folder_of_job(parent: Path) -> Path | None:
    """The run that this job began before it was restarted."""
    for path in parent.glob("*/state.json"):
        if (job := read_state(path).get("job")) is not None and job == job_id():
            return path.parent.resolve()
    return None


@dataclass
class Run:
    """A run's folder and its state. Only the main process writes; the others carry the same folder's name."""

    folder: Path = Path()
    writes: bool = False
    state: dict[str, Any] = field(default_factory=dict, init=False)
    lock: FileLock | None = field(default=None, init=False)
    resume_command: str = field(default="", init=False)
    noted_at: float = field(default=0.0, init=False)  # by time.monotonic()
    identity: tuple[int, int] | None = field(default=None, init=False)  # device and inode: known if it is moved
    warnings: list[str] = field(default_factory=list, init=False)  # to be shown at the end

    @classmethod
    def open(cls, config: TrainConfig, dataset_md5: str) -> "Run":
        """Make a run, or take up the one that `find_run` has found; all processes must call it.

        Raises ConfigError for a name that holds a run already and for one that was trained on other images, UserError
        for a folder that cannot be written or that another job is using.
        """
        opened: list[Run] = []  # a lock cannot be sent

        def open_here() -> Path:
            opened.append(cls.reopen(config, dataset_md5) if config.resume else cls.create(config))
            return opened[0].folder

        folder = on_main_process(open_here)
        return opened[0] if opened else cls(folder)

    @classmethod
    def create(cls, config: TrainConfig) -> "Run":
        """Make `<output_dir>/<run_name>/` with config.yaml, and let `<output_dir>/latest` point to it."""
        parent = Path(config.output_dir)
        name = config.run_name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = None
        try:
            run = cls(_make_folder(parent, name, config), writes=True)
            run._take()
        except FileExistsError as error:
            raise ConfigError(
                f"--run-name {name}: {parent / name} holds a run already, and nothing is overwritten. Choose another"
                " name, leave the flag away for one made from the time, or go on with that run: --resume"
                f" {shlex.quote(str(parent / name))}."
            ) from error
        except OSError as error:
            if run is not None:  # nobody would know what it is
                shutil.rmtree(run.folder, ignore_errors=True)
            raise UserError(
                f"--output-dir {parent}: cannot be written ({error}). Name one that can: --output-dir /tmp/runs."
            ) from error
        return run

    @classmethod
    def reopen(cls, config: TrainConfig, dataset_md5: str) -> "Run":
        """Take up the run in the folder `config.resume`, with what of its settings has changed."""
        folder = Path(str(config.resume))
        _check_files(folder)
        if (folder / "environment.json").is_file():
            environment = read_state(folder / "environment.json")
            before = environment.get("dataset_md5")
            if before is None:
                raise UserError(
                    f"{folder / 'environment.json'}: cannot be read. It says on which images this run began: restore it"
                    " from a backup, or start another run."
                )
            if before != dataset_md5 and "version" not in environment and is_path(config.dataset):
                raise ConfigError(
                    f"--resume {folder}: an earlier version of this project began this run, whose networks took the"
                    " images of a folder as they are, not normalized. It cannot go on; its model can be applied. Start"
                    " another run."
                )
            if before != dataset_md5:
                raise ConfigError(
                    f"--resume {folder}: this run began with other images than {config.dataset} has now (MD5 {before},"
                    f" now {dataset_md5}). Put them back as they were, or start another run."
                )
        run = cls(folder, writes=True)
        with storage_errors(folder, "try again"):
            run._take()
            saved = TrainConfig.load(folder / "config.yaml")
            changed = {name: getattr(config, name) for name in MAY_CHANGE}
            write_file(folder / "config.yaml", dataclasses.replace(saved, **changed).to_yaml())
        return run

    @property
    def id(self) -> str:
        """What tells this run from all others, the same whenever it is taken up again; only the main process has it."""
        return str(self.state.get("id", ""))

    def _take(self) -> None:
        """Lock the folder, see where the run is, and say that it is running."""
        path = self.folder / "state.json"

        holder = read_state(path).get("process")
        self.lock = lock_folder(self.folder, f", process {holder}" if holder else "")
        if self.lock is None:
            self.warnings.append(f"{self.folder}: its file system knows no locks. Do not start two jobs in it.")
        self.identity = _identity(self.folder)
        remove_leftovers(self.folder)
        self.state = {"id": secrets.token_hex(4), "checkpoint": None, "step": 0, "epoch": 0} | read_state(path)
        self.resume_command = shlex.join([*_script_command(), "--resume", _as_typed(self.folder)])
        earlier = self.state.get("commands")
        earlier = [it for it in earlier if isinstance(it, str)] if isinstance(earlier, list) else []
        commands = [*earlier, shlex.join([*_script_command(), *sys.argv[1:]])]
        try:
            _point_latest(self.folder)
        except OSError as error:  # a convenience
            latest = self.folder.with_name("latest")
            self.warnings.append(f"{latest} does not lead to this run: {error.strerror}.")
        process = f"{os.getpid()} on {socket.gethostname()}"
        self.note(status="running", error=None, exit_code=None, job=job_id(), process=process, commands=commands)

    def describe(self, environment: Mapping[str, Any], skipped: Collection[tuple[str, str]] = ()) -> None:
        """Write environment.json: what this run is made with, besides its settings; and skipped.txt, the files of its
        data set that it is made without, and why.
        """
        if self.writes:
            write_file(self.folder / "environment.json", json.dumps(environment, indent=2) + "\n")
        if self.writes and skipped:
            write_file(self.folder / "skipped.txt", "".join(f"{name}: {reason}\n" for name, reason in skipped))

    def note(self, **values: Any) -> None:
        """Replace state.json, with these values in it, in one step: a reader finds the old one or the new one."""
        if self.writes:
            self.check_place()
            self.state |= values | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            if lost := lost_output():
                self.state["output"] = lost
            write_file(self.folder / "state.json", json.dumps(self.state, indent=2) + "\n")
            self.noted_at = time.monotonic()

    def check_place(self) -> None:
        """Before anything is written: raise UserError where the folder was moved or removed meanwhile."""
        if self.identity is None or (found := _identity(self.folder)) == self.identity:
            return
        if read_state(self.folder / "state.json").get("id") == self.id:  # some network file systems number anew
            self.identity = found
        else:
            raise UserError(
                f"{self.folder}: was moved or removed while the run was training in it. Nothing more is written. If it"
                " is somewhere else, resume it there: --resume PATH"
            )

    @property
    def is_quiet(self) -> bool:
        """Whether state.json is so old that whoever watches the job should be told that it still moves.

        To be asked by what moves: a thread of its own would go on beating for a loop that hangs.
        """
        return self.writes and time.monotonic() - self.noted_at > SECONDS_BETWEEN_HEARTBEATS

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status, reason, exit_code = "finished", None, 0
        if isinstance(error, Interrupted):
            status, reason, exit_code = "interrupted", error.signal, error.exit_code
            if self.writes:
                error.message = f"\nInterrupted by {error.signal}. To go on:\n{self.resume_command}\n"
        elif error is not None:
            status, reason = "failed", f"{type(error).__name__}: {error}"
            exit_code = error.exit_code if isinstance(error, UserError) else 1
        with storage_errors(self.folder, f"go on: {self.resume_command}"):
            if isinstance(error, OSError):
                self.check_place()
            try:
                self.note(status=status, error=reason, exit_code=exit_code)
            except (OSError, UserError):  # the first error is the one to tell
                if error is None:
                    raise
            finally:
                if self.lock is not None:
                    self.lock.release()
            if isinstance(error, OSError):
                raise error


def _script_command() -> list[str]:
    """The command that started this process, up to the script."""
    return launcher_command() or ["python", _as_typed(Path(sys.argv[0]))]


def _as_typed(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative


def _make_folder(parent: Path, name: str, config: TrainConfig) -> Path:
    """A new folder with config.yaml in it; where the name is only a proposal, a number is added if it is taken."""
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
    if latest.exists() and not latest.is_symlink():  # somebody's own
        raise FileExistsError(errno.EEXIST, "it is a file or folder, not a link")
    link = temporary_name(latest, "new")
    link.symlink_to(folder.name)
    try:
        os.replace(link, latest)
    except OSError:
        link.unlink(missing_ok=True)
        raise


def _check_files(folder: Path) -> None:
    """Raise UserError for a pipe, which would never end, or a folder where a file of the run is to be."""
    for path in folder.iterdir():
        is_data = path.suffix in (".json", ".jsonl", ".yaml", ".txt")
        if path.exists() and not path.is_file() and (is_data or not path.is_dir()):
            raise UserError(f"{path}: not a file of the run. Remove it.")


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
