"""Signals end a run in good order: by hand, by schedulers, by launchers that die."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mnist.config.settings import PROJECT_FOLDER
from tests.conftest import MainHere, hear_ctrl_c, metrics_of, state_of

PLAIN = (sys.executable, "train.py")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "train.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py")
LONG = ("--trackers=none", "--epochs=100000", "--limit-train-images=2000", "--log-every=10", "--run-name=x")


class Job:
    """A run in a process group of its own, as a terminal makes one, ended with the test."""

    def __init__(self, folder: Path, command: tuple[str, ...], *flags: str) -> None:
        self.folder = folder / "runs" / "x"
        self.output = folder / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *LONG, f"--output-dir={folder / 'runs'}", *flags],
                cwd=PROJECT_FOLDER,
                env=os.environ | {"TEST_MARK": str(folder)},
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=hear_ctrl_c,
            )

    def wait_until_it_trains(self) -> None:
        metrics, deadline = self.folder / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """The processes that train: those without children of the launcher's."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return [it for it in family if not it.children()]

    def end(self) -> None:
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_MARK") == str(self.output.parent):
                    process.kill()
            except psutil.Error:
                continue
        self.process.wait()


@pytest.fixture
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    """A run that trains; the parameter is the command that starts it."""
    job = Job(tmp_path, *request.param)
    try:
        job.wait_until_it_trains()
        yield job
    finally:
        job.end()


def caught(status: str) -> int:
    """The set of signals that a process has handlers for, from its /proc/<pid>/status."""
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), 16)


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.parametrize(
    ("job", "number", "code"),
    [
        ((PLAIN,), signal.SIGTERM, 143),
        ((PLAIN,), signal.SIGINT, 130),
        ((PLAIN,), signal.SIGUSR1, 75),
        ((PLAIN,), signal.SIGHUP, 129),
    ],
    indirect=["job"],
)
def test_the_first_signal_ends_a_run_with_a_checkpoint_its_exit_code_and_the_command_that_resumes(
    job: Job, number: signal.Signals, code: int, main_here: MainHere
) -> None:
    job.process.send_signal(number)
    assert job.process.wait(timeout=20) == code
    state = state_of(job.folder)
    assert (state["status"], state["error"], state["exit_code"]) == ("interrupted", number.name, code)
    assert state["checkpoint"] == state["step"] > 0
    assert '<span class="status interrupted">' in (job.folder / "report.html").read_text()
    output = job.output.read_text()
    assert "Traceback" not in output
    *words, flag, folder = shlex.split(output.splitlines()[-1])
    assert (words, flag, Path(folder)) == (["python", "train.py"], "--resume", job.folder)
    if number != signal.SIGTERM:  # the rest is the same
        return
    again = main_here(flag, folder, f"--max-steps={state['step'] + 5}")
    assert again.returncode == 0, again.stderr
    assert metrics_of(job.folder)[-1]["step"] == state["step"] + 5


@pytest.mark.slow
@pytest.mark.parametrize("job", [(TORCHRUN,)], indirect=True)
def test_a_terminal_that_closes_ends_a_run_below_torchrun_with_a_checkpoint(job: Job) -> None:
    os.killpg(job.process.pid, signal.SIGHUP)
    job.process.wait(timeout=40)
    state = state_of(job.folder)
    assert (state["error"], state["exit_code"], state["checkpoint"]) == ("SIGHUP", 129, state["step"])


@pytest.mark.parametrize("job", [(TORCHRUN, "--timeout-seconds=20")], indirect=True)
def test_one_signalled_process_of_many_ends_all_at_the_same_step_with_a_checkpoint(job: Job) -> None:
    workers = job.workers()
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGUSR1)
    assert job.process.wait(timeout=20) == 1  # torchrun's own
    assert gone(workers, 1)
    state = state_of(job.folder)
    assert (state["error"], state["exit_code"], state["checkpoint"]) == ("SIGUSR1", 75, state["step"])
    output = job.output.read_text()
    assert output.count("Interrupted by SIGUSR1") == 1
    assert re.search(r"^torchrun --nproc-per-node=2 train.py --resume .*/x$", output, re.MULTILINE)
    assert "lost the others" not in output


