"""Kill a run at random and resume it, again and again, and compare what it comes to with a run that nobody disturbed.

    python benchmarks/soak.py --minutes 10
    python benchmarks/soak.py --minutes 30 --processes 2 -- --recipe cnn --limit-train-images 10000

Two times in three the whole job is killed with SIGKILL, as by a machine that loses its power; otherwise its launcher
gets SIGTERM, as from a scheduler. The moments are drawn from the whole time between a start and the checkpoints after
it: start-up, training, evaluation and the writing of checkpoints are all hit. What is compared, byte by byte but for
times: weights, the state of the optimizer, of the schedule and of the random generators, and every line of
metrics.jsonl. Ends with 1 where they differ.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mnist.launch.hardware import device_name  # noqa: E402

FLAGS = ["--trackers=none", "--limit-train-images=20000", "--epochs=3", "--checkpoint-every=100", "--log-every=1"]


def without_times(value: Any) -> Any:
    """A copy of what was read from JSON without what a clock has said."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "seconds" and key[:5] != "perf/"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def checkpoint_of(run: Path) -> Path | None:
    """The newest one."""
    return max((run / "checkpoints").glob("step-*"), default=None)


def end_of(run: Path) -> dict[str, Any]:
    """What a run has come to, times aside."""
    newest = checkpoint_of(run)
    assert newest is not None
    state = without_times(json.loads((newest / "state.json").read_text()))
    del state["tracking"]  # the length of metrics.jsonl, times included
    return {
        "weights": (run / "model" / "model.safetensors").read_bytes(),
        "weights of the last checkpoint": (newest / "model.safetensors").read_bytes(),
        "optimizer": (newest / "optimizer.safetensors").read_bytes(),
        "state": state,
        "metrics": without_times(lines_of(run)),
    }


def start(processes: int, runs: Path, flags: list[str]) -> "subprocess.Popen[bytes]":
    """A job of so many processes."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "train.py", *FLAGS, *flags, f"--output-dir={runs}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(job: "subprocess.Popen[bytes]") -> None:
    """Wait for its end, which must be a good one."""
    _, errors = job.communicate()
    if job.returncode != 0:
        raise SystemExit(f"{shlex.join(map(str, job.args))} failed:\n{errors.decode()}")  # type: ignore[arg-type]


def descendants(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def strike(job: "subprocess.Popen[bytes]") -> str:
    """End a job from outside; by what."""
    if random.random() < 1 / 3:
        job.terminate()
        name = signal.SIGTERM.name
    else:
        family: dict[int, psutil.Process] = {}
        while new := [it for it in descendants(job.pid) if it.pid not in family]:
            for member in new:  # first stopped, so that none sees another die or starts one more
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.suspend()
                family[member.pid] = member
        for member in family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        name = signal.SIGKILL.name
    job.communicate()
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    parser.add_argument("--processes", type=int, default=1, help="of each job (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("flags", nargs="*", help="more flags of train.py")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    deadline = time.monotonic() + 60 * arguments.minutes
    strikes: Counter[str] = Counter()
    resumed = lost = most = finished = 0
    different: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        job, began = start(arguments.processes, runs, [*arguments.flags, "--run-name=undisturbed"]), time.monotonic()
        while not lines_of(runs / "undisturbed") and job.poll() is None:
            time.sleep(0.02)
        start_up = time.monotonic() - began
        finish(job)
        training = time.monotonic() - began - start_up
        steps = lines_of(runs / "undisturbed")[-1]["step"]
        print(f"undisturbed: {steps:,} steps, {start_up:.1f} s until the first, then {training:.1f} s", flush=True)
        while time.monotonic() < deadline:
            name = f"run-{finished + 1}"
            flags = [*arguments.flags, f"--run-name={name}", "--resume=auto"]
            hits: Counter[str] = Counter()
            while True:
                job = start(arguments.processes, runs, flags)
                resumed += hits.total() > 0
                began = time.time()
                try:
                    job.wait(random.uniform(0, start_up + training / 4) if time.monotonic() < deadline else None)
                    finish(job)
                    break
                except subprocess.TimeoutExpired:
                    by = strike(job)
                    hits[by] += 1
                done = max((line["step"] for line in lines_of(runs / name)), default=0)
                newest = checkpoint_of(runs / name)
                kept = json.loads((newest / "state.json").read_text())["progress"]["step"] if newest else 0
                lost, most = lost + max(0, done - kept), max(most, done - kept)
                state = runs / name / "state.json"
                trained = state.is_file() and state.stat().st_mtime > began
                if by == "SIGTERM" and trained and done > kept:
                    different.append(f"{name}: SIGTERM left no checkpoint of step {done}")
            finished += 1
            strikes += hits
            there, here = end_of(runs / "undisturbed"), end_of(runs / name)
            unequal = [part for part in there if there[part] != here[part]]
            different += [f"{name}: {', '.join(unequal)}"] if unequal else []
            print(
                f"{name}: {hits.total()} strikes, {'DIFFERENT: ' if unequal else 'the same to the bit'}{unequal or ''}"
            )
            sys.stdout.flush()

    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "accelerate"))
    print(f"\n{time.strftime('%Y-%m-%d')}, {device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {packages}")
    print(f"python {shlex.join(sys.argv)}")
    print(
        f"{finished} runs of {steps:,} steps came to their end; {', '.join(f'{n} {it}' for it, n in strikes.items())}"
    )
    print(f"{resumed} resumes; {lost:,} steps lost and done again, at most {most} at once (a checkpoint every 100)")
    print("\n".join(different) or "All are the same to the bit as the run that nobody disturbed.")
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
