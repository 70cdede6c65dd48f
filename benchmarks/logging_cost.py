"""What it costs to be seen: metrics, W&B, TensorBoard, pictures and the report, of a run of the tutorial's recipe.

    python benchmarks/logging_cost.py                  # five rounds, about four minutes

inside    the time that training spends in what logs and draws, measured in a run with a clock around each: an epoch's
          share, and what comes once a run at its end
outside   the seconds of an epoch beside those of a run that logs nothing (--trackers none, and a --log-every that is
          never reached), in turns: so what W&B's own process takes of the cores is in it

Medians, least and most of all rounds. A share is of the epoch's training and evaluation, without what is measured.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # and not this folder

EACH_EPOCH = ("log", "update", "predict", "after_epoch")
AT_THE_END = ("write", "log_results", "__exit__")


def run_with_clocks(flags: list[str]) -> None:
    """Train as the flags say; at the end print what was spent where, as JSON."""
    import mnist.inference.predict
    import mnist.reporting.report
    import mnist.reporting.snapshots
    import mnist.tracking.trackers
    import train
    from mnist.config.command_line import parse_command_line
    from mnist.config.recipes import RECIPES

    spent: dict[str, float] = defaultdict(float)

    def clock(place: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(place, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[name] += time.perf_counter() - started

        setattr(place, name, timed)

    for name in ("log", "log_results", "start", "__exit__"):
        clock(mnist.tracking.trackers.Tracking, name)
    for name in ("after_epoch", "write"):
        clock(mnist.reporting.report.LiveReport, name)
    clock(mnist.reporting.snapshots.Evaluation, "update")
    clock(mnist.inference.predict, "predict")
    train.train(parse_command_line(RECIPES, flags))
    print(json.dumps(spent))


def epochs_of(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "test/loss" in line]


def measure(scratch: Path, flags: list[str], clocks: bool) -> tuple[list[dict[str, float]], dict[str, float]]:
    """The evaluations of a run, and what was spent where."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    script = [str(Path(__file__)), "--inside"] if clocks else ["train.py"]
    command = [sys.executable, *script, *flags, f"--output-dir={folder}", "--run-name=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    return epochs_of(folder / "x"), json.loads(done.stdout.splitlines()[-1]) if clocks else {}


def spread(values: list[float], form: str = ".2f") -> str:
    """Median, least and most."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        run_with_clocks(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each is run (default: 5)")
    parser.add_argument("--trackers", default="wandb,tensorboard", help="default: wandb,tensorboard")
    arguments = parser.parse_args()
    os.environ.update(WANDB_MODE="offline", CUDA_VISIBLE_DEVICES="")
    shares, ends, starts, ratios = [], [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            seen, seed = f"--trackers={arguments.trackers}", f"--seed={number}"
            epochs, spent = measure(Path(scratch), [seen, seed], clocks=True)
            pair = {"with": [seen, seed], "without": ["--trackers=none", "--log-every=1000000", seed]}
            order = list(pair) if number % 2 == 0 else list(pair)[::-1]
            lines = {name: measure(Path(scratch), pair[name], clocks=False)[0] for name in order}
            whole = sum(line["perf/epoch_seconds"] + line["perf/evaluation_seconds"] for line in epochs)
            each = sum(spent[name] for name in EACH_EPOCH)
            shares.append(100 * each / (whole - each))
            ends.append(sum(spent[name] for name in AT_THE_END))
            starts.append(spent["start"])
            seconds = {name: statistics.mean(it["perf/epoch_seconds"] for it in lines[name]) for name in lines}
            ratios.append(seconds["with"] / seconds["without"])
            print(f"round {number + 1}: {shares[-1]:.1f} % an epoch, {ends[-1]:.1f} s at the end", flush=True)
            print(f"  spent in seconds: { ({name: round(seconds, 2) for name, seconds in spent.items()}) }", flush=True)

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "wandb", "matplotlib"))
    print(f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {packages}")
    print(f"python {shlex.join(['benchmarks/logging_cost.py', *sys.argv[1:]])}: {arguments.rounds} rounds\n")
    print(f"inside: of an epoch, %               {spread(shares, '.1f')}")
    print(f"inside: at the end of a run, s       {spread(ends, '.1f')}")
    print(f"inside: at its start, s              {spread(starts, '.1f')}")
    print(f"outside: an epoch with / without     {spread(ratios)}")


if __name__ == "__main__":
    main()
