"""Kill a run at random and resume it, again and again, and compare the result with that of an undisturbed run.

    python benchmarks/soak.py --minutes 10
    python benchmarks/soak.py --minutes 30 --processes 2 -- --recipe cnn --limit-train-images 10000

Two times in three the whole job gets SIGKILL, as in a power failure; otherwise its launcher gets SIGTERM, as from a
scheduler. The moments are drawn from the whole time between a start and the checkpoints after it: start-up,
training, evaluation and the writing of checkpoints are all hit. Compared byte by byte, except for times: weights, the
state of the optimizer, of the schedule and of the random generators, and every line of metrics.jsonl. The exit code is
1 if they differ.
"""

import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from measure import ROOT, command_line, header

from mnist.runs.launched import kill_all
from mnist.runs.record import read_metrics

FLAGS = ["--trackers=none", "--limit-train-images=20000", "--epochs=3", "--checkpoint-every=100", "--log-every=1"]


def without_times(value: Any) -> Any:
    """A copy of a JSON value without times."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "seconds" and key[:5] != "perf/"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def newest_checkpoint(run: Path) -> tuple[Path | None, int]:
    """The newest checkpoint, if any, and its step."""
    newest = max((run / "checkpoints").glob("step-*"), default=None)
    return newest, json.loads((newest / "state.json").read_text())["progress"]["step"] if newest else 0


def result_of(run: Path) -> dict[str, Any]:
    """What is compared of a finished run."""
    newest, _ = newest_checkpoint(run)
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


def start(processes: int, runs: Path, *flags: str) -> "subprocess.Popen[bytes]":
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "train.py", *FLAGS, *flags, f"--output-dir={runs}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(job: "subprocess.Popen[bytes]", timeout: float | None = None) -> None:
    """Wait for a job, which must succeed. Raises TimeoutExpired."""
    _, errors = job.communicate(timeout=timeout)
    if job.returncode != 0:
        raise SystemExit(f"{shlex.join(map(str, job.args))} failed:\n{errors.decode()}")  # type: ignore[arg-type]


def strike(job: "subprocess.Popen[bytes]") -> str:
    """End a job from outside; returns the name of the signal."""
    signal = "SIGTERM" if random.random() < 1 / 3 else "SIGKILL"
    if signal == "SIGTERM":
        job.terminate()
    else:
        kill_all(job.pid)
    job.communicate()
    return signal


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="start no new run after this (default: 10)")
    parser.add_argument("--processes", type=int, default=1, help="of each job (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("flags", nargs="*", help="more flags of train.py")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    deadline = time.monotonic() + 60 * arguments.minutes
    strikes: Counter[str] = Counter()
    resumed = lost = most = finished = 0
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        undisturbed, began = runs / "undisturbed", time.monotonic()
        job = start(arguments.processes, runs, *arguments.flags, "--run-name=undisturbed")
        while not lines_of(undisturbed) and job.poll() is None:
            time.sleep(0.02)
        start_up = time.monotonic() - began
        finish(job)
        training = time.monotonic() - began - start_up
        steps = lines_of(undisturbed)[-1]["step"]
        print(f"undisturbed: {steps:,} steps, {start_up:.1f} s until the first, then {training:.1f} s", flush=True)
        while time.monotonic() < deadline:
            run = runs / f"run-{finished + 1}"
            hits: Counter[str] = Counter()
            while True:
                job = start(arguments.processes, runs, *arguments.flags, f"--run-name={run.name}", "--resume=auto")
                resumed += hits.total() > 0
                began = time.time()
                moment = random.uniform(0, start_up + training / 4) if time.monotonic() < deadline else None
                try:
                    finish(job, moment)
                    break
                except subprocess.TimeoutExpired:
                    signal = strike(job)
                hits[signal] += 1
                done = max((line["step"] for line in lines_of(run)), default=0)
                repeated = done - newest_checkpoint(run)[1]
                lost, most = lost + max(0, repeated), max(most, repeated)
                state = run / "state.json"
                trained = state.is_file() and state.stat().st_mtime > began
                if signal == "SIGTERM" and trained and repeated > 0:
                    problems.append(f"{run.name}: SIGTERM left no checkpoint of step {done}")
            finished += 1
            strikes += hits
            expected, result = result_of(undisturbed), result_of(run)
            unequal = ", ".join(part for part in expected if expected[part] != result[part])
            problems += [f"{run.name}: {unequal}"] if unequal else []
            verdict = f"DIFFERENT: {unequal}" if unequal else "the same to the bit"
            print(f"{run.name}: {hits.total()} strikes, {verdict}", flush=True)

    print(header("torch", "accelerate"))
    print(
        f"{finished} runs of {steps:,} steps were finished; {', '.join(f'{n} {name}' for name, n in strikes.items())}"
    )
    print(f"{resumed} resumes; {lost:,} steps lost and done again, at most {most} at once (a checkpoint every 100)")
    print("\n".join(problems) or "All are the same to the bit as the undisturbed run.")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
