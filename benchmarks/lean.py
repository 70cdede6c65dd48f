"""What each shortcut in mnist/training/lean.py is worth, in a step of the tutorial's recipe.

    python benchmarks/lean.py                          # 150 rounds, about two minutes

Each contestant replaces one shortcut by the method that it overrides; `all` replaces every shortcut, and `lean again`
none: its ratio shows the noise. All train in this process, on one thread and with the same seed, in turns of 102 steps.
`us` is the processor time of a step, without clipping, logging and checkpoints. The weights must be bit-identical.

accumulate, backward    Accelerate's own method
prepare_data_loader     Accelerate's own method: batches come from torch's own iterator
prepare_optimizer       Accelerate's own method: AcceleratedOptimizer replaces LeanOptimizer
zero_grad, adam         torch's own zero_grad(), torch's own step()
counters                one addition per step counter of Adam, by torch._foreach_add_
"""

import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from itertools import chain, repeat
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from measure import ROOT, Figures, command_line, header, interleave, print_table, rounded

from mnist.data.datasets import load_dataset
from mnist.data.loader import BatchDataset, Training, build_loader
from mnist.data.splits import Split
from mnist.models.networks import Net
from mnist.training.lean import LeanAccelerator
from mnist.training.losses import LOSSES
from mnist.training.optimizers import build_optimizer, build_schedule

METHODS = ["accumulate", "backward", "prepare_data_loader", "prepare_optimizer"]  # of LeanAccelerator
STEPS = BatchDataset.READ_AHEAD // (10 * 28 * 28)  # batches prepared at once, so all turns do the same work


def prepare(names: Sequence[str], images: Split) -> tuple[Net, Callable[[int], Figures]]:
    """A network, and a function that trains it for a turn, with the shortcuts `names` replaced."""
    accelerator: Any = LeanAccelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    for name in set(names).intersection(METHODS):
        setattr(accelerator, name, partial(getattr(Accelerator, name), accelerator))
    torch.manual_seed(0)
    net, compute_loss = Net(), LOSSES["nll"]
    adam = build_optimizer("adam", net.parameters(), 1e-3)
    loader = build_loader(images, 10, training=Training(seed=0))
    optimizer, scheduler, loader = accelerator.prepare(adam, build_schedule("constant", adam, 0, 1), loader)
    batches = chain.from_iterable(repeat(loader))  # epoch after epoch

    def turn(number: int) -> Figures:
        started = time.process_time()
        for _ in range(STEPS):
            X, y, sample_weight = next(batches)
            optimizer.zero_grad()
            with accelerator.accumulate(net):
                accelerator.backward(compute_loss(net(X), y, sample_weight))
                optimizer.step()
                scheduler.step()
        return {"us": (time.process_time() - started) / STEPS * 1e6}

    turn(-1)  # warms up
    if "zero_grad" in names:
        optimizer.zero_grad = adam.zero_grad
    if "adam" in names:
        optimizer.states = []
    if "counters" in names:
        (state,) = optimizer.states
        optimizer.states = [state._replace(steps=SimpleNamespace(add_=partial(torch._foreach_add_, state.step)))]
    return net, turn


def main() -> None:
    rounds = command_line(__doc__, rounds=150).parse_args().rounds
    torch.set_num_threads(1)
    images = load_dataset("mnist", ROOT / "data").train
    shortcuts = {name: [name] for name in (*METHODS, "zero_grad", "adam", "counters")}
    variants = {"lean": [], "lean again": [], **shortcuts, "all": METHODS}
    nets, turns = zip(*(prepare(names, images) for names in variants.values()), strict=True)
    with redirect_stdout(None):  # a line per turn
        results = interleave(dict(zip(variants, turns, strict=True)), rounds)
    print(header("torch", "accelerate"))
    print_table(results, "lean", "us", lambda values: rounded(median(values)))
    weights = [torch.cat([parameter.flatten() for parameter in net.parameters()]) for net in nets]
    if differ := [name for name, values in zip(variants, weights, strict=True) if not torch.equal(values, weights[0])]:
        raise SystemExit(f"The weights differ: {', '.join(differ)}.")
    print("\nAll weights are bit-identical.")


if __name__ == "__main__":
    main()
