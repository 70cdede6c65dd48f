"""Signals end a run with a checkpoint: sent by hand, by schedulers, or because a launcher died."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mnist.config.settings import PROJECT_FOLDER
from mnist.reporting.terminal import Terminal
from tests.conftest import MainHere, hear_ctrl_c, metrics_of, state_of, wait_for

PLAIN = (sys.executable, "train.py")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "train.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py")
SMALL = ("--trackers=none", "--limit-train-images=2000", "--limit-test-images=100", "--run-name=x")
LONG = (*SMALL, "--epochs=100000", "--log-every=10")


class Job:
    """A run in a process group of its own, as in a terminal."""

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

    def workers(self) -> list[psutil.Process]:
        """The training processes: those without children."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return [process for process in family if not process.children()]

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
    """A run that is training; the parameter is its command."""
    job = Job(tmp_path, *request.param)
    try:
        wait_for(job.folder / "metrics.jsonl", job.process, job.output)
        yield job
    finally:
        job.end()


@pytest.fixture
def train_here(main_here: MainHere, tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Train in this process until what the argument does, in a thread, ends the run."""

    def run(act: Callable[[], object]) -> "subprocess.CompletedProcess[str]":
        def act_on_the_run() -> None:
            wait_for(tmp_path / "runs" / "x" / "metrics.jsonl")
            act()

        threading.Thread(target=act_on_the_run, daemon=True).start()
        return main_here(*LONG, f"--output-dir={tmp_path / 'runs'}")

    return run


def caught(status: str) -> int:
    """The set of signals that a process has handlers for, from its /proc/<pid>/status."""
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), 16)


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def check_interrupted(folder: Path, name: str, code: int, output: str) -> None:
    state = state_of(folder)
    assert (state["status"], state["error"], state["exit_code"]) == ("interrupted", name, code)
    assert state["checkpoint"] == state["step"] > 0
    assert '<span class="status interrupted">' in (folder / "report.html").read_text()
    assert "Traceback" not in output
    *words, flag, path = shlex.split(output.splitlines()[-1])
    assert (words, flag, Path(path)) == (["python", "train.py"], "--resume", folder)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGHUP, 129)], ids=lambda value: str(value)
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_its_exit_code(
    number: signal.Signals, code: int, train_here: Any, tmp_path: Path
) -> None:
    done = train_here(lambda: os.kill(os.getpid(), number))
    assert done.returncode == code
    check_interrupted(tmp_path / "runs" / "x", number.name, code, done.stderr + done.stdout)


@pytest.mark.parametrize("job", [(PLAIN,)], indirect=True)
def test_a_run_ended_by_a_signal_resumes_with_the_printed_command(job: Job, main_here: MainHere) -> None:
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(timeout=20) == 143
    output, step = job.output.read_text(), state_of(job.folder)["step"]
    check_interrupted(job.folder, "SIGTERM", 143, output)
    again = main_here(*shlex.split(output.splitlines()[-1])[2:], f"--max-steps={step + 5}")
    assert again.returncode == 0, again.stderr
    assert metrics_of(job.folder)[-1]["step"] == step + 5


@pytest.mark.slow
@pytest.mark.parametrize("job", [(TORCHRUN,)], indirect=True)
def test_a_closed_terminal_ends_a_run_under_torchrun_with_a_checkpoint(job: Job) -> None:
    os.killpg(job.process.pid, signal.SIGHUP)
    job.process.wait(timeout=40)
    state = state_of(job.folder)
    assert (state["error"], state["exit_code"], state["checkpoint"]) == ("SIGHUP", 129, state["step"])


@pytest.mark.parametrize("job", [(TORCHRUN, "--timeout-seconds=20")], indirect=True)
def test_a_signal_to_one_process_ends_all_at_the_same_step_with_a_checkpoint(job: Job) -> None:
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
    assert "lost its connection" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "number"),
    [
        ((ACCELERATE,), signal.SIGTERM),
        ((TORCHRUN,), signal.SIGKILL),
        ((TORCHRUN,), signal.SIGTERM),
        ((ACCELERATE,), signal.SIGUSR1),
        ((ACCELERATE,), signal.SIGKILL),
    ],
    indirect=["job"],
)
def test_a_signal_to_the_launcher_ends_its_workers_within_ten_seconds(job: Job, number: signal.Signals) -> None:
    workers = job.workers()
    job.process.send_signal(number)
    assert gone(workers, 10)
    job.process.wait(timeout=10)
    state = state_of(job.folder)
    assert (state["status"], state["error"], state["checkpoint"]) == ("interrupted", "SIGTERM", state["step"])
    assert list((job.folder / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.slow
@pytest.mark.parametrize("job", [(ACCELERATE,)], indirect=True)
def test_ctrl_c_on_the_process_group_under_a_launcher_leaves_a_checkpoint(job: Job) -> None:
    workers = job.workers()
    os.killpg(job.process.pid, signal.SIGINT)
    job.process.wait(timeout=10)
    assert gone(workers, 10)
    state = state_of(job.folder)
    assert (state["error"], state["exit_code"], state["checkpoint"]) == ("SIGINT", 130, state["step"])
    assert "accelerate launch train.py --resume" in job.output.read_text()


@pytest.mark.slow
def test_ctrl_c_that_also_ends_the_reader_of_the_output_exits_with_130(tmp_path: Path) -> None:
    command, errors = shlex.join([*PLAIN, *LONG, f"--output-dir={tmp_path / 'runs'}"]), tmp_path / "errors"
    script = f"set -o pipefail; {command} 2> {errors} | cat > /dev/null"
    shell = subprocess.Popen(["bash", "-c", script], cwd=PROJECT_FOLDER, preexec_fn=hear_ctrl_c, start_new_session=True)
    folder = tmp_path / "runs" / "x"
    try:
        wait_for(folder / "metrics.jsonl", shell, errors)
        for child in sorted(psutil.Process(shell.pid).children(), key=lambda child: child.name() != "cat"):
            child.send_signal(signal.SIGINT)  # to the reader first
        assert shell.wait(timeout=20) == 130
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
    assert errors.read_text() == ""
    assert state_of(folder)["exit_code"] == 130


@pytest.mark.slow
@pytest.mark.parametrize("job", [(TORCHRUN, "--timeout-seconds=60")], indirect=True)
def test_a_second_ctrl_c_after_a_second_ends_even_a_process_blocked_in_torch(job: Job) -> None:
    first, second = job.workers()
    second.suspend()
    time.sleep(0.5)  # now the first waits for it inside torch
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    first.send_signal(signal.SIGINT)  # a duplicate, as from launchers
    time.sleep(1.5)
    first.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert first.is_running()
    assert first.status() != psutil.STATUS_ZOMBIE
    first.send_signal(signal.SIGINT)
    assert gone([first], 2) or first.status() == psutil.STATUS_ZOMBIE
    assert state_of(job.folder)["error"] in ("a second SIGINT", "SIGINT")


@pytest.mark.slow
def test_a_background_run_survives_its_shell(tmp_path: Path) -> None:
    flags = shlex.join([*LONG, f"--output-dir={tmp_path / 'runs'}"])
    script = f"nohup {sys.executable} train.py {flags} > {tmp_path / 'output'} 2>&1 & echo $!"
    shell = subprocess.run(["sh", "-c", script], cwd=PROJECT_FOLDER, capture_output=True, text=True, check=True)
    process, folder, deadline = psutil.Process(int(shell.stdout)), tmp_path / "runs" / "x", time.monotonic() + 60
    try:
        wait_for(folder / "metrics.jsonl", output=tmp_path / "output")
        process.send_signal(signal.SIGHUP)
        lines = len(metrics_of(folder))
        while len(metrics_of(folder)) < lines + 10:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert process.is_running()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("number", "codes"),
    [(signal.SIGTERM, (143, -15)), (signal.SIGINT, (130, -2)), (signal.SIGUSR1, (75,)), (signal.SIGHUP, (129,))],
    ids=lambda value: str(value),
)
def test_a_signal_during_startup_ends_the_process_and_leaves_no_folder(
    number: signal.Signals, codes: tuple[int, ...], tmp_path: Path
) -> None:
    job = Job(tmp_path, PLAIN)
    status = Path(f"/proc/{job.process.pid}/status")
    while not caught(status.read_text()) >> signal.SIGUSR1 - 1 & 1:  # before torch is imported
        time.sleep(0.01)
    job.process.send_signal(number)
    assert job.process.wait(timeout=5) in codes
    assert not job.folder.exists()
    assert "Traceback" not in job.output.read_text()


def test_a_run_whose_folder_is_moved_fails_and_writes_nothing_there(train_here: Any, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    done = train_here(lambda: folder.rename(folder.with_name("elsewhere")))
    assert done.returncode == 1
    assert "x: was moved or removed during the run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not folder.exists()


def test_a_signal_after_the_last_step_does_not_change_a_finished_run(
    main_here: MainHere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = Terminal.result

    def with_a_signal(self: Terminal, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        result(self, *arguments)

    monkeypatch.setattr(Terminal, "result", with_a_signal)
    done = main_here(*SMALL, "--epochs=1", f"--output-dir={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Test accuracy" in done.stdout
    assert state_of(tmp_path / "x")["exit_code"] == 0
