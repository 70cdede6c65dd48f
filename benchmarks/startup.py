"""How long it takes until the first optimizer step is done, and how much memory a run needs.

    python benchmarks/startup.py                       # nine rounds, some two minutes

imports   a Python that imports torch, torchvision and accelerate, and ends
none      train.py --trackers none, from the start of its process to the end of its first step
wandb     the same with W&B, offline

In turns; ratios are taken within a round. Medians, least and most. Memory is the peak of the whole process.
"""

import argparse
import os
import resource
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # and not this folder

IMPORTS = "import torch, torchvision, accelerate"


def end_after_first_step(flags: list[str]) -> None:
    """Train as the flags say; say when the first step is done, and how much memory was needed, and end there."""
    import mnist.training.progress

    update = mnist.training.progress.Progress.update

    def once(self: Any, *arguments: Any) -> None:
        update(self, *arguments)
        print(time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)
        os._exit(0)

    mnist.training.progress.Progress.update = once  # type: ignore[assignment, method-assign]
    sys.argv = ["train.py", *flags]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def first_step(scratch: Path, trackers: str) -> tuple[float, float]:
    """Seconds until the first step is done, and the MiB that were needed by then."""
    folder = tempfile.mkdtemp(dir=scratch)
    command = [sys.executable, __file__, "--inside", f"--trackers={trackers}", f"--output-dir={folder}"]
    started = time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    finished, memory = done.stdout.splitlines()[-1].split()
    return float(finished) - started, float(memory)


def imports() -> float:
    """Seconds of a process that imports."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - started


def spread(values: list[float], form: str = ".2f") -> str:
    """Median, least and most."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        end_after_first_step(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="times that each is run (default: 9)")
    arguments = parser.parse_args()
    os.environ.update(WANDB_MODE="offline", CUDA_VISIBLE_DEVICES="")
    bare: list[float] = []
    steps: dict[str, list[tuple[float, float]]] = {"none": [], "wandb": []}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(arguments.rounds):
            bare.append(imports())
            for trackers, found in steps.items():
                found.append(first_step(Path(scratch), trackers))

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "accelerate", "wandb"))
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {packages}")
    print(f"python {shlex.join(['benchmarks/startup.py', *sys.argv[1:]])}: {arguments.rounds} rounds\n")
    print(f"{IMPORTS}, s   {spread(bare)}")
    for trackers, found in steps.items():
        seconds, memory = zip(*found, strict=True)
        ratio = [mine / its for mine, its in zip(seconds, bare, strict=True)]
        print(f"--trackers {trackers:5}   first step after, s        {spread(list(seconds))}")
        print(f"                   ratio to the imports       {spread(ratio)}")
        print(f"                   peak memory, MiB           {spread(list(memory), '.0f')}")


if __name__ == "__main__":
    main()
