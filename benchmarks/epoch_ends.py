"""What the ends of the epochs (evaluation, checkpoint, plots) take of the tutorial's recipe.

    python benchmarks/epoch_ends.py --rounds 5

`seconds` are those from the first step to the last. `evaluation` and `rest` (checkpoint, plots, metrics and more) are
the seconds of all three epoch ends, also of the last; `share` is their sum divided by `seconds`.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from measure import Figures, command_line, header, interleave, print_table, run_train, tracker, train_here


def train_with_clock(output: str, flags: list[str]) -> None:
    """Train; write the times at the start, the last step and the end of each epoch to `output`, as JSON."""
    from mnist.session import Session

    times: list[list[float]] = []
    batches, after_epoch = Session.batches, Session.after_epoch

    def timed_batches(self: Session, train_loader: Any) -> Iterator[Any]:
        times.append([time.perf_counter()])
        yield from batches(self, train_loader)  # waits for the device at the end
        times[-1].append(time.perf_counter())

    def timed_after_epoch(self: Session, results: Any) -> None:
        after_epoch(self, results)
        times[-1].append(time.perf_counter())

    Session.batches, Session.after_epoch = timed_batches, timed_after_epoch  # type: ignore[method-assign]
    train_here(flags)
    Path(output).write_text(json.dumps(times))


def train(scratch: Path, steps: int | None, number: int) -> Figures:
    flags = ["--compile=False", f"--trackers={tracker()}", f"--seed={number}"]
    if steps is not None:
        flags.append(f"--limit-train-images={10 * steps}")
    output = scratch / f"{number}.json"
    record = run_train(scratch, *flags, script=(__file__, "--inside", output))
    times = json.loads(output.read_text())
    seconds, ends = times[-1][1] - times[0][0], sum(end - last_step for _, last_step, end in times)
    evaluation = sum(line["perf/evaluation_seconds"] for line in record.evaluations)
    return {"seconds": seconds, "evaluation": evaluation, "rest": ends - evaluation, "share": ends / seconds}


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        train_with_clock(sys.argv[2], sys.argv[3:])
        return
    parser = command_line(__doc__, rounds=5, on_gpus=True)
    parser.add_argument("--steps", type=int, help="steps per epoch (default: all)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        contestant = partial(train, Path(folder), arguments.steps)
        results = interleave({"ours": contestant}, arguments.rounds, arguments.log)
    print(header("torch", "accelerate", "wandb", "matplotlib", device=arguments.device))
    print_table(results, baseline=None)


if __name__ == "__main__":
    main()
