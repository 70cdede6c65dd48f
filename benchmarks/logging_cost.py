"""What logging costs a run of the tutorial's recipe: metrics, W&B, TensorBoard, plots and the report.

    python benchmarks/logging_cost.py                  # five rounds, about four minutes

without   nothing is logged: --trackers none, and a --log-every that is never reached
with      the default, and TensorBoard; W&B's own process takes its share of the cores
clocks    the same with a clock around each function that logs or draws: their time as a percentage of the rest of the
          epoch (training and evaluation), and seconds at the start and at the end of the run

`seconds` are those of training, per epoch.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Figures, command_line, header, interleave, print_table, run_train, train_here

PER_EPOCH = ("log", "update", "predict", "after_epoch")
AT_THE_END = ("write", "log_results", "__exit__")


def train_with_clocks(output: str, flags: list[str]) -> None:
    """Train; write the seconds spent in each function to `output`, as JSON."""
    import mnist.session

    session: Any = mnist.session
    spent: dict[str, float] = defaultdict(float)

    def clock(owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[name] += time.perf_counter() - started

        setattr(owner, name, timed)

    for name in ("log", "log_results", "start", "__exit__"):
        clock(session.Tracking, name)
    for name in ("after_epoch", "write"):
        clock(session.LiveReport, name)
    clock(session.Evaluation, "update")
    clock(session, "predict")
    train_here(flags)
    Path(output).write_text(json.dumps(spent))


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        train_with_clocks(sys.argv[2], sys.argv[3:])
        return
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--trackers", default="wandb,tensorboard", help="default: wandb,tensorboard")
    arguments = parser.parse_args()
    logging, silent = (f"--trackers={arguments.trackers}",), ("--trackers=none", "--log-every=1000000")
    with tempfile.TemporaryDirectory() as folder:
        scratch, output = Path(folder), Path(folder, "clocks.json")

        def with_clocks(number: int) -> Figures:
            record = run_train(scratch, *logging, f"--seed={number}", script=(__file__, "--inside", output))
            spent = json.loads(output.read_text())
            print("seconds spent in", {name: round(value, 2) for name, value in spent.items()})
            per_epoch = sum(spent[name] for name in PER_EPOCH)  # KeyError if one was never called
            at_end = sum(spent[name] for name in AT_THE_END)
            share = 100 * per_epoch / (record.seconds - per_epoch)
            return {"% per epoch": share, "s at start": spent["start"], "s at end": at_end}

        def seconds(*flags: str) -> Figures:
            record = run_train(scratch, *flags)
            return {"seconds": statistics.mean(line["perf/epoch_seconds"] for line in record.evaluations)}

        contestants = {
            "without": lambda number: seconds(*silent, f"--seed={number}"),
            "with": lambda number: seconds(*logging, f"--seed={number}"),
            "clocks": with_clocks,
        }
        results = interleave(contestants, arguments.rounds)
    print(header("torch", "accelerate", "wandb", "matplotlib"))
    print_table(results, "without")


if __name__ == "__main__":
    main()
