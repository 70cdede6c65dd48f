"""The folder of a run: creating, resuming, state.json."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnist.config.settings import TrainConfig
from mnist.errors import ConfigError, UserError
from mnist.launch.signals import Interrupted
from mnist.runs.folder import Run, find_run, find_run_here
from tests.conftest import state_of


def config(tmp_path: Path, name: str | None = None) -> TrainConfig:
    return TrainConfig(output_dir=str(tmp_path / "runs"), run_name=name)


def reopen(run: Run, **settings: Any) -> Run:
    again = TrainConfig(output_dir=str(run.folder.parent), run_name=run.folder.name, resume=str(run.folder), **settings)
    return Run.reopen(again, "")


def test_a_new_run_has_a_folder_with_its_settings_and_the_link_latest(tmp_path: Path) -> None:
    for name in ("first", "second"):
        run = Run.create(config(tmp_path, name))
        assert run.folder == tmp_path / "runs" / name
        assert TrainConfig.load(run.folder / "config.yaml") == config(tmp_path, name)
        assert (tmp_path / "runs" / "latest").resolve() == run.folder
        assert state_of(run.folder)["status"] == "running"


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    folder = Run.create(config(tmp_path, "mine")).folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"--run-name mine: .*runs/mine already exists"):
        Run.create(config(tmp_path, "mine"))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_runs_started_in_the_same_second_get_different_folders(tmp_path: Path) -> None:
    folders = {Run.create(config(tmp_path)).folder for _ in range(5)}
    assert len(folders) == 5
    assert all(folder.name.startswith("tutorial-2") for folder in folders)


@pytest.mark.parametrize("folder", ["/proc/runs", "/dev/null/runs"])  # not even for root
def test_an_output_folder_that_is_not_writable_is_refused(folder: str) -> None:
    with pytest.raises(UserError, match=f"--output-dir {folder}: cannot be written"):
        Run.create(TrainConfig(output_dir=folder))


def test_a_run_that_completes_is_finished(tmp_path: Path) -> None:
    with Run.create(config(tmp_path)) as run:
        run.update_state(step=12, epoch=3)
        state = state_of(run.folder)
        assert (state["status"], state["step"], state["epoch"], state["error"]) == ("running", 12, 3, None)
    assert (state_of(run.folder)["status"], state_of(run.folder)["step"]) == ("finished", 12)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("out of luck"), ("failed", "RuntimeError: out of luck", 1)),
        (Interrupted(signal.SIGTERM), ("interrupted", "SIGTERM", 143)),
    ],
)
def test_the_state_of_a_run_that_did_not_finish_has_the_reason(
    error: BaseException, expected: tuple[str, str, int], tmp_path: Path
) -> None:
    run = Run.create(config(tmp_path))
    with pytest.raises(type(error)), run:
        raise error
    state = state_of(run.folder)
    assert (state["status"], state["error"], state["exit_code"]) == expected
    if isinstance(error, Interrupted):
        assert error.message.endswith(f" --resume {run.folder}\n")


def test_only_the_process_that_created_the_folder_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Run() as run:
        run.update_state(step=1, epoch=1)
    assert list(tmp_path.iterdir()) == []


def test_the_state_is_valid_json_at_any_time_without_temporary_files(tmp_path: Path) -> None:
    run = Run.create(config(tmp_path))
    for step in range(20):
        run.update_state(step=step, epoch=1)
        assert json.loads((run.folder / "state.json").read_text())["step"] == step
    assert {path.name for path in run.folder.iterdir()} == {".lock", "config.yaml", "state.json"}


def test_a_second_job_in_the_folder_is_refused(tmp_path: Path) -> None:
    first = Run.create(config(tmp_path, "mine"))
    before = state_of(first.folder)
    with pytest.raises(UserError, match=f"mine: another job is training in this folder, process {os.getpid()} on "):
        reopen(first)
    assert state_of(first.folder) == before


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        try:
            Run.create(config(tmp_path, "killed"))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    run = Run(tmp_path / "runs" / "killed")
    assert state_of(run.folder)["status"] == "running"
    reopen(run)


def test_a_resumed_run_keeps_its_id_and_saves_the_settings_that_may_change(tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        (run.folder / ".model.new.0123abcd").mkdir()
        (run.folder / ".state.json.new.0123abcd").write_text("half of it")
    with reopen(run, epochs=9, batch_size=77) as resumed:
        assert resumed.id == run.id
        assert {path.name for path in run.folder.iterdir()} == {".lock", "config.yaml", "state.json"}
    saved = TrainConfig.load(run.folder / "config.yaml")
    assert (saved.epochs, saved.batch_size, saved.resume) == (9, 10, None)


def test_a_restart_by_torchrun_resumes_only_a_run_of_the_same_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> None:
    with Run.create(config(tmp_path, "last-week")):
        pass
    for variable, value in (("TORCHELASTIC_RUN_ID", "none"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(variable, value)
    again = config(tmp_path, "last-week")
    assert find_run(again, ()).resume is None  # and is therefore refused again
    with Run.create(config(tmp_path)) as run:
        assert find_run(config(tmp_path), ()).resume == str(run.folder)
        assert find_run(config(tmp_path, run.folder.name), ()).resume == str(run.folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert find_run(config(tmp_path), ()).resume is None


def test_leftovers_of_processes_with_the_same_pid_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in a container
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / ".mine.new.1").mkdir()
    (runs / ".latest.new.1").symlink_to("mine")
    with Run.create(config(tmp_path, "mine")) as run:
        assert (runs / "latest").resolve() == run.folder


def test_only_temporary_files_of_this_project_are_removed(tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        (run.folder / ".notes.new.md").write_text("somebody's")
        (run.folder / ".old.photos").mkdir()
    with reopen(run):
        assert (run.folder / ".notes.new.md").read_text() == "somebody's"
        assert (run.folder / ".old.photos").is_dir()


def refuse(error: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


def test_a_link_latest_that_cannot_be_updated_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "latest").mkdir(parents=True)  # as cp -rL leaves it
    (tmp_path / "runs" / "latest" / "state.json").write_text("{}")
    with Run.create(config(tmp_path, "one")) as run:
        run.update_state(step=1)
    assert [warning.rpartition(":")[0] for warning in run.warnings] == [
        f"{tmp_path / 'runs' / 'latest'} does not point to this run"
    ]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["latest", "one"]
    shutil.rmtree(tmp_path / "runs" / "latest")
    (tmp_path / "runs" / "latest").write_text("somebody's own")
    with Run.create(config(tmp_path, "three")) as run:
        assert "not a link" in run.warnings[0]
    assert (tmp_path / "runs" / "latest").read_text() == "somebody's own"
    (tmp_path / "runs" / "latest").unlink()
    monkeypatch.setattr(Path, "symlink_to", refuse(errno.EPERM))
    with Run.create(config(tmp_path, "two")) as run:
        assert "Operation not permitted" in run.warnings[0]
    assert state_of(run.folder)["status"] == "finished"


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", refuse(errno.ENOLCK))
    with Run.create(config(tmp_path, "mine")) as run:
        assert "its file system has no locks" in run.warnings[0]
    assert state_of(run.folder)["status"] == "finished"


@pytest.mark.parametrize("act", ["folder", "link"])
def test_a_lock_that_is_not_a_file_is_refused_and_its_target_is_untouched(act: str, tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        pass
    (run.folder / ".lock").unlink()
    (tmp_path / "precious").write_text("kept")
    if act == "folder":
        (run.folder / ".lock").mkdir()
    else:
        (run.folder / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock: must be a regular file \(the run's lock\)\. Remove it"):
        reopen(run)
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("name", ["state.json", "environment.json", "metrics.jsonl", "report.html"])
def test_a_pipe_in_the_place_of_a_runs_file_is_named_before_anything_waits(name: str, tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        pass
    (run.folder / name).unlink(missing_ok=True)
    os.mkfifo(run.folder / name)
    with pytest.raises(UserError, match=f"{name}: must be a regular file"):
        reopen(run)


@pytest.mark.parametrize("commands", [5, None, [1, "python train.py"]])
def test_commands_in_a_state_json_that_are_none_are_left_out(commands: object, tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        pass
    (run.folder / "state.json").write_text(json.dumps({"commands": commands}))
    with reopen(run) as run:
        assert all(type(it) is str for it in run.state["commands"])


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist.runs.folder.lock_folder", refuse(errno.EIO))
    with pytest.raises(UserError, match="cannot be written"):
        Run.create(config(tmp_path, "mine"))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("act", ["moved", "replaced", "removed"])
def test_a_moved_or_removed_folder_is_not_written_to_again(act: str, tmp_path: Path) -> None:
    run = Run.create(config(tmp_path, "mine"))
    if act == "removed":
        shutil.rmtree(run.folder)
    else:
        run.folder.rename(tmp_path / "elsewhere")
    if act == "replaced":
        run.folder.mkdir()
    with pytest.raises(UserError, match="mine: was moved or removed during the run"), run:
        run.update_state(step=5)
    assert not run.folder.exists() or list(run.folder.iterdir()) == []
    if act != "removed":
        assert state_of(tmp_path / "elsewhere")["step"] == 0


def test_a_file_system_that_renumbers_its_folders_does_not_end_a_run(tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        assert run.identity is not None
        run.identity = (run.identity[0], run.identity[1] + 1)
        run.update_state(step=7)
    assert state_of(run.folder)["step"] == 7


@pytest.mark.parametrize("content", ["", "[]", "5", '"x"', "[" * 100_000, '{"job": null}', "\x00"])
def test_a_state_json_of_another_program_is_ignored(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "foreign").mkdir(parents=True)
    (tmp_path / "runs" / "foreign" / "state.json").write_text(content)
    (tmp_path / "runs" / "odd" / "state.json").mkdir(parents=True)
    (tmp_path / "runs" / "endless").mkdir()
    os.mkfifo(tmp_path / "runs" / "endless" / "state.json")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_run_here(config(tmp_path), ()).resume is None
