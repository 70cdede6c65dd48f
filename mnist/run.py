"""The folder of a run: made once, never overwritten, with the settings and the state of the run in it.

    with Run.create(config) as run:
        run.progress(step=100, epoch=1)
    json.loads((run.folder / "state.json").read_text())["status"]     # running, finished, interrupted or failed

state.json is the truth for whatever watches the job: launchers turn every exit code into 1.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mnist.config import TrainConfig
from mnist.errors import ConfigError, UserError


@dataclass
class Run:
    """A run's folder and its state. Only the main process writes; the others carry the same folder's name."""

    folder: Path = Path()
    writes: bool = False
    state: dict[str, Any] = field(default_factory=lambda: {"status": "running", "step": 0, "epoch": 0, "error": None})

    @classmethod
    def open(cls, config: TrainConfig, accelerator: Accelerator) -> "Run":
        """Make a run on the main process, and tell its folder to the others; all of them must call it."""
        run = cls.create(config) if accelerator.is_main_process else cls()
        run.folder = Path(broadcast_object_list([str(run.folder)])[0])
        return run

    @classmethod
    def create(cls, config: TrainConfig) -> "Run":
        """Make `<output_dir>/<run_name>/` with config.yaml, and let `<output_dir>/latest` point to it.

        Raises ConfigError for a name that holds a run already, UserError for a folder that cannot be written.
        """
        parent = Path(config.output_dir)
        name = config.run_name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            folder = _make_folder(parent, name, unique=config.run_name is None)
            config.save(folder / "config.yaml")
            _point_latest(parent, folder.name)
            run = cls(folder, writes=True)
            run.save_state()
        except FileExistsError as error:
            raise ConfigError(
                f"--run-name {name}: {parent / name} holds a run already, and nothing is overwritten. Choose another"
                " name, or leave the flag away for one made from the time."
            ) from error
        except OSError as error:
            raise UserError(
                f"--output-dir {parent}: cannot be written ({error}). Name one that can: --output-dir /tmp/runs."
            ) from error
        return run

    def save_state(self) -> None:
        """Replace state.json in one step: a reader finds the old one or the new one, both whole."""
        if self.writes:
            self.state["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            write_atomically(self.folder / "state.json", json.dumps(self.state, indent=2) + "\n")

    def progress(self, step: int, epoch: int) -> None:
        """Note how far the run is."""
        self.state |= {"step": step, "epoch": epoch}
        self.save_state()

    def __enter__(self) -> "Run":
        # SIGTERM ends a process without a word; as SystemExit it passes through __exit__
        self._previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)
        if error is None:
            self.state["status"] = "finished"
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            self.state |= {"status": "interrupted", "error": kind.__name__ if kind else None}
        else:
            self.state |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        self.save_state()


def _make_folder(parent: Path, name: str, unique: bool) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    attempt = 1
    while True:  # two jobs may start in the same second
        folder = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if not unique:
                raise
            attempt += 1


def _point_latest(parent: Path, name: str) -> None:
    link, temporary = parent / "latest", parent / f".latest.{os.getpid()}"
    temporary.symlink_to(name)
    os.replace(temporary, link)


def write_atomically(path: Path, content: str) -> None:
    """Write a text under a temporary name beside `path`, flush it to the disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
