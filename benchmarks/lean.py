"""What each shortcut in mnist/training/lean.py is worth, on one epoch of the tutorial's recipe.

    python benchmarks/lean.py                          # five rounds, about five minutes

Each contestant replaces one shortcut by the method that it overrides; `all` replaces every shortcut. The
ratio is the time without the shortcut, divided by the time with all of them. The weights must be bit-identical.

accumulate, backward, prepare_data_loader    Accelerate's own method
prepare_optimizer    Accelerate's own method: AcceleratedOptimizer replaces LeanOptimizer
zero_grad            torch's own zero_grad()
adam                 torch's own step()
counters             one addition per step counter of Adam, by torch._foreach_add_
"""

import hashlib
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measure import Figures, command_line, header, interleave, print_table, run_train, train_here

METHODS = ["accumulate", "backward", "prepare_data_loader", "prepare_optimizer"]  # of LeanAccelerator


def replace(name: str) -> None:
    """Replace a shortcut in this process."""
    import torch

    import mnist.training.lean

    lean: Any = mnist.training.lean
    states_of_adam = lean.LeanOptimizer._states_of_adam

    def zero_grad(self: Any) -> None:
        if self.gradient_state.sync_gradients:
            self.optimizer.zero_grad()

    def states_with_separate_counters(self: Any) -> list[Any]:
        def separate(state: Any) -> Any:
            return SimpleNamespace(add_=lambda number: torch._foreach_add_(state.step, number))

        return [state._replace(steps=separate(state)) for state in states_of_adam(self)]

    if name in METHODS:
        delattr(lean.LeanAccelerator, name)
    elif name == "zero_grad":
        lean.LeanOptimizer.zero_grad = zero_grad
    else:
        lean.LeanOptimizer._states_of_adam = states_with_separate_counters if name == "counters" else lambda self: []


def train_without(scratch: Path, names: list[str], weights: set[str], number: int) -> Figures:
    """Train with these shortcuts replaced; add the digest of the weights to `weights`."""
    script = (__file__, "--inside", ",".join(names))
    record = run_train(scratch, "--epochs=1", "--trackers=none", "--seed=0", script=script)
    weights.add(hashlib.sha256((record.folder / "model" / "model.safetensors").read_bytes()).hexdigest())
    return {"seconds": record.last["perf/epoch_seconds"], "threads": record.environment["threads"]}


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        for name in filter(None, sys.argv[2].split(",")):
            replace(name)
        train_here(sys.argv[3:])
        return
    arguments = command_line(__doc__, rounds=5).parse_args()
    variants = {"lean": [], **{name: [name] for name in (*METHODS, "zero_grad", "adam", "counters")}, "all": METHODS}
    weights: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch:
        contestants = {name: partial(train_without, Path(scratch), variants[name], weights) for name in variants}
        results = interleave(contestants, arguments.rounds)
    print(header("torch", "accelerate"))
    print_table(results, "lean")
    if len(weights) > 1:
        raise SystemExit(f"The weights differ: {len(weights)} kinds.")
    print(f"\nAll weights are bit-identical: sha256 {weights.pop()[:16]}...")


if __name__ == "__main__":
    main()