@pytest.mark.parametrize(
    ("job", "number"),
    [
        ((TORCHRUN,), signal.SIGKILL),
        ((ACCELERATE,), signal.SIGTERM),
        pytest.param((TORCHRUN,), signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param((ACCELERATE,), signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param((ACCELERATE,), signal.SIGKILL, marks=pytest.mark.slow),
    ],
    indirect=["job"],
)
def test_when_a_launcher_alone_gets_a_signal_its_workers_are_gone_within_ten_seconds_and_a_checkpoint_is_behind_them(
    job: Job, number: signal.Signals
) -> None:
    workers = job.workers()
    job.process.send_signal(number)
    assert gone(workers, 10)
    job.process.wait(timeout=10)
    state = state_of(job.folder)
    assert (state["status"], state["error"], state["checkpoint"]) == ("interrupted", "SIGTERM", state["step"])
    assert list((job.folder / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.parametrize("job", [(ACCELERATE,)], indirect=True)
def test_ctrl_c_on_the_whole_process_group_under_the_launcher_leaves_a_whole_checkpoint(job: Job) -> None:
    workers = job.workers()
    os.killpg(job.process.pid, signal.SIGINT)
    job.process.wait(timeout=10)
    assert gone(workers, 10)
    state = state_of(job.folder)
    assert (state["error"], state["exit_code"], state["checkpoint"]) == ("SIGINT", 130, state["step"])
    assert "accelerate launch train.py --resume" in job.output.read_text()


def test_ctrl_c_that_ends_the_reader_of_the_output_too_ends_with_a_checkpoint_and_its_exit_code(tmp_path: Path) -> None:
    command = shlex.join([*PLAIN, *LONG, f"--output-dir={tmp_path / 'runs'}"])
    script = f"set -o pipefail; {command} 2> {tmp_path / 'errors'} | cat > /dev/null"
    shell = subprocess.Popen(["bash", "-c", script], cwd=PROJECT_FOLDER, preexec_fn=hear_ctrl_c, start_new_session=True)
    folder = tmp_path / "runs" / "x"
    while not ((folder / "metrics.jsonl").exists() and metrics_of(folder)):
        time.sleep(0.05)
    children = psutil.Process(shell.pid).children()
    try:
        for child in sorted(children, key=lambda it: it.name() != "cat"):  # first the reader
            child.send_signal(signal.SIGINT)
        assert shell.wait(timeout=20) == 130
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
    assert (tmp_path / "errors").read_text() == ""
    assert state_of(folder)["exit_code"] == 130


@pytest.mark.parametrize("job", [(TORCHRUN, "--timeout-seconds=60")], indirect=True)
def test_a_second_ctrl_c_more_than_a_second_later_stops_at_once_even_a_process_that_waits_for_another(job: Job) -> None:
    first, second = job.workers()
    second.suspend()
    time.sleep(0.5)  # the first waits for it by now, inside torch
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    first.send_signal(signal.SIGINT)  # as launchers send it by themselves
    time.sleep(1.5)
    first.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert first.is_running()
    assert first.status() != psutil.STATUS_ZOMBIE
    first.send_signal(signal.SIGINT)
    assert gone([first], 2) or first.status() == psutil.STATUS_ZOMBIE
    assert state_of(job.folder)["error"] in ("a second SIGINT", "SIGINT")


def test_a_run_that_a_shell_started_in_the_background_survives_the_shell(tmp_path: Path) -> None:
    flags = shlex.join([*LONG, f"--output-dir={tmp_path / 'runs'}"])
    script = f"nohup {sys.executable} train.py {flags} > {tmp_path / 'output'} 2>&1 & echo $!"
    shell = subprocess.run(["sh", "-c", script], cwd=PROJECT_FOLDER, capture_output=True, text=True, check=True)
    process = psutil.Process(int(shell.stdout))
    try:
        metrics, deadline = tmp_path / "runs" / "x" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        lines = len(metrics_of(metrics.parent))
        while len(metrics_of(metrics.parent)) < lines + 10:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert process.is_running()
    finally:
        process.kill()


def test_during_start_up_a_signal_ends_the_process_at_once_and_leaves_no_folder(tmp_path: Path) -> None:
    for number, codes in (
        (signal.SIGTERM, (143, -15)),
        (signal.SIGINT, (130, -2)),
        (signal.SIGUSR1, (75,)),
        (1, (129,)),
    ):
        job = Job(tmp_path, PLAIN)
        status = Path(f"/proc/{job.process.pid}/status")
        while not caught(status.read_text()) >> signal.SIGUSR1 - 1 & 1:  # then torch is still to be loaded
            time.sleep(0.01)
        job.process.send_signal(number)
        assert job.process.wait(timeout=5) in codes
        assert not job.folder.exists()
        assert "Traceback" not in job.output.read_text()
        job.end()


@pytest.mark.parametrize("job", [(PLAIN,)], indirect=True)
def test_a_run_whose_folder_is_moved_ends_with_a_message_and_writes_nothing_where_it_was(job: Job) -> None:
    job.folder.rename(job.folder.with_name("elsewhere"))
    assert job.process.wait(timeout=30) == 1
    assert "x: was moved or removed while the run was training in it" in job.output.read_text()
    assert "Traceback" not in job.output.read_text()
    assert not job.folder.exists()


IN_THE_LAST_MOMENT = """
import os, signal, sys
import train
from mnist.launch.main import end_process
from mnist.reporting.terminal import Terminal

result = Terminal.result

def with_a_signal(self, *arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    result(self, *arguments)

Terminal.result = with_a_signal
end_process(train.main())
"""


def test_a_signal_in_the_last_moment_makes_nothing_of_a_finished_run(tmp_path: Path) -> None:
    flags = ("--trackers=none", "--limit-train-images=100", "--limit-test-images=50", "--epochs=1", "--run-name=x")
    command = [sys.executable, "-c", IN_THE_LAST_MOMENT, *flags, f"--output-dir={tmp_path}"]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Test accuracy" in done.stdout
    assert state_of(tmp_path / "x")["exit_code"] == 0


def test_a_run_outlives_those_who_read_its_output(tmp_path: Path) -> None:
    command = [*PLAIN, "--trackers=none", "--limit-train-images=2000", "--limit-test-images=100", "--run-name=x"]
    process = subprocess.Popen(
        [*command, f"--output-dir={tmp_path}"], cwd=PROJECT_FOLDER, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0, process.stderr.read()
    assert process.stderr.read() == b""
    assert state_of(tmp_path / "x")["status"] == "finished"
