"""Runs that are killed or lose their disk or a process, and are resumed."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mnist.config.settings import PROJECT_FOLDER
from mnist.runs.launched import kill_all
from tests.conftest import Launch, MainHere, metrics_of, state_of
from tests.launched.test_processes import CONFIGS, TORCHRUN
from tests.support import wandb_log
from tests.support.namespaces import NAMESPACES
from tests.training.test_checkpoint import checkpoints_of, end_of

RANDOM = str(Path("tests", "support", "augmented.py"))  # uses every random generator
COMMANDS = {1: (sys.executable, RANDOM), 2: (*TORCHRUN, "2", RANDOM)}
SETTINGS = (
    *("--trackers=none", "--epochs=3", "--limit-train-images=2007", "--checkpoint-every=20", "--log-every=7"),
    *("--schedule=cosine", "--validation-size=500", "--global-batch-size=20", "--gradient-accumulation-steps=2"),
)


def start(command: tuple[str, ...], folder: Path, *flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*command, *flags, f"--output-dir={folder / 'runs'}"],
        cwd=PROJECT_FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def first_line(folder: Path) -> float:
    """Wait until a run logs; returns the seconds that took."""
    began = time.monotonic()
    while not ((folder / "metrics.jsonl").is_file() and metrics_of(folder)):
        assert time.monotonic() < began + 60
        time.sleep(0.02)
    return time.monotonic() - began


def wait_until_resumed(folder: Path, since: float) -> None:
    """Wait until a process started at `since` has written state.json."""
    deadline = time.monotonic() + 60
    while not ((folder / "state.json").is_file() and (folder / "state.json").stat().st_mtime > since):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_and_resume(processes: int, kills: int, folder: Path, *settings: str) -> None:
    """Compare a run that is killed at random moments and resumed with an undisturbed one."""
    command = (*COMMANDS[processes], *SETTINGS, *settings)
    whole, killed = folder / "runs" / "whole", folder / "runs" / "killed"
    process = start(command, folder, "--run-name=whole")
    start_up, began = first_line(whole), time.monotonic()
    finish(process)
    training = time.monotonic() - began
    moments: list[float] = []
    while len(moments) < kills:
        began = time.time()
        process = start(command, folder, "--run-name=killed", "--resume=auto")
        if len(moments) % 2:  # during start-up
            moments.append(random.uniform(0, 0.8 * start_up))
        else:  # during training, leaving some of it for the last start
            wait_until_resumed(killed, began)
            moments.append(random.uniform(0, 0.7 * training / max(1, kills / 2)))
        time.sleep(moments[-1])
        if process.poll() is None:
            kill_all(process.pid)
            process.communicate()
        else:  # it finished sooner than the first run did: start over
            finish(process)
            shutil.rmtree(killed)
            moments.clear()
    finish(start(command, folder, "--run-name=killed", "--resume=auto"))
    assert end_of(killed) == end_of(whole), f"killed after {moments} seconds"
    assert (whole / "best/model.safetensors").read_bytes() == (killed / "best/model.safetensors").read_bytes()
    steps = [line["step"] for line in metrics_of(killed) if "test/loss" not in line]
    assert len(steps) == len(set(steps))


@pytest.mark.parametrize(
    ("processes", "kills"), [(1, 1), *(pytest.param(*it, marks=pytest.mark.slow) for it in ((1, 2), (2, 1)))]
)
def test_a_killed_and_resumed_run_ends_bit_identical(processes: int, kills: int, tmp_path: Path) -> None:
    kill_and_resume(processes, kills, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_twenty_times_ends_bit_identical(processes: int, tmp_path: Path) -> None:
    kill_and_resume(processes, 20, tmp_path, "--limit-train-images=30007", "--epochs=4")


FULL_DISK = """
    mount -t tmpfs -o size=2600k tmpfs "$RUNS"
    "$@" --checkpoint-every=5 --max-steps=40 --run-name=x; echo "ended with $?"
    cat "$RUNS/x/state.json"
    ls -A "$RUNS/x/checkpoints"
    mount -o remount,size=20m "$RUNS"
    "$@" --run-name=x --resume=auto; echo "ended with $?"
    cp -r "$RUNS/x" "$COPY"
"""

READ_ONLY = """
    "$@" --checkpoint-every=50 --epochs=1000 --run-name=x & job=$!
    until [ "$(ls -d "$RUNS"/x/checkpoints/step-* 2> /dev/null | wc -l)" -ge 3 ]; do sleep 0.1; done
    mount --bind "$RUNS/x" "$RUNS/x"
    until mount -o remount,ro,bind "$RUNS/x"; do sleep 0.01; done  # busy while something is written
    wait $job; echo "ended with $?"
    ls -A "$RUNS/x/checkpoints"
    umount "$RUNS/x"
    "$@" --run-name=x --resume=auto --epochs=1; echo "ended with $?"
    cp -r "$RUNS/x" "$COPY"
