"""Exit codes and error messages of a training process; for signals see tests/launched/test_signals.py."""

import time

import pytest

from mnist.errors import UserError
from mnist.launch.main import report_failure
from tests.conftest import Launch, MainHere

ABORTS_IN_FINALIZATION = """
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


def test_an_abort_in_interpreter_finalization_does_not_change_the_exit_code(launch: Launch) -> None:
    for code in (0, 3):
        done = launch(command=("-c", ABORTS_IN_FINALIZATION.format(code=code)))
        assert (done.returncode, done.stdout, done.stderr) == (code, "printed registered\n", "")


def test_an_error_is_printed_even_if_the_launchers_error_file_is_not_writable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/proc/nowhere/error.json")
    report_failure(UserError("what, value, advice"))
    assert capsys.readouterr().err == "UserError: what, value, advice\n"


def test_a_stale_rank_in_the_environment_does_not_hide_wrong_usage(
    main_here: MainHere, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    done = main_here("--epochs=0", RANK="1")
    assert (done.returncode, "--epochs 0: must be" in done.stderr) == (2, True)
    with pytest.raises(SystemExit, match="2"):
        main_here("--no-such-flag", RANK="1")
    assert "no-such-flag" in "".join(capsys.readouterr())
    assert time.monotonic() - began < 2  # one of several processes would wait for the first


def test_wrong_usage_is_not_silent_where_the_first_process_of_many_is_missing(
    main_here: MainHere, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="2"):
        main_here("--no-such-flag", RANK="1", WORLD_SIZE="2")
    assert "Process 1: wrong usage" in capsys.readouterr().err
