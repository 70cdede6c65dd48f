"""The folder of a run and its state."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mnist.config.settings import PROJECT_FOLDER, TrainConfig
from mnist.errors import ConfigError, UserError
from mnist.launch.signals import Interrupted
from mnist.runs.folder import Run, find_run, find_run_here
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
        run.note(step=12, epoch=3)
        state = state_of(run.folder)
        assert (state["status"], state["step"], state["epoch"], state["error"]) == ("running", 12, 3, None)
    assert state_of(run.folder)["status"] == "finished"
    assert state_of(run.folder)["step"] == 12


def test_a_run_that_raises_is_failed_with_its_error(tmp_path: Path) -> None:
    run = Run.create(config(tmp_path))
    with pytest.raises(RuntimeError), run:
        raise RuntimeError("out of luck")
    assert state_of(run.folder)["status"] == "failed"
    assert state_of(run.folder)["error"] == "RuntimeError: out of luck"


def test_a_run_that_is_interrupted_says_by_what_and_how_to_go_on(tmp_path: Path) -> None:
    run = Run.create(config(tmp_path))
    with pytest.raises(Interrupted) as interrupted, run:
        raise Interrupted(signal.SIGTERM)
    state = state_of(run.folder)
    assert (state["status"], state["error"], state["exit_code"]) == ("interrupted", "SIGTERM", 143)
    assert interrupted.value.message.endswith(f" --resume {run.folder}\n")


def test_only_the_process_that_created_the_folder_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Run() as run:
        run.note(step=1, epoch=1)
    assert list(tmp_path.iterdir()) == []


def test_the_state_is_whole_json_at_any_moment_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    run = Run.create(config(tmp_path))
    for step in range(20):
        run.note(step=step, epoch=1)
        assert json.loads((run.folder / "state.json").read_text())["step"] == step
    assert {path.name for path in run.folder.iterdir()} == {".lock", "config.yaml", "state.json"}


def test_a_second_job_in_the_same_folder_is_refused_at_once_and_a_dead_one_leaves_no_lock(tmp_path: Path) -> None:
    first = Run.create(config(tmp_path, "mine"))
    again = dataclasses.replace(config(tmp_path, "mine"), resume=str(first.folder))
    before = state_of(first.folder)
    with pytest.raises(UserError, match=f"mine: another job is training in this folder, process {os.getpid()} on "):
        Run.reopen(again, "")
    assert state_of(first.folder) == before
    script = (
        f"from mnist.config.settings import TrainConfig; from mnist.runs.folder import Run; import os, signal\n"
        f"run = Run.create(TrainConfig(output_dir={str(tmp_path)!r}, run_name='killed'))\n"
        f"os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_FOLDER, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert state_of(tmp_path / "killed")["status"] == "running"
    Run.reopen(dataclasses.replace(again, output_dir=str(tmp_path), resume=str(tmp_path / "killed")), "")


def test_a_run_that_is_taken_up_keeps_its_id_and_what_may_change_is_kept_in_its_settings(tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        (run.folder / ".model.new.0123abcd").mkdir()
        (run.folder / ".state.json.new.0123abcd").write_text("half of it")
    again = dataclasses.replace(config(tmp_path, "mine"), resume=str(run.folder), epochs=9, batch_size=77)
    with Run.reopen(again, "") as taken_up:
        assert taken_up.id == run.id
        assert {path.name for path in run.folder.iterdir()} == {".lock", "config.yaml", "state.json"}
    saved = TrainConfig.load(run.folder / "config.yaml")
    assert (saved.epochs, saved.batch_size, saved.resume) == (9, 10, None)


def test_a_restart_by_torchrun_goes_on_with_what_this_job_began_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> None:
    with Run.create(config(tmp_path, "last-week")):
        pass
    for variable, value in (("TORCHELASTIC_RUN_ID", "none"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(variable, value)
    again = config(tmp_path, "last-week")
    assert find_run(again, ()).resume is None  # so it is refused once more
    with Run.create(config(tmp_path)) as run:
        assert find_run(config(tmp_path), ()).resume == str(run.folder)
        assert find_run(config(tmp_path, run.folder.name), ()).resume == str(run.folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert find_run(config(tmp_path), ()).resume is None


def test_what_processes_with_the_same_number_have_left_behind_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as always in a container
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / ".mine.new.1").mkdir()
    (runs / ".latest.new.1").symlink_to("mine")
    with Run.create(config(tmp_path, "mine")) as run:
        assert (runs / "latest").resolve() == run.folder


def test_only_what_this_project_names_so_is_tidied_away(tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        (run.folder / ".notes.new.md").write_text("somebody's")
        (run.folder / ".old.photos").mkdir()
    with Run.reopen(dataclasses.replace(config(tmp_path, "mine"), resume=str(run.folder)), ""):
        assert (run.folder / ".notes.new.md").read_text() == "somebody's"
        assert (run.folder / ".old.photos").is_dir()


def refuse(error: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


def test_a_latest_that_cannot_be_renewed_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "latest").mkdir(parents=True)  # as cp -rL leaves it
    (tmp_path / "runs" / "latest" / "state.json").write_text("{}")
    with Run.create(config(tmp_path, "one")) as run:
        run.note(step=1)
    assert [warning.rpartition(":")[0] for warning in run.warnings] == [
        f"{tmp_path / 'runs' / 'latest'} does not lead to this run"
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


def test_a_file_system_without_locks_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", refuse(errno.ENOLCK))
    with Run.create(config(tmp_path, "mine")) as run:
        assert "its file system knows no locks" in run.warnings[0]
    assert state_of(run.folder)["status"] == "finished"


@pytest.mark.parametrize("act", ["folder", "link"])
def test_a_lock_that_is_no_file_is_named_and_what_it_leads_to_is_left_alone(act: str, tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        pass
    (run.folder / ".lock").unlink()
    (tmp_path / "precious").write_text("kept")
    if act == "folder":
        (run.folder / ".lock").mkdir()
    else:
        (run.folder / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock: not the lock of a run, which is a file\. Remove it"):
        Run.reopen(dataclasses.replace(config(tmp_path, "mine"), resume=str(run.folder)), "")
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("name", ["state.json", "environment.json", "metrics.jsonl", "report.html"])
def test_a_pipe_in_the_place_of_a_runs_file_is_named_before_anything_waits(name: str, tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        pass
    (run.folder / name).unlink(missing_ok=True)
    os.mkfifo(run.folder / name)
    with pytest.raises(UserError, match=f"{name}: not a file of the run"):
        Run.reopen(dataclasses.replace(config(tmp_path, "mine"), resume=str(run.folder)), "")


@pytest.mark.parametrize("commands", [5, None, [1, "python train.py"]])
def test_commands_in_a_state_json_that_are_none_are_left_out(commands: object, tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        pass
    (run.folder / "state.json").write_text(json.dumps({"commands": commands}))
    with Run.reopen(dataclasses.replace(config(tmp_path, "mine"), resume=str(run.folder)), "") as run:
        assert all(type(it) is str for it in run.state["commands"])


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist.runs.folder.lock_folder", refuse(errno.EIO))
    with pytest.raises(UserError, match="cannot be written"):
        Run.create(config(tmp_path, "mine"))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("act", ["moved", "replaced", "removed"])
def test_a_folder_that_was_moved_or_removed_meanwhile_is_written_no_more(act: str, tmp_path: Path) -> None:
    run = Run.create(config(tmp_path, "mine"))
    if act == "removed":
        shutil.rmtree(run.folder)
    else:
        run.folder.rename(tmp_path / "elsewhere")
    if act == "replaced":
        run.folder.mkdir()
    with pytest.raises(UserError, match="mine: was moved or removed while the run was training in it"), run:
        run.note(step=5)
    assert not run.folder.exists() or list(run.folder.iterdir()) == []
    if act != "removed":
        assert state_of(tmp_path / "elsewhere")["step"] == 0


def test_a_file_system_that_numbers_its_folders_anew_ends_no_run(tmp_path: Path) -> None:
    with Run.create(config(tmp_path, "mine")) as run:
        assert run.identity is not None
        run.identity = (run.identity[0], run.identity[1] + 1)
        run.note(step=7)
    assert state_of(run.folder)["step"] == 7


@pytest.mark.parametrize("content", ["", "[]", "5", '"x"', "[" * 100_000, '{"job": null}', "\x00"])
def test_a_foreign_state_json_is_none_of_a_runs(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "foreign").mkdir(parents=True)
    (tmp_path / "runs" / "foreign" / "state.json").write_text(content)
    (tmp_path / "runs" / "odd" / "state.json").mkdir(parents=True)
    (tmp_path / "runs" / "endless").mkdir()
    os.mkfifo(tmp_path / "runs" / "endless" / "state.json")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_run_here(config(tmp_path), ()).resume is None
