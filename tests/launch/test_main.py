"""A training process from its start to its exit code; the signals are in tests/launched/test_signals.py."""

import subprocess
import sys
import time

import pytest

from mnist.config.settings import PROJECT_FOLDER
from mnist.errors import UserError
from mnist.launch.main import report_failure
from tests.conftest import MainHere

ABORTS_WHEN_TAKEN_DOWN = """
import atexit, os
from mnist.launch.main import end_process

class Thread:
    abort = staticmethod(os.abort)
    def __del__(self):
        self.abort()

thread = Thread()
atexit.register(print, "registered")
print("printed", end=" ")
end_process({code})
"""


def test_the_exit_code_is_kept_whatever_would_happen_while_the_interpreter_is_taken_down() -> None:
    for code in (0, 3):
        done = subprocess.run(
            [sys.executable, "-c", ABORTS_WHEN_TAKEN_DOWN.format(code=code)],
            cwd=PROJECT_FOLDER,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (code, "printed registered\n", "")


def test_a_launchers_file_for_errors_that_cannot_be_written_hides_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/proc/nowhere/error.json")
    report_failure(UserError("the thing, its value, the way out"))
    assert capsys.readouterr().err == "UserError: the thing, its value, the way out\n"


def test_a_rank_that_was_left_in_the_environment_silences_no_wrong_usage(
    main_here: MainHere, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    done = main_here("--epochs=0", RANK="1")
    assert (done.returncode, "--epochs 0: must be" in done.stderr) == (2, True)
    with pytest.raises(SystemExit, match="2"):
        main_here("--no-such-flag", RANK="1")
    assert "no-such-flag" in "".join(capsys.readouterr())
    assert time.monotonic() - began < 2  # one of many would wait for the first to speak


def test_wrong_usage_is_not_silent_where_the_first_process_of_many_is_missing(
    main_here: MainHere, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="2"):
        main_here("--no-such-flag", RANK="1", WORLD_SIZE="2")
    assert "Process 1: wrong usage" in capsys.readouterr().err
