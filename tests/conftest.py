"""Shared fixtures: MNIST in memory, runs inside this process, runs through the real launcher."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mnist.config.settings import PROJECT_FOLDER, TrainConfig
from mnist.launch.signals import EXIT_CODES
from tests.support.signals import hear_again

if TYPE_CHECKING:
    from torch import Tensor

    from mnist.data.splits import ImageData

pytest_plugins = ["tests.support.gpus", "tests.support.workers"]

Launch = Callable[..., "subprocess.CompletedProcess[str]"]
MainHere = Callable[..., "subprocess.CompletedProcess[str]"]
RunHere = Callable[..., Path]
ResumeHere = Callable[..., Path]
SetEnvironment = Callable[..., None]

# Otherwise idle OpenMP threads spin on cores that other tests need, and a CNN takes three times as long. OpenMP reads
# this when torch is imported, so torch is imported in fixtures only.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir(), "hypothesis")))


@pytest.fixture(scope="session", autouse=True)
def unpacked_once() -> Iterator[None]:
    """Unpack the repository's MNIST once per process, because that takes longer than most runs here."""
    from mnist.data import datasets

    read = datasets.read_idx
    read_once = functools.cache(read)

    def read_idx(path: Path, md5: str | None = None) -> "Tensor":
        return read_once(path, md5) if path.is_relative_to(PROJECT_FOLDER / "data") else read(path, md5)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets, "read_idx", read_idx)
        yield


@pytest.fixture(scope="session")
def digits() -> "ImageData":
    """All of MNIST."""
    from mnist.data.datasets import load_dataset

    return load_dataset("mnist", PROJECT_FOLDER / "data")


@pytest.fixture(scope="session")
def cnn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the recipe `cnn`, which takes a minute or two; for slow tests."""
    parent = tmp_path_factory.mktemp("cnn")
    flags = "--recipe=cnn", "--trackers=none", f"--output-dir={parent}", "--run-name=cnn"
    subprocess.run([sys.executable, "train.py", *flags], cwd=PROJECT_FOLDER, capture_output=True, check=True)
    return parent / "cnn"


def train_afresh(config: TrainConfig) -> None:
    """Train in this process and restore torch and Accelerate; for module-scoped fixtures."""
    import torch

    from train import train

    threads = torch.get_num_threads()
    reset_accelerate()
    train(config)
    reset_accelerate()
    torch.set_num_threads(threads)


def reset_accelerate() -> None:
    """Reset Accelerate's global state, and the signals that a finished run ignores."""
    from accelerate.state import AcceleratorState, GradientState

    hear_again()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate and torch as in a new process."""
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    reset_accelerate()
    yield
    reset_accelerate()
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def run_here(tmp_path: Path, fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> RunHere:
    """Train in this process, by default on 200 images without a report (which is slower); returns the run's folder."""
    from mnist.reporting.report import LiveReport
    from train import train

    def run(name: str, *, report: bool = False, **settings: Any) -> Path:
        if not report:
            monkeypatch.setattr(LiveReport, "write", lambda self, status=None: None)
        reset_accelerate()
        small: dict[str, Any] = {"limit_train_images": 200, "limit_test_images": 100, "epochs": 1, "trackers": "none"}
        train(TrainConfig(**(small | settings), output_dir=str(tmp_path / "runs"), run_name=name))
        hear_again()  # subprocesses inherit ignored signals
        return tmp_path / "runs" / name

    return run


@pytest.fixture
def resume_here(fresh_accelerate: None) -> ResumeHere:
    """Resume the run in a folder, in this process, with explicit settings."""
    from train import train

    def resume(folder: Path, **settings: Any) -> Path:
        reset_accelerate()
        train(TrainConfig(resume=str(folder), **settings), explicit_settings=frozenset({"resume", *settings}))
        hear_again()
        return folder

    return resume


@pytest.fixture
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetEnvironment:
    """Set this process's environment to that of a user without an account, plus variables."""

    def change(**variables: str) -> None:
        environment = user_environment(tmp_path, **variables)
        for name in os.environ.keys() - environment.keys():
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.fixture
def main_here(
    fresh_accelerate: None,
    clean_environment: SetEnvironment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[MainHere]:
    """`python train.py ...` in this process, as a user without an account; returns exit code, stdout and stderr."""
    import wandb

    from train import main

    def run(*flags: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        reset_accelerate()
        wandb.teardown()  # it caches the environment
        clean_environment(**environment)
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        capsys.readouterr()
        code = main()
        hear_again()
        wandb.teardown()
        return subprocess.CompletedProcess(flags, code, *capsys.readouterr())

    handlers = {number: signal.getsignal(number) for number in EXIT_CODES}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def user_environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a user without an account, with a home in `folder`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    return clean | {"HOME": str(folder / "home")} | variables


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run `accelerate launch train.py ...`, or another command, as a user without an account."""

    def start(
        *flags: str, command: tuple[str, ...] = ("-m", "accelerate.commands.launch", "train.py"), **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *command, *flags],
            cwd=PROJECT_FOLDER,
            env=user_environment(tmp_path, **environment),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return start


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(folder: Path) -> dict[str, Any]:
    """A run's state.json."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def wait_for(file: Path, process: "subprocess.Popen[Any] | None" = None, output: Path | None = None) -> None:
    """Wait until a file has content; fails if `process` ends first, with its output."""
    deadline = time.monotonic() + 90
    while not (file.exists() and file.stat().st_size):
        waiting = time.monotonic() < deadline and (process is None or process.poll() is None)
        assert waiting, output.read_text() if output else file
        time.sleep(0.05)


def hear_ctrl_c() -> None:
    """Restore SIGINT, which is ignored if the tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
