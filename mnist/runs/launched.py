"""Run train.py in separate processes, one after the other or at the same time, and read the results.

runs = LaunchedRuns(TrainConfig(), processes=2, folder=Path("/tmp/runs"))
runs.train("short", processes=2, max_steps=30).lines
"""

import contextlib
import dataclasses
import functools
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from mnist.config.recipes import RECIPES
from mnist.config.settings import PROJECT_FOLDER, TrainConfig, flag
from mnist.errors import ConfigError, UserError
from mnist.launch.hardware import available_cores, device_memory
from mnist.launch.processes import training_device
from mnist.runs.record import Record, read_metrics, read_state

STEPS = 30  # of a short run: six epochs of five batches
SECONDS = 2.0  # of training in a longer run
IN_FLOAT64 = ("-m", "mnist.runs.launched")


class RunError(UserError):
    """A run failed."""


class LaunchedRuns:
    """Runs in subfolders of `folder`, with the settings of `config` except for those passed to a call."""

    def __init__(
        self, config: TrainConfig, processes: int, folder: Path, script: Path = PROJECT_FOLDER / "train.py"
    ) -> None:
        self.config = dataclasses.replace(config, resume=None, profile=False, trackers="none", output_dir=str(folder))
        self.processes = processes
        self.folder = folder
        self.script = script
        self.recipe = RECIPES[config.recipe]
        self.global_batch_size = config.global_batch_size or config.batch_size * processes
        self.device = training_device()
        self.ahead: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        name: str,
        processes: int = 1,
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> "subprocess.Popen[bytes]":
        """Start a short run, in which the last batch of each epoch is smaller; its output goes to NAME.log.

        `before` are words before the script, such as ("-m", "package.module") to start a module with it.
        """
        settings = {"global_batch_size": self.global_batch_size} | settings
        settings = {"limit_train_images": 5 * settings["global_batch_size"] - 3, "limit_test_images": 200} | settings
        settings = {"log_every": 1, "epochs": 10**6, "max_steps": STEPS} | settings
        config = dataclasses.replace(self.config, run_name=name, batch_size=self.recipe.batch_size, **settings)
        launcher: list[str] = []
        if processes > 1:
            file = PROJECT_FOLDER / "accelerate_configs" / f"multi_{'cpu' if self.device.type == 'cpu' else 'gpu'}.yaml"
            launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
            launcher += ["--num_processes", str(processes)]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *launcher, *before, str(self.script), *flags_of(config, self.recipe)],
                cwd=PROJECT_FOLDER,
                env=os.environ | (environment or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def train(self, name: str, processes: int = 1, **options: Any) -> Record:
        """The record of a whole run. Raises RunError if it fails, ConfigError if train.py rejects the settings."""
        return self.finish(name, self.start(name, processes, **options))

    def train_ahead(self, name: str, processes: int = 1, **options: Any) -> Callable[[], Record]:
        """Start a run; the function returned waits for its record and raises errors like `train`.

        If this machine cannot do several runs at the same time, the run starts when the record is asked for.
        """
        if processes > 1 or not self.has_room:
            return functools.partial(self.train, name, processes, **options)
        process = self.start(name, **options)
        self.ahead.append(process)
        return functools.partial(self.finish, name, process)

    @functools.cached_property
    def has_room(self) -> bool:
        """Whether there are four cores, and GPU memory for five runs at the same time in float64."""
        peak, (free, _) = self.short.last["perf/peak_memory_mib"] * 2**20, device_memory(self.device)
        return available_cores() >= 4 and (free == 0 or free > 5 * (2 * peak + 2**30))

    def end(self) -> None:
        """SIGKILL runs whose record nobody has asked for."""
        for process in self.ahead:
            with killed_at_the_end(process):
                pass

    def finish(self, name: str, process: "subprocess.Popen[bytes]") -> Record:
        self._wait(name, process)
        return Record.read(self.folder / name)

    def _wait(self, name: str, process: "subprocess.Popen[bytes]") -> None:
        with killed_at_the_end(process):
            process.wait()
        if process.returncode != 0:
            raise self.error(name, process.returncode)

    def error(self, name: str, exit_code: int) -> UserError:
        """The error of a run that has ended: ConfigError if train.py rejects its settings, else RunError."""
        state = read_state(self.folder / name / "state.json")
        log = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        lines = ["no output", *(line for line in log.splitlines() if line.strip())]
        errors = [line for line in lines if re.match(r"\w+Error: ", line)]  # a launcher prints more after it
        message = state.get("error") or [*lines, *errors][-1].removeprefix("ConfigError: ")
        return ConfigError(message) if 2 in (state.get("exit_code"), exit_code) else RunError(message)

    def wait_for_step(self, step: int, name: str, process: "subprocess.Popen[bytes]") -> None:
        """Wait until a run has logged a step. Raises RunError if the run ends first."""
        metrics = self.folder / name / "metrics.jsonl"
        while process.poll() is None:
            if metrics.is_file() and any(line["step"] >= step for line in read_metrics(metrics)):
                return
            time.sleep(0.005)
        raise (
            self.error(name, process.returncode) if process.returncode else RunError(f"a run ended before step {step}")
        )

    def kill_at_step(self, step: int, name: str, process: "subprocess.Popen[bytes]") -> None:
        """SIGKILL a run once it has logged a step. Raises RunError if the run ends by itself."""
        with killed_at_the_end(process):
            self.wait_for_step(step, name, process)
        if process.returncode == 0:
            raise RunError(f"a run ended before it could be killed at step {step}")

    def plain_rate(self, **settings: Any) -> float:
        """Images per second of the loop in plain PyTorch with the same settings (training/plain.py)."""
        process = self.start("plain", before=("-m", "mnist.training.plain"), **settings)
        self._wait("plain", process)
        return float((self.folder / "plain.log").read_text(encoding="utf-8").split()[-1])

    def rate_alone(self, **settings: Any) -> float:
        """Total images per second of independent simultaneous runs, each with its share of the batch and the images."""
        visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.processes)))).split(",")
        settings["limit_train_images"] = -(-settings["limit_train_images"] // self.processes)
        settings["global_batch_size"] = -(-self.global_batch_size // self.processes)
        jobs = {}
        for number in range(self.processes):
            own = {"LOCAL_WORLD_SIZE": str(self.processes), "CUDA_VISIBLE_DEVICES": visible[number]}
            jobs[f"alone-{number}"] = self.start(f"alone-{number}", environment=own, **settings)
        done = [self.finish(name, job) for name, job in jobs.items()]
        return sum(float(run.last["perf/images_per_second"]) for run in done)

    @functools.cached_property
    def short(self) -> Record:
        """A short run with the settings of `config`."""
        return self.train("short", self.processes)

    @functools.cached_property
    def whole(self) -> Record:
        """A longer run that nothing interrupts."""
        return self.train("whole", self.processes, **self.longer)

    @functools.cached_property
    def longer(self) -> dict[str, Any]:
        """Settings of a run of two and a half epochs that trains for about SECONDS."""
        rate = self.short.evaluations[-1]["perf/images_per_second"]
        steps = max(20, min(20_000, int(SECONDS * rate / self.global_batch_size)))
        images = max(1, steps * 2 // 5 * self.global_batch_size - 3)
        every = {"log_every": max(1, steps // 50), "checkpoint_every": steps // 7}
        return every | {"max_steps": steps, "limit_train_images": images}


def flags_of(config: TrainConfig, recipe: TrainConfig) -> list[str]:
    """The flags that turn `recipe` into `config`."""
    names = [field.name for field in dataclasses.fields(config)]
    changed = [name for name in names if name == "recipe" or getattr(config, name) != getattr(recipe, name)]
    return [f"{flag(name)}={getattr(config, name)}" for name in changed]


@contextlib.contextmanager
def killed_at_the_end(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """SIGKILL the process and its descendants if they still run."""
    try:
        yield
    finally:
        if process.poll() is None:
            kill_all(process.pid)
            process.wait()


def kill_all(pid: int) -> None:
    """SIGKILL a process and its descendants, all stopped first so that none can react: like a loss of power."""
    family: dict[int, psutil.Process] = {}
    root = psutil.Process(pid)
    while new := [member for member in (root, *root.children(recursive=True)) if member.pid not in family]:
        for member in new:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
            family[member.pid] = member
    for member in family.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


if __name__ == "__main__":  # python -m mnist.runs.launched train.py FLAGS
    torch.set_default_dtype(torch.float64)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
