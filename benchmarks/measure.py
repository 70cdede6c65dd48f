"""What the benchmarks share: interleaved contestants, medians with their spread, and runs of train.py.

    results = interleave({"ours": run_ours, "plain": run_plain}, rounds=5)  # each is called with the round's number
    print(header("torch"))
    print_table(results, baseline="plain")

The machines are shared and their speed drifts, so ratios are taken within a round.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, even if another copy is installed

from mnist.runs.record import Record  # noqa: E402

WARM_UP = 100  # steps that warm up a process
POOLS: dict[ProcessPoolExecutor, Future[int]] = {}  # of in_one_process, and whether their processes have started
WARM: list[bool] = []  # not empty once train_warm has warmed up this process
T = TypeVar("T")
Figures = dict[str, float]  # of one contestant in one round, by name


def command_line(docstring: str | None, rounds: int | None = None, on_gpus: bool = False) -> argparse.ArgumentParser:
    """A parser with `docstring` as its help, and --rounds if a default is given. Puts W&B offline.

    Hides GPUs, except from a benchmark that runs `on_gpus`: that has --device, and --log for `interleave`.
    """
    os.environ["WANDB_MODE"] = "offline"
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="runs of each contestant (default: %(default)s)")
    if on_gpus:
        parser.add_argument("--device", type=use_device, default="cpu", help="cpu or cuda (default: cpu)")
        parser.add_argument("--log", type=Path, metavar="FILE", help="append each result to this file, as JSON")
    else:
        use_device("cpu")
    return parser


def use_device(name: str) -> str:
    """Hide GPUs for "cpu". Raises ArgumentTypeError for "cuda" without a GPU, and for other names."""
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return name
    import torch

    if name != "cuda" or not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU" if name == "cuda" else f"{name}: must be cpu or cuda")
    return name


def interleave(
    contestants: Mapping[str, Callable[[int], Figures]], rounds: int, log: Path | None = None
) -> dict[str, list[Figures]]:
    """Run each contestant once per round. Each round starts with another one.

    With a `log`, each result is appended to that file, and a contestant that fails does not end the others: its error
    is logged, it is left out from then on, and SystemExit is raised after the last round.
    """
    results: dict[str, list[Figures]] = {name: [] for name in contestants}
    names = list(contestants)
    wait(POOLS.values())
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            if name not in results:
                continue
            result: dict[str, Any]
            try:
                result = contestants[name](number)
                results[name].append(result)
                shown = ", ".join(f"{figure} {rounded(value)}" for figure, value in result.items())
            except (Exception, SystemExit) as error:
                if log is None:
                    raise
                traceback.print_exc()
                del results[name]
                shown = f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"
                result = {"error": shown}
            print(f"round {number + 1} of {rounds}: {name}: {shown}", flush=True)
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"round": number, "contestant": name, **result}) + "\n")
    while POOLS:
        POOLS.popitem()[0].shutdown()
    if failed := contestants.keys() - results.keys():
        raise SystemExit(f"failed: {', '.join(sorted(failed))}")
    return results


def read_log(log: Path) -> tuple[dict[str, list[Figures]], dict[str, str]]:
    """The results of the complete rounds in a log of `interleave`, and the errors of contestants that failed."""
    by_name: dict[str, dict[int, Figures]] = {}
    errors: dict[str, str] = {}
    for line in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
        number, name = line.pop("round"), line.pop("contestant")
        if "error" in line:
            errors[name] = line["error"]
        else:
            by_name.setdefault(name, {})[number] = line
    by_name = {name: runs for name, runs in by_name.items() if name not in errors}
    complete = sorted(set.intersection(*map(set, by_name.values()))) if by_name else []
    return {name: [runs[number] for number in complete] for name, runs in by_name.items() if complete}, errors


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


def table(
    results: Mapping[str, Sequence[Figures]],
    baseline: str | None,
    figure: str = "seconds",
    form: Callable[[Sequence[float]], str] = spread,
) -> list[list[str]]:
    """A heading, and a row per contestant: its figures, and the ratio of one of them to the baseline's, if any."""
    figures = list(dict.fromkeys(name for runs in results.values() for name in runs[0]))
    rows = [["", *figures, *([f"ratio to {baseline}"] if baseline else [])]]
    for name, runs in results.items():
        cells = [form(column(runs, key)) if key in runs[0] else "" for key in figures]
        if baseline:
            cells.append(form(ratios(runs, results[baseline], figure)) if figure in runs[0] else "")
        rows.append([name, *cells])
    return rows


