"""What the benchmarks share: interleaved contestants, medians with their spread, and runs of train.py.

    results = interleave({"ours": run_ours, "plain": run_plain}, rounds=5)  # each is called with the round's number
    print(header("torch"))
    print_table(results, baseline="plain")

The machines are shared and their speed drifts, so ratios are taken within a round.
"""

import argparse
import math
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, even if another copy is installed

from mnist.runs.record import Record  # noqa: E402

T = TypeVar("T")
Figures = dict[str, float]  # of one contestant in one round, by name


def command_line(docstring: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with `docstring` as its help, and --rounds if a default is given. Hides GPUs and puts W&B offline."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", WANDB_MODE="offline")
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="runs of each contestant (default: %(default)s)")
    return parser


def interleave(contestants: Mapping[str, Callable[[int], Figures]], rounds: int) -> dict[str, list[Figures]]:
    """Run each contestant once per round. Each round starts with another one."""
    results: dict[str, list[Figures]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            figures = contestants[name](number)
            results[name].append(figures)
            shown = ", ".join(f"{figure} {rounded(value)}" for figure, value in figures.items())
            print(f"round {number + 1} of {rounds}: {name}: {shown}", flush=True)
    return results


def column(runs: Sequence[Figures], figure: str) -> list[float]:
    """One figure of a contestant, over the rounds."""
    return [figures[figure] for figures in runs]


def ratios(runs: Sequence[Figures], baseline: Sequence[Figures], figure: str = "seconds") -> list[float]:
    """One contestant's figure divided by another's, round by round."""
    return [mine[figure] / theirs[figure] for mine, theirs in zip(runs, baseline, strict=True)]


def rounded(value: float) -> str:
    """Four significant digits: 0.9551, 2.801, 95,369."""
    is_whole = isinstance(value, int) or value == 0
    return f"{value:,.{0 if is_whole else max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{rounded(statistics.median(values))} [{rounded(min(values))}, {rounded(max(values))}]"


def print_table(
    results: Mapping[str, Sequence[Figures]],
    baseline: str,
    figure: str = "seconds",
    form: Callable[[Sequence[float]], str] = spread,
) -> None:
    """A row per contestant: its figures, and the ratio of one of them to the baseline's."""
    figures = list(dict.fromkeys(name for runs in results.values() for name in runs[0]))
    rows = [["", *figures, f"ratio to {baseline}"]]
    for name, runs in results.items():
        cells = [form(column(runs, key)) if key in runs[0] else "" for key in figures]
        rows.append([name, *cells, form(ratios(runs, results[baseline], figure)) if figure in runs[0] else ""])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip())


def header(*packages: str) -> str:
    """Date, device, cores, versions of those `packages` that are installed, and the command."""
    import torch

    from mnist.launch.hardware import device_name

    installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in packages if name in installed)
    machine = f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores"
    return f"\n{time.strftime('%Y-%m-%d')}, {machine}, {versions}\npython {shlex.join(sys.argv)}\n"


def run(*command: object, environment: Mapping[str, str] | None = None) -> float:
    """Run `python *command`, which must succeed; returns its seconds."""
    words = [sys.executable, *map(str, command)]
    started = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(words)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


def run_train(
    scratch: Path, *flags: str, script: Sequence[object] = ("train.py",), environment: Mapping[str, str] | None = None
) -> Record:
    """Run train.py, or another `script`, in a new process and a new folder below `scratch`."""
    folder = tempfile.mkdtemp(dir=scratch)
    run(*script, *flags, f"--output-dir={folder}", "--run-name=run", environment=environment)
    return Record.read(Path(folder, "run"))


def train_here(flags: Sequence[str]) -> None:
    """Run train.py in this process, which ends if it fails."""
    import train

    sys.argv = ["train.py", *flags]
    if exit_code := train.main():
        raise SystemExit(exit_code)


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """The result of a function of a module, called in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
