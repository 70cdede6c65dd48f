"""A run survives the loss of its output: full disks, closed terminals, broken pipes."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mnist.config.settings import PROJECT_FOLDER
from tests.conftest import state_of

FLAGS = "--trackers=none --limit-train-images=200 --limit-test-images=100 --epochs=1 --run-name=x"
TRAIN = f"exec {sys.executable} train.py {FLAGS}"


@pytest.mark.parametrize(
    ("redirections", "lost"),
    [
        ("> /dev/full 2> /dev/full", "standard output: No space left on device"),
        pytest.param(">&-", "standard output: it was closed", marks=pytest.mark.slow),
        pytest.param("| true", "standard output: Broken pipe", marks=pytest.mark.slow),
    ],
)
def test_a_run_continues_without_its_output_and_records_why(redirections: str, lost: str, tmp_path: Path) -> None:
    command = ["bash", "-o", "pipefail", "-c", f"{TRAIN} --output-dir={tmp_path} {redirections}"]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    state = state_of(tmp_path / "x")
    assert (state["status"], state["exit_code"], state["output"]) == ("finished", 0, lost)
    assert (tmp_path / "x" / "report.html").is_file()


@pytest.mark.slow
def test_a_run_that_ignores_sighup_survives_its_terminal(tmp_path: Path) -> None:
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
    os.read(ours, 1)  # wait for the first output
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert state_of(tmp_path / "x")["output"] == "standard output: Input/output error"


@pytest.mark.parametrize("command", ["train.py --epochs=x", "train.py --epochs=0", "-m mnist no-such-command"])
def test_wrong_usage_exits_with_2_even_if_the_message_is_lost(command: str) -> None:
    done = subprocess.run(["sh", "-c", f"{sys.executable} {command} 2> /dev/full"], cwd=PROJECT_FOLDER, check=False)
    assert done.returncode == 2