def print_table(
    results: Mapping[str, Sequence[Figures]],
    baseline: str | None,
    figure: str = "seconds",
    form: Callable[[Sequence[float]], str] = spread,
) -> None:
    """Print the rows of `table`."""
    rows = table(results, baseline, figure, form)
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip())


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its heading."""
    lines = ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def describe(device: str, *packages: str) -> dict[str, str]:
    """Date, devices with driver and cores, versions of those `packages` that are installed, and the command."""
    import torch

    from mnist.launch.hardware import device_name

    installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
    machine = f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores"
    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.split() if shutil.which(asked[0]) else []
        gpu = f"{device_name(torch.device(device))}, driver {driver[0] if driver else 'unknown'}"
        machine = f"{gpu}, CUDA {torch.version.cuda}, {machine}"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": ", ".join(f"{name} {installed[name]}" for name in packages if name in installed),
        "command": f"python {shlex.join(sys.argv)}",
    }


def header(*packages: str, device: str = "cpu") -> str:
    """What `describe` returns, in two lines."""
    *facts, command = describe(device, *packages).values()
    return f"\n{', '.join(facts)}\n{command}\n"


# --- clocks


def now(device: str = "cpu") -> float:
    """A clock in seconds, read when the device has done all that it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def restored(*objects: Any) -> Iterator[None]:
    """Put the state_dict of each object back afterwards: for training that is only to warm up."""
    states = [copy.deepcopy(each.state_dict()) for each in objects]
    yield
    for each, state in zip(objects, states, strict=True):
        each.load_state_dict(state)


# --- runs


def tracker() -> str:
    """The default tracker, or `none` if it is not installed."""
    spec = find_spec("wandb")
    return "none" if spec is None or spec.origin is None else "wandb"  # no origin: a folder ./wandb of offline runs


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
    """Run train.py, or another `script`, in a new process and a new folder below `scratch`.

    Ends this benchmark if the run fails, or if it could not compile although the `flags` ask for it.
    """
    folder = tempfile.mkdtemp(dir=scratch)
    run(*script, *flags, f"--output-dir={folder}", "--run-name=run", environment=environment)
    return compiled_as_asked(Record.read(Path(folder, "run")))


def train_here(flags: Sequence[str]) -> None:
    """Run train.py in this process, also repeatedly. Ends the process if a run fails."""
    from accelerate.state import AcceleratorState, GradientState

    import train

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    sys.argv = ["train.py", *flags]
    if exit_code := train.main():
        raise SystemExit(exit_code)


def train_warm(scratch: Path, *flags: str) -> Record:
    """`train_here` in a new folder below `scratch`; before the first time, a hundred steps to warm up this process.

    The output goes to a file. Raises SystemExit like run_train.
    """
    if not WARM:
        WARM.append(True)
        train_warm(scratch, *flags, "--epochs=1", f"--max-steps={WARM_UP}")
    folder = Path(tempfile.mkdtemp(dir=scratch))
    with (folder / "log").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            train_here([*flags, f"--output-dir={folder}", "--run-name=run"])
        except SystemExit as error:
            raise SystemExit(f"train.py {shlex.join(flags)} failed:\n{(folder / 'log').read_text()}") from error
    return compiled_as_asked(Record.read(folder / "run"))


def compiled_as_asked(record: Record) -> Record:
    """The record; SystemExit if the run was to be compiled and could not."""
    if reason := record.environment.get("not_compiled"):
        raise SystemExit(f"train.py --compile did not compile: {reason}")
    return record


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """The result of a function of a module, called in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def in_one_process(function: Callable[..., T], *arguments: object) -> Callable[[int], T]:
    """A contestant that calls function(*arguments, number) in a process of its own, the same one in every round.

    The processes import the benchmark at the same time, before `interleave` starts the first round.
    """
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    POOLS[pool] = pool.submit(os.getpid)
    return lambda number: pool.submit(function, *arguments, number).result()
