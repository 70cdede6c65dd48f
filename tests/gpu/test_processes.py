"""Two processes on one GPU, which look like two machines to NCCL: correctness only, never speed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mnist.config.settings import PROJECT_FOLDER
from mnist.runs.launched import IN_FLOAT64
from mnist.verify import largest_difference
from tests.conftest import state_of, user_environment

pytestmark = pytest.mark.gpu
SMALL = ("--trackers=none", "--limit-train-images=1000", "--limit-test-images=200")


def start(folder: Path, *flags: str, processes: int = 2, before: Sequence[str] = ()) -> "list[subprocess.Popen[str]]":
    """`python train.py` as the processes of a job; the output of each is in `folder`.

    `before` are words before the script, as in LaunchedRuns.start.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    job = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    job |= {"MASTER_PORT": port, "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    started = []
    for rank in range(processes):
        environment = user_environment(folder, **job, RANK=str(rank), NCCL_HOSTID=f"host-{rank}")
        with (folder / f"output-{processes}-{rank}").open("w") as output:
            command = [sys.executable, *before, "train.py", *SMALL, f"--output-dir={folder / 'runs'}", *flags]
            started.append(
                subprocess.Popen(command, cwd=PROJECT_FOLDER, env=environment, stdout=output, stderr=output, text=True)
            )
    return started


def finish(folder: Path, jobs: "list[subprocess.Popen[str]]") -> list[int]:
    """The exit codes. Skips the test if NCCL refuses to share the GPU."""
    codes = [job.wait(timeout=120) for job in jobs]
    print(output := (folder / f"output-{len(jobs)}-0").read_text())
    if "Duplicate GPU detected" in output:
        pytest.skip("NCCL does not let two processes share this GPU")
    return codes


@pytest.fixture
def endless(tmp_path: Path) -> "Iterator[list[subprocess.Popen[str]]]":
    """Two processes in the middle of a run named x, which would take hours."""
    jobs = start(tmp_path, "--epochs=100000", "--log-every=10", "--run-name=x", "--timeout-seconds=20")
    try:
        while not (tmp_path / "runs" / "x" / "metrics.jsonl").exists() and jobs[0].poll() is None:
            time.sleep(0.1)
        yield jobs
    finally:
        for job in jobs:
            job.kill()
            job.wait()


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_two_processes_over_nccl_end_with_the_weights_of_one(model: str, tmp_path: Path) -> None:
    # in float64: after 25 steps in float32, Adam had turned rounding errors into differences of 8e-3 in the CNN
    flags = (f"--model={model}", "--epochs=1", "--global-batch-size=40")
    for processes in (1, 2):
        jobs = start(tmp_path, *flags, f"--run-name={processes}", processes=processes, before=IN_FLOAT64)
        assert finish(tmp_path, jobs) == [0] * processes
    assert largest_difference(tmp_path / "runs" / "1", tmp_path / "runs" / "2") <= 1e-10


def test_a_signal_to_one_process_ends_both_at_the_same_step(
    endless: "list[subprocess.Popen[str]]", tmp_path: Path
) -> None:
    endless[1].send_signal(signal.SIGTERM)
    assert finish(tmp_path, endless) == [143, 143]
    state = state_of(tmp_path / "runs" / "x")
    assert state["status"] == "interrupted"
    assert state["checkpoint"] == state["step"]


def test_a_process_that_is_killed_ends_the_other_with_an_error(
    endless: "list[subprocess.Popen[str]]", tmp_path: Path
) -> None:
    os.kill(endless[1].pid, signal.SIGKILL)
    first, second = finish(tmp_path, endless)
    assert second == -signal.SIGKILL
    # which of both depends on what the process waits for
    message = {1: "Process 0 lost its connection to the other processes", -signal.SIGABRT: "watchdog thread terminated"}
    assert message[first] in (tmp_path / "output-2-0").read_text()
