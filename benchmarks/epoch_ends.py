"""What the ends of the epochs (evaluation, checkpoint, plots) take of the tutorial's recipe.

    python benchmarks/epoch_ends.py --rounds 5

`seconds` are those from the first step to the last. `evaluation` and `rest` (checkpoint, plots, metrics and more) are
the seconds of all three epoch ends, also of the last; `share` is their sum divided by `seconds`.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from measure import Figures, command_line, header, in_one_process, interleave, print_table, tracker, train_warm

from mnist.session import Session


def train(scratch: Path, steps: int | None, number: int) -> Figures:
    """Train with a clock at the start, the last step and the end of each epoch."""
    times: list[list[float]] = []
    batches, after_epoch = Session.batches, Session.after_epoch

    def timed_batches(self: Session, train_loader: Any) -> Iterator[Any]:
        times.append([time.perf_counter()])
        yield from batches(self, train_loader)  # waits for the device at the end
        times[-1].append(time.perf_counter())

    def timed_after_epoch(self: Session, results: Any) -> None:
        after_epoch(self, results)
        times[-1].append(time.perf_counter())

    flags = ["--compile=False", f"--trackers={tracker()}", f"--seed={number}"]
    if steps is not None:
        flags.append(f"--limit-train-images={10 * steps}")
    with mock.patch.multiple(Session, batches=timed_batches, after_epoch=timed_after_epoch):
        record = train_warm(scratch, *flags)
    epochs = times[-len(record.evaluations) :]  # those before warmed up
    seconds, ends = epochs[-1][1] - epochs[0][0], sum(end - last_step for _, last_step, end in epochs)
    evaluation = sum(line["perf/evaluation_seconds"] for line in record.evaluations)
    return {"seconds": seconds, "evaluation": evaluation, "rest": ends - evaluation, "share": ends / seconds}


def main() -> None:
    parser = command_line(__doc__, rounds=5, on_gpus=True)
    parser.add_argument("--steps", type=int, help="steps per epoch (default: all)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        contestant = in_one_process(train, Path(folder), arguments.steps)
        results = interleave({"ours": contestant}, arguments.rounds, arguments.log)
    print(header("torch", "accelerate", "wandb", "matplotlib", device=arguments.device))
    print_table(results, baseline=None)


if __name__ == "__main__":
    main()
