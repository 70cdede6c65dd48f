"""What several tests share: MNIST in memory, a run inside this process, a run through the real launcher."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from mnist.config import PROJECT_FOLDER, TrainConfig
from mnist.data import ImageData
from mnist.datasets import load_dataset
from mnist.report import LiveReport
from train import train

Launch = Callable[..., "subprocess.CompletedProcess[str]"]
RunHere = Callable[..., Path]
ResumeHere = Callable[..., Path]


@pytest.fixture(scope="session")
def digits() -> ImageData:
    """MNIST, whole."""
    return load_dataset("mnist", PROJECT_FOLDER / "data")


@pytest.fixture(scope="session")
def cnn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the recipe `cnn`, which takes a minute or two: for tests that are slow."""
    parent = tmp_path_factory.mktemp("cnn")
    flags = "--recipe=cnn", "--trackers=none", f"--output-dir={parent}", "--run-name=cnn"
    subprocess.run([sys.executable, "train.py", *flags], cwd=PROJECT_FOLDER, capture_output=True, check=True)
    return parent / "cnn"


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate and torch as in a process of its own: both keep state in the process."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def run_here(tmp_path: Path, fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> RunHere:
    """Train in this process, on 200 images unless told otherwise; returns the run's folder.

    Without a report, unless it is asked for: drawing takes longer than such a training.
    """

    def run(name: str, *, report: bool = False, **settings: Any) -> Path:
        if not report:
            monkeypatch.setattr(LiveReport, "write", lambda self, status=None: None)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        small: dict[str, Any] = {"limit_train_images": 200, "limit_test_images": 100, "epochs": 1, "trackers": "none"}
        train(TrainConfig(**(small | settings), output_dir=str(tmp_path / "runs"), run_name=name))
        return tmp_path / "runs" / name

    return run


@pytest.fixture
def resume_here(fresh_accelerate: None) -> ResumeHere:
    """Resume the run in a folder, in this process, with settings as a command line gives them."""

    def resume(folder: Path, **settings: Any) -> Path:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        train(TrainConfig(resume=str(folder), **settings), given=frozenset({"resume", *settings}))
        return folder

    return resume


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Start `accelerate launch train.py ...`, or another command line, as a user without an account does."""

    def start(
        *flags: str, command: tuple[str, ...] = ("-m", "accelerate.commands.launch", "train.py"), **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
        return subprocess.run(
            [sys.executable, *command, *flags],
            cwd=PROJECT_FOLDER,
            env=clean | {"HOME": str(tmp_path / "home")} | environment,
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


def hear_ctrl_c() -> None:
    """As in a terminal; what a shell starts in the background, these tests perhaps, ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
