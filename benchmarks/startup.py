"""Time from the start of the process to the end of the first optimizer step, and peak memory.

    python benchmarks/startup.py                       # nine rounds, about two minutes

imports   a Python process that only imports torch, torchvision and accelerate
none      train.py --trackers none
wandb     train.py --trackers wandb, offline
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from measure import Figures, command_line, header, interleave, print_table, run, train_here


def stop_after_first_step(output: str, flags: list[str]) -> None:
    """Train for one step; write the time of its end and the peak memory to `output`."""
    import torch

    from mnist.launch.hardware import peak_memory
    from mnist.training.progress import Progress

    update = Progress.update

    def update_and_stop(self: Progress, loss: Any) -> None:
        update(self, loss)
        Path(output).write_text(f"{time.time()} {peak_memory(torch.device('cpu')) / 2**20}")
        os._exit(0)

    Progress.update = update_and_stop  # type: ignore[method-assign]
    train_here(flags)
    raise SystemExit("Progress.update was not called")


def first_step(scratch: Path, trackers: str, number: int) -> Figures:
    folder = tempfile.mkdtemp(dir=scratch)
    output = Path(folder, "first-step.txt")
    started = time.time()
    run(__file__, "--inside", output, f"--trackers={trackers}", f"--output-dir={folder}")
    finished, memory = map(float, output.read_text().split())
    return {"seconds": finished - started, "peak MiB": memory}


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        stop_after_first_step(sys.argv[2], sys.argv[3:])
    arguments = command_line(__doc__, rounds=9).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        contestants: dict[str, Callable[[int], Figures]] = {
            "imports": lambda _: {"seconds": run("-c", "import torch, torchvision, accelerate")},
            "none": partial(first_step, Path(scratch), "none"),
            "wandb": partial(first_step, Path(scratch), "wandb"),
        }
        results = interleave(contestants, arguments.rounds)
    print(header("torch", "torchvision", "accelerate", "wandb"))
    print_table(results, "imports")


if __name__ == "__main__":
    main()
