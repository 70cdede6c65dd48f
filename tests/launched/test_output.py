"""A run outlives its output: full disks, closed terminals, readers that have gone."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mnist.config.settings import PROJECT_FOLDER
from tests.conftest import state_of

TRAIN = f"exec {sys.executable} train.py --trackers=none --limit-train-images=500 --limit-test-images=100 --run-name=x"


@pytest.mark.parametrize(
    ("redirections", "lost"),
    [
        ("> /dev/full 2> /dev/full", "standard output: No space left on device"),
        (">&-", "standard output: it was closed"),
    ],
)
def test_a_run_goes_on_without_its_output_and_state_json_says_so(redirections: str, lost: str, tmp_path: Path) -> None:
    command = f"{TRAIN} --output-dir={tmp_path} {redirections}"
    done = subprocess.run(["sh", "-c", command], cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    state = state_of(tmp_path / "x")
    assert (state["status"], state["exit_code"], state["output"]) == ("finished", 0, lost)
    assert (tmp_path / "x" / "report.html").is_file()


def test_a_run_goes_on_without_its_terminal_where_hanging_up_is_ignored(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["sh", "-c", f"{TRAIN} --output-dir={tmp_path}"],
        cwd=PROJECT_FOLDER,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    os.close(theirs)
    os.read(ours, 1)  # it has begun to speak
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert state_of(tmp_path / "x")["output"] == "standard output: Input/output error"


@pytest.mark.parametrize("command", ["train.py --epochs=x", "train.py --epochs=0", "-m mnist no-such-command"])
def test_wrong_usage_is_2_where_nobody_can_read_why(command: str) -> None:
    done = subprocess.run(["sh", "-c", f"{sys.executable} {command} 2> /dev/full"], cwd=PROJECT_FOLDER, check=False)
    assert done.returncode == 2
