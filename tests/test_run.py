"""The folder of a run and its state."""

import json
import os
import signal
from pathlib import Path

import pytest

from mnist.config import TrainConfig
from mnist.errors import ConfigError, UserError
from mnist.run import Run
from tests.conftest import state_of


def config(tmp_path: Path, name: str | None = None) -> TrainConfig:
    return TrainConfig(output_dir=str(tmp_path / "runs"), run_name=name)


def test_a_run_gets_a_folder_with_its_settings_and_latest_points_to_it(tmp_path: Path) -> None:
    for name in ("first", "second"):
        run = Run.create(config(tmp_path, name))
        assert run.folder == tmp_path / "runs" / name
        assert TrainConfig.load(run.folder / "config.yaml") == config(tmp_path, name)
        assert (tmp_path / "runs" / "latest").resolve() == run.folder
        assert state_of(run.folder)["status"] == "running"


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    folder = Run.create(config(tmp_path, "mine")).folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"--run-name mine: .*runs/mine holds a run already"):
        Run.create(config(tmp_path, "mine"))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders = {Run.create(config(tmp_path)).folder for _ in range(5)}
    assert len(folders) == 5
    assert all(folder.name.startswith("tutorial-2") for folder in folders)


@pytest.mark.parametrize("place", ["/proc/runs", "/dev/null/runs"])  # where root cannot write either
def test_a_folder_that_cannot_be_written_is_refused_by_name(place: str) -> None:
    with pytest.raises(UserError, match=f"--output-dir {place}: cannot be written"):
        Run.create(TrainConfig(output_dir=place))


def test_a_run_that_comes_to_its_end_is_finished(tmp_path: Path) -> None:
    with Run.create(config(tmp_path)) as run:
        run.progress(step=12, epoch=3)
        assert state_of(run.folder) | {"time": ""} == {
            "status": "running",
            "step": 12,
            "epoch": 3,
            "error": None,
            "time": "",
        }
    assert state_of(run.folder)["status"] == "finished"
    assert state_of(run.folder)["step"] == 12


def test_a_run_that_raises_is_failed_with_its_error(tmp_path: Path) -> None:
    run = Run.create(config(tmp_path))
    with pytest.raises(RuntimeError), run:
        raise RuntimeError("out of luck")
    assert state_of(run.folder)["status"] == "failed"
    assert state_of(run.folder)["error"] == "RuntimeError: out of luck"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_gets_a_signal_is_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run = Run.create(config(tmp_path))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with pytest.raises((KeyboardInterrupt, SystemExit)), run:
        os.kill(os.getpid(), number)
        signal.pause()
    signal.signal(signal.SIGINT, interrupt)
    assert state_of(run.folder)["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_the_process_that_created_the_folder_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Run() as run:
        run.progress(step=1, epoch=1)
    assert list(tmp_path.iterdir()) == []


def test_the_state_is_whole_json_at_any_moment_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    run = Run.create(config(tmp_path))
    for step in range(20):
        run.progress(step, epoch=1)
        assert json.loads((run.folder / "state.json").read_text())["step"] == step
    assert {path.name for path in run.folder.iterdir()} == {"config.yaml", "state.json"}