"""


@pytest.mark.skipif(not NAMESPACES, reason="needs Linux's namespaces")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"), [(FULL_DISK, "No space left"), (READ_ONLY, "Read-only file system")], ids=["full", "read-only"]
)
def test_a_full_or_read_only_disk_ends_a_run_with_an_error_and_intact_checkpoints(
    script: str, words: str, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    command = [sys.executable, "train.py", "--trackers=none", "--limit-train-images=2000", "--limit-test-images=100"]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command, f"--output-dir={runs}"],
        cwd=PROJECT_FOLDER,
        env=os.environ | {"RUNS": str(runs), "COPY": str(tmp_path / "copy")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.count("ended with 1\n") == done.stdout.count("ended with 0\n") == 1, done
    assert f"UserError: {runs / 'x'}: cannot write: {words}" in done.stderr
    assert "resume: python train.py --resume" in done.stderr
    assert "Traceback" not in done.stderr
    kept = [line for line in done.stdout.splitlines() if line.startswith("step-")]
    assert len(kept) in (3, 4)  # 4 if the oldest could not be removed
    assert [path.name for path in (tmp_path / "copy").rglob(".*")] == [".lock"]
    assert f"resumed     from {max(kept)}" in done.stdout
    assert state_of(tmp_path / "copy")["status"] == "finished"
    if words == "No space left":
        assert '"status": "failed"' in done.stdout
        assert ".step-" not in done.stdout  # no partial checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_torchrun_restarts_a_job_that_lost_a_process_from_its_last_checkpoint(named: bool, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "train.py")
    settings = ("--trackers=none", "--limit-train-images=4000", "--checkpoint-every=50", "--epochs=8", "--log-every=50")
    process = start(command, tmp_path, *settings, *(["--run-name=x"] if named else []))
    runs = tmp_path / "runs"
    first_line(runs / "latest")
    while not checkpoints_of(runs / "latest"):
        time.sleep(0.02)
    psutil.Process(process.pid).children()[1].kill()
    output = finish(process)
    assert "resumed     from step-" in output
    (folder,) = [path for path in runs.iterdir() if not path.is_symlink()]
    assert (state_of(folder)["status"], state_of(folder)["step"]) == ("finished", 8 * 200)
    steps = [line["step"] for line in metrics_of(folder) if "test/loss" not in line]
    assert steps == list(range(50, 8 * 200 + 1, 50))


@pytest.mark.slow
def test_a_resumed_wandb_run_keeps_its_id_and_logs_equal_values_twice(tmp_path: Path) -> None:
    command = (sys.executable, "train.py", "--limit-train-images=3000", "--log-every=20", "--run-name=x")
    folder = tmp_path / "runs" / "x"
    process = start(command, tmp_path, "--epochs=100", "--checkpoint-every=30")
    while not (folder.is_dir() and len(checkpoints_of(folder)) == 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.terminate()
    process.communicate()
    for path in checkpoints_of(folder)[1:]:  # as if killed long after its last checkpoint
        shutil.rmtree(path)
    output = finish(start(command, tmp_path, "--resume=auto", "--epochs=1"))
    assert "/wandb/offline-run-*-" in next(line for line in output.splitlines() if "wandb sync" in line)
    logs = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(logs) == 2
    assert len({path.name for path in logs}) == 1  # the name holds the id
    lines = {line["step"]: line for line in metrics_of(folder) if "test/loss" not in line}
    rows = [row for path in logs for row in wandb_log.history(path) if "train/loss" in row and "test/loss" not in row]
    assert len(rows) > len(lines)
    assert {row["step"] for row in rows} >= lines.keys()
    for row in rows:
        if row["step"] in lines:
            assert row["train/loss"] == lines[row["step"]]["train/loss"]
    assert wandb_log.metrics(logs[1])["train/loss"].step_metric == "step"


def test_flags_that_do_not_match_a_resume_are_wrong_usage(main_here: MainHere, tmp_path: Path) -> None:
    for flags, message in (
        (("--resume=auto",), "--resume auto: requires --run-name"),
        ((f"--resume={tmp_path}",), f"--resume {tmp_path}: no run there"),
    ):
        done = main_here(*flags, "--trackers=none")
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.slow
def test_checkpoints_resume_in_bf16_and_compiled_and_back(launch: Launch, tmp_path: Path) -> None:
    settings = ("--trackers=none", "--limit-train-images=1000", "--limit-test-images=500", f"--output-dir={tmp_path}")
    plain = ("-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml"), "train.py")
    bf16 = (*plain[:-1], "--mixed_precision=bf16", "train.py")
    compiled = (*plain[:-1], "--dynamo_backend=inductor", "train.py")
    evaluations: dict[str, Any] = {}
    for names in ("plain plain plain", "bf16 plain bf16", "compiled plain compiled", "plain compiled bf16"):
        flags = ("--run-name", names.replace(" ", "-"), "--resume=auto")
        for epoch, name in enumerate(names.split(), 1):
            command = {"plain": plain, "bf16": bf16, "compiled": compiled}[name]
            done = launch(*settings, *flags, f"--epochs={epoch}", command=command)
            assert done.returncode == 0, done.stderr
            assert ("no longer bit-identical" in done.stdout) == (epoch > 1 and name != names.split()[epoch - 2])
        evaluations[names] = {line["step"]: line for line in metrics_of(tmp_path / flags[1]) if "test/loss" in line}
        assert evaluations[names].keys() == {100, 200, 300}
        expected = evaluations["plain plain plain"]
        for step, line in evaluations[names].items():
            assert line["test/loss"] == pytest.approx(expected[step]["test/loss"], rel=0.05)
