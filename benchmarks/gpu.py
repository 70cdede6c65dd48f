"""Measure on one GPU what the project promises there: tests, checks, and goals of speed and accuracy.

    python benchmarks/gpu.py                        # make gpu-check: ten minutes at most, without a network
    python benchmarks/gpu.py --best --minutes 20    # make gpu-best: the recipe best, and ten minutes of training
    python benchmarks/gpu.py --only peers fast
    python benchmarks/gpu.py --device cpu --quick   # tiny sizes, to try the command itself

Writes gpu-check.md and gpu-check.json (with --best gpu-best), again after each part. Each part is a command of its own.
It gets a share of the time that is left and is stopped at the end of it; what it has measured by then counts. The exit
code is 1 if a part failed, was stopped or was skipped; a goal that is not met is a result.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import measure
import peers
from measure import ROOT, Figures, rounded
from recipes import ACCURACY, PROCESS
from resnet50 import RATE

from mnist.files import write_file
from mnist.runs.launched import killed_at_the_end

CONTESTANTS = ("ours", "compiled", "plain", "reduce-overhead", "keras", "jax")  # of peers.py
TINY_IMAGES = "--model cnn-quick --image-size 28 --batch-size 8 --steps 4"
TINY_RESNET = f"{TINY_IMAGES} --model=resnet18 --image-size=32"  # timm has no cnn-quick
TINY_TRAINING = "--epochs=2 --limit-test-images=200"  # flags of train.py
SHORTEST, RESERVE = 10.0, 5.0  # seconds: a part with less is not started; for ending a part and writing the files
# Flags after --recipe best, for one network that trains for ten minutes on a GPU; seed 0, the first run
# counts. Not yet chosen: only more epochs. To choose, add --validation-size 10000 and read val/accuracy, not test's.
TEN_MINUTES = "--epochs=300"


class Part(NamedTuple):
    share: int  # of the time: the seconds that it is estimated to take on an H100
    rounds: int
    command: str
    tiny: str = "--steps 20"  # more flags with --quick


RECIPES = "benchmarks/recipes.py --seeds {rounds} {common}"
CHECK = {
    "tests": Part(110, 1, "-m pytest -q -m gpu --maxprocesses 8 --junitxml={log} {files}"),
    "verify": Part(160, 1, "-m mnist verify --output {log} --output-dir {scratch}"),
    "peers": Part(150, 3, "benchmarks/peers.py --rounds {rounds} --steps 2000 --only {contestants} {common}"),
    "fast": Part(60, 5, f"{RECIPES} -- {{train}}"),
    "epochs": Part(40, 3, "benchmarks/epoch_ends.py --steps 2000 --rounds {rounds} {common}"),
    "resnet50": Part(90, 3, "benchmarks/resnet50.py --rounds {rounds} {common}", TINY_IMAGES),
}
BEST = {
    "best": Part(180, 3, f"{RECIPES} --recipe best -- {{train}}"),
    "ten-minutes": Part(660, 1, f"{RECIPES} --recipe best -- {TEN_MINUTES} {{train}}"),
    "timm": Part(100, 3, "benchmarks/resnet50.py --only cache timm --rounds {rounds} {common}", TINY_RESNET),
}


class Goal(NamedTuple):
    """A figure of one contestant, or the ratio of the first to the second; `middle` summarizes the rounds."""

    part: str
    work: str
    contestants: tuple[str, ...]
    figure: str
    limit: float | None = None  # at most; no limit: shown for comparison
    at_least: bool = False
    middle: Callable[[Sequence[float]], float] = statistics.median


EAGER, CAPTURED = "default recipe, eager", "default recipe, in a CUDA graph"
RESNET = "resnet50, 224 x 224, bf16, batches of 256"
LONG = "one network, ten minutes of a GPU, seed 0, one try"
GOALS = [
    Goal("tests", "pytest -m gpu: failures", ("pytest",), "failed", 0),
    Goal("verify", "mnist verify: failures", ("verify",), "failed", 0),
    Goal("peers", f"{EAGER}: time relative to plain PyTorch, fused Adam", ("ours", "plain"), "seconds", 1),
    Goal("peers", f"{CAPTURED}: relative to plain PyTorch", ("compiled", "plain"), "seconds", 0.35),
    Goal("peers", f"{CAPTURED}: relative to Keras on JAX, fit", ("compiled", "keras"), "seconds", 1),
    Goal("peers", f"{CAPTURED}: relative to reduce-overhead", ("compiled", "reduce-overhead"), "seconds", 1),
    Goal("peers", f"{CAPTURED}: relative to a jitted JAX step", ("compiled", "jax"), "seconds", 1.3),
    Goal("fast", "--recipe fast: test accuracy, %", ("fast",), ACCURACY, 99.1, True, statistics.mean),
    Goal("fast", "--recipe fast: s of training", ("fast",), "seconds", 0.35, middle=statistics.mean),
    Goal("fast", "published recipe: test accuracy, %", ("published",), ACCURACY, middle=statistics.mean),
    Goal("fast", "published recipe: s of training, warmed up", ("published",), "seconds", middle=statistics.mean),
    Goal("epochs", f"{EAGER}: three epoch ends, relative to first to last step", ("ours",), "share", 0.2),
    Goal("resnet50", f"{RESNET}: relative to one fixed batch", ("cache", "fixed"), RATE, 0.95, True),
    Goal("resnet50", f"{RESNET}, images in host memory: the same", ("host", "fixed"), RATE, 0.95, True),
    Goal("best", "--recipe best: test accuracy, %", ("best",), ACCURACY, 99.65, True, statistics.mean),
    Goal("best", "--recipe best: s of the longest process", ("best",), PROCESS, 60, middle=max),
    Goal("ten-minutes", f"{LONG}: test accuracy, %", ("best",), ACCURACY, 99.72, True),
    Goal("ten-minutes", f"{LONG}: s of the process", ("best",), PROCESS, 600),
    Goal("timm", f"{RESNET}: relative to timm", ("cache", "timm"), RATE),
]


class Row(NamedTuple):
    work: str
    figure: str
    goal: str
    result: str  # met, not met, not measured; empty without a goal
    note: str


@dataclass
class Outcome:
    """What a part has measured."""

    command: str = ""
    seconds: float = 0.0
    problem: str = "not started yet"  # empty if the part ended with exit code 0
    results: dict[str, list[Figures]] = field(default_factory=dict)  # by contestant, of the complete rounds
    notes: dict[str, str] = field(default_factory=dict)  # by contestant: its error, or what failed
    rows: list[list[str]] = field(default_factory=list)  # a table of more details


def read_tests(log: Path, outcome: Outcome) -> None:
    """Read the JUnit file of pytest."""
    cases = list(ElementTree.parse(log).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    outcome.notes["pytest"] = ", ".join(f"{case.get('classname')}::{case.get('name')}" for case in failed)
    if passed := len(cases) - len(failed) - skipped:
        outcome.results["pytest"] = [{"passed": passed, "failed": len(failed), "skipped": skipped}]
    else:
        outcome.notes["pytest"] = f"no test passed: {len(failed)} failed, {skipped} skipped"


def read_verify(log: Path, outcome: Outcome) -> None:
    """Read the JSON of `mnist verify`."""
    columns = ("check", "figure", "limit", "result", "note")
    rows = [[str(row[name]) for name in columns] for row in json.loads(log.read_text())["rows"]]
    outcome.rows = [list(columns), *rows]
    kinds = {"passed": "pass", "failed": "fail", "not possible": "not possible"}
    outcome.results["verify"] = [{name: sum(row[3] == kind for row in rows) for name, kind in kinds.items()}]
    outcome.notes["verify"] = "; ".join(f"{row[0]}: {row[1] or row[4]}" for row in rows if row[3] == "fail")


def measure_part(name: str, part: Part, options: argparse.Namespace, limit: float, scratch: Path) -> Outcome:
    """Run the command of a part for at most `limit` seconds."""
    log, missing = scratch / f"{name}.log", peers.not_installed() & {*CONTESTANTS}
    tests = [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if b"mark.gpu" in path.read_bytes()]
    command = part.command.format(
        log=log,
        scratch=scratch,
        files=" ".join(str(path.relative_to(ROOT)) for path in tests),
        rounds=part.rounds,
        contestants=" ".join(contestant for contestant in CONTESTANTS if contestant not in missing),
        common=f"--device {options.device} --log {log} {part.tiny if options.quick else ''}",
        train=TINY_TRAINING if options.quick else "",
    )
    words, started = shlex.split(command), time.perf_counter()
    outcome = Outcome(f"python {shlex.join(words)}".replace(f"{scratch}/", "").replace(str(scratch), "."), problem="")
    print(f"\n{name}, at most {limit:.0f} s: {outcome.command}", flush=True)
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ | {"TMPDIR": str(scratch)})
    with killed_at_the_end(process):
        try:
            if exit_code := process.wait(limit):
                outcome.problem = f"ended with exit code {exit_code}"
        except subprocess.TimeoutExpired:
            outcome.problem = f"stopped after {limit:.0f} s, its share of the time"
    outcome.seconds = time.perf_counter() - started
    outcome.notes = {contestant: f"{contestant} is not installed" for contestant in missing if name == "peers"}
    if log.is_file() and name in ("tests", "verify"):
        {"tests": read_tests, "verify": read_verify}[name](log, outcome)
    elif log.is_file():
        outcome.results, errors = measure.read_log(log)
        outcome.notes |= errors
    return outcome


def judge(goal: Goal, outcome: Outcome, rounds: int) -> Row:
    bound = "" if goal.limit is None else f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}"
    notes = [outcome.notes[name] for name in goal.contestants if outcome.notes.get(name)]
    runs = [outcome.results.get(name, []) for name in goal.contestants]
    if not all(runs):
        return Row(goal.work, "", bound, "not measured", "; ".join(notes) or outcome.problem)
    values = measure.ratios(runs[0], runs[1], goal.figure) if runs[1:] else measure.column(runs[0], goal.figure)
    value, result = goal.middle(values), ""
    if goal.limit is not None:
        result = "met" if (value >= goal.limit if goal.at_least else value <= goal.limit) else "not met"
    if len(values) < rounds:
        notes.append(f"{len(values)} of {rounds} rounds: {outcome.problem}")
    figure = rounded(value) + (f" [{rounded(min(values))}, {rounded(max(values))}]" if values[1:] else "")
    return Row(goal.work, figure, bound, result, "; ".join(notes))


def write(output: Path, about: dict[str, str], rows: list[Row], outcomes: dict[str, Outcome]) -> None:
    """Write the Markdown and the JSON file."""
    facts = [f"{name}: {fact}" if name != "command" else f"`{fact}`" for name, fact in about.items() if fact]
    texts = ["# Measured by benchmarks/gpu.py\n", "  \n".join(facts) + "\n", measure.to_markdown([Row._fields, *rows])]
    for name, outcome in outcomes.items():
        texts += [f"## {name}\n", f"`{outcome.command}`, {outcome.seconds:.0f} s\n" if outcome.command else ""]
        texts += [f"{note}\n" for note in (outcome.problem, *outcome.notes.values()) if note]
        tables = (measure.table(outcome.results, None) if outcome.results else [], outcome.rows)
        texts += [measure.to_markdown(table) for table in tables if table]
    write_file(Path(f"{output}.md"), "\n".join(text for text in texts if text))
    parts = {name: asdict(outcome) for name, outcome in outcomes.items()}
    result = about | {"rows": [row._asdict() for row in rows], "parts": parts}
    write_file(Path(f"{output}.json"), json.dumps(result, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=measure.use_device, default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--minutes", type=float, default=10, help="time for all parts (default: 10)")
    parser.add_argument("--only", nargs="+", choices=(*CHECK, *BEST), help="parts (default: all)")
    parser.add_argument("--best", action="store_true", help=f"the long parts: {', '.join(BEST)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, whose figures mean nothing")
    parser.add_argument("--output", type=Path, help="path of both files, without suffix (default: gpu-check)")
    options = parser.parse_args()
    deadline = time.perf_counter() + 60 * options.minutes - RESERVE
    names = options.only or (BEST if options.best else CHECK)
    parts = {name: part for name, part in (CHECK | BEST).items() if name in names}
    parts = {name: part._replace(rounds=1 if options.quick else part.rounds) for name, part in parts.items()}
    outcomes = {name: Outcome() for name in parts}
    output = options.output or Path("gpu-best" if options.best else "gpu-check")
    # in another process, because looking at a GPU takes memory on it
    about = measure.in_fresh_process(measure.describe, options.device, *peers.PACKAGES, "timm", "triton")
    about["warning"] = "--quick: tiny sizes, the figures mean nothing" if options.quick else ""
    with tempfile.TemporaryDirectory() as scratch:
        for position, (name, part) in enumerate(parts.items()):
            left = deadline - time.perf_counter()
            if left < SHORTEST:
                outcomes[name].problem = f"skipped: the {options.minutes:g} minutes are over"
            else:
                limit = left * part.share / sum(other.share for other in list(parts.values())[position:])
                outcomes[name] = measure_part(name, part, options, limit, Path(scratch))
            rows = [judge(goal, outcomes[goal.part], parts[goal.part].rounds) for goal in GOALS if goal.part in parts]
            write(output, about, rows, outcomes)
    print(f"\n{measure.to_markdown([Row._fields, *rows])}\n{output}.md, {output}.json")
    return int(any(outcome.problem for outcome in outcomes.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so the part in progress is ended too
    raise SystemExit(main())
