"""Images per second of 1, 2 and 4 processes that train one model together, beside as many that train alone.

    python benchmarks/scaling.py                                # three rounds, about 12 minutes on two cores
    python benchmarks/scaling.py --rounds 5 --picture docs/scaling.png

together  torchrun --nproc-per-node n train.py: the gradients are averaged at every step
alone     n times python train.py at the same time, with the same batch a process and the same number of threads: what
          the machine itself allows, when nothing is exchanged

The share of cores is fair: each of n processes has cores / n threads, in both cases (mnist/launch/hardware.py). A
process gets the same number of images whatever n is, and the figures are those of the epochs in the middle of a run,
when all processes are busy. Efficiency is together / alone within a round, for these machines are shared and their
speed drifts.
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
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mnist.launch.hardware import device_name  # noqa: E402

PROCESSES = (1, 2, 4)
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
EPOCHS = 6
WORKLOADS = {  # flags, and images of an epoch a process
    "mlp, batches of 10": ((), 10_000),
    "cnn, batches of 64": (("--recipe=cnn",), 4_096),
    "cnn, batches of 256": (("--recipe=cnn", "--batch-size=256"), 5_120),
}


class Pair(NamedTuple):
    """Images per second of one round."""

    together: float
    alone: float


def images_per_second(folder: Path) -> float:
    """The mean over a run's epochs, but for the first and the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [float(line["perf/images_per_second"]) for line in lines if "perf/images_per_second" in line]
    return statistics.mean(epochs[1:-1])


def measure(workload: str, count: int, together: bool, scratch: Path) -> float:
    """Images per second of `count` processes, all of them together."""
    flags, images = WORKLOADS[workload]
    folder = Path(tempfile.mkdtemp(dir=scratch))
    limit = images * (count if together else 1)
    command = [sys.executable, *(["-m", "torch.distributed.run", f"--nproc-per-node={count}"] if together else [])]
    command += ["train.py", *flags, f"--epochs={EPOCHS}", "--limit-test-images=100", f"--limit-train-images={limit}"]
    command += ["--trackers=none", f"--output-dir={folder}"]
    names = ["0"] if together else [str(number) for number in range(count)]
    environment = os.environ | ({} if together else {"LOCAL_WORLD_SIZE": str(count)})
    started = [
        subprocess.Popen([*command, f"--run-name={name}"], cwd=ROOT, env=environment, **QUIET)  # type: ignore[call-overload]
        for name in names
    ]
    for process in started:
        _, errors = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"{shlex.join(command)} failed:\n{errors.decode()}")
    return sum(images_per_second(folder / name) for name in names)


def compare(scratch: Path, rounds: int, workloads: list[str]) -> dict[tuple[str, int], list[Pair]]:
    """Run all in turn; who goes first changes from round to round."""
    results = defaultdict(list)
    for number in range(rounds):
        for workload in workloads:
            for count in PROCESSES:
                order = (True, False) if number % 2 == 0 else (False, True)
                speed = {together: measure(workload, count, together, scratch) for together in order}
                pair = Pair(speed[True], speed[False])
                results[workload, count].append(pair)
                done = f"round {number + 1} of {rounds}: {workload}, {count} processes"
                print(f"{done}: {pair.together:,.0f} together, {pair.alone:,.0f} alone", flush=True)
    return results


def median(pairs: list[Pair]) -> Pair:
    """The median of each figure."""
    return Pair(*(statistics.median(figures) for figures in zip(*pairs, strict=True)))


def draw(results: dict[tuple[str, int], list[Pair]], path: Path) -> None:
    """Images per second over the number of processes, a panel a workload."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(workload for workload, _ in results))
    figure = Figure(figsize=(4.4 * len(workloads), 3.6), layout="constrained")
    for panel, workload in zip(figure.subplots(1, len(workloads), squeeze=False)[0], workloads, strict=True):
        medians = [median(results[workload, count]) for count in PROCESSES]
        places = range(len(PROCESSES))
        panel.bar([it - 0.2 for it in places], [it.alone for it in medians], 0.4, color="#c8ccd4", label="alone")
        together = panel.bar(
            [it + 0.2 for it in places], [it.together for it in medians], 0.4, color="#2a6fdb", label="together"
        )
        ratios = [statistics.median(it.together / it.alone for it in results[workload, n]) for n in PROCESSES]
        panel.bar_label(together, [f"{100 * ratio:.0f} %" for ratio in ratios], padding=2)
        panel.set_xticks(places, [str(count) for count in PROCESSES])
        panel.set(title=workload, xlabel="processes", ylabel="images per second")
        panel.margins(y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times that each is run (default: 3)")
    parser.add_argument("--only", default="", help="workloads whose name begins so: mlp, cnn (default: all)")
    parser.add_argument("--picture", type=Path, help="file to draw the medians into, .png or .svg")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as scratch:
        workloads = [name for name in WORKLOADS if name.startswith(arguments.only)]
        results = compare(Path(scratch), arguments.rounds, workloads)

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate"))
    print(f"\n{time.strftime('%Y-%m-%d')}, {device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {packages}")
    print(f"python {shlex.join(sys.argv)}: medians of {arguments.rounds} rounds, images per second\n")
    row = "{:20} {:>9} {:>10} {:>10} {:>24} {:>12}"
    print(row.format("", "processes", "together", "alone", "efficiency", "to 1 process"))
    for (workload, count), pairs in results.items():
        ratios = sorted(pair.together / pair.alone for pair in pairs)
        efficiency = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        middle = median(pairs)
        gain = f"{middle.together / median(results[workload, 1]).together:.2f}"
        print(row.format(workload, count, f"{middle.together:,.0f}", f"{middle.alone:,.0f}", efficiency, gain))
    if arguments.picture:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
