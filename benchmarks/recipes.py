"""Training time and test accuracy of a recipe over several seeds.

    python benchmarks/recipes.py                           # fast, beside the published recipe, five seeds each
    python benchmarks/recipes.py --recipe best --seeds 3
    python benchmarks/recipes.py --recipe cnn -- --epochs 2     # what follows -- goes to train.py
    python benchmarks/recipes.py --device cuda -- --compile

fast           python train.py --recipe fast, with everything that is on by default but W&B
published      the fastest published recipe to 99 % that we found (github.com/tuomaso/train_mnist_fast, 2021: 99.04 %
               over 30 seeds), reimplemented in plain PyTorch: 215,194 parameters, one epoch, batches of 256, Adam with
               betas 0.7 and 0.9, one-cycle to 0.01, images normalized and in memory
channels-last  the same with what makes `fast` fast on a CPU: channels-last images, and memory that a step has freed
               kept for the next; on a CPU only

Seconds are those of the training loop, without imports and evaluation, on as many threads as train.py chooses. A round
is one seed; every run is counted. `fast` and the published recipe each have a process for all rounds and warm up in it.
Other recipes have a process per round, whose seconds are shown.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from measure import ROOT, Figures, interleave, now
from torch import Tensor, nn

from mnist.config.recipes import RECIPES
from mnist.data.datasets import load_dataset
from mnist.launch.hardware import choose_threads, keep_freed_memory

ACCURACY = "test accuracy, %"
PROCESS = "s of the process"


class Published(nn.Module):
    """Two convolutions, each pooled, and two dense layers."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.first, self.second = nn.Conv2d(1, 24, 5), nn.Conv2d(24, 32, 3)
        self.hidden, self.classes = nn.Linear(800, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.clone(memory_format=torch.channels_last)
        for convolution in (self.first, self.second):
            x = F.relu(F.max_pool2d(convolution(x), 2))
        return F.log_softmax(self.classes(F.relu(self.hidden(x.flatten(1)))), dim=1)


def train_published(device: str, steps: int | None, channels_last: bool, seed: int) -> Figures:
    torch.manual_seed(seed)
    data, batch_size = load_dataset("mnist", ROOT / "data"), 256
    mean, std = data.train.images[:].div(255).mean(), data.train.images[:].div(255).std()
    images, test_images = (((split.images[:] / 255 - mean) / std).unsqueeze(1) for split in (data.train, data.test))
    net = Published(channels_last)
    choose_threads(net, images[:batch_size])
    if channels_last:
        keep_freed_memory()
    net, images, labels = net.to(device), images.to(device), data.train.labels.to(device)
    steps = steps or -(-len(images) // batch_size)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.7, 0.9), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps, cycle_momentum=False)

    def train(steps: int) -> None:
        for index in islice(torch.split(torch.randperm(len(images), device=device), batch_size), steps):
            optimizer.zero_grad()
            loss = F.nll_loss(net(images[index]), labels[index])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()

    with measure.restored(net, optimizer, schedule):
        train(min(measure.WARM_UP, steps))
    started = now(device)
    train(steps)
    seconds = now(device) - started
    with torch.no_grad():
        correct = net.cpu()(test_images).argmax(dim=1) == data.test.labels
    return {"seconds": seconds, ACCURACY: 100 * float(correct.double().mean())}


def train_recipe(recipe: str, flags: Sequence[str], steps: int | None, seed: int) -> Figures:
    if steps is not None:
        flags = [f"--limit-train-images={steps * RECIPES[recipe].batch_size}", *flags]
    run = measure.train_warm if recipe == "fast" else measure.run_train
    started = now()
    with tempfile.TemporaryDirectory() as scratch:
        record = run(Path(scratch), f"--recipe={recipe}", f"--seed={seed}", "--trackers=none", *flags)
    process = {} if recipe == "fast" else {PROCESS: now() - started}
    seconds = sum(line["perf/epoch_seconds"] for line in record.evaluations)
    return {"seconds": seconds, **process, ACCURACY: 100 * record.last["test/accuracy"]}


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean, standard deviation over the runs, least and most."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = measure.command_line(__doc__, on_gpus=True)
    parser.add_argument("--recipe", choices=RECIPES, default="fast", help="the recipe to run (default: fast)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each, with the seeds 0, 1, ... (default: 5)")
    parser.add_argument("--steps", type=int, help="steps per epoch (default: all)")
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    arguments = parser.parse_args()
    recipe, device, steps = arguments.recipe, arguments.device, arguments.steps
    contestants: dict[str, Callable[[int], Figures]] = {recipe: partial(train_recipe, recipe, arguments.flags, steps)}
    if recipe == "fast":
        contestants[recipe] = measure.in_one_process(train_recipe, recipe, arguments.flags, steps)
        contestants["published"] = measure.in_one_process(train_published, device, steps, False)
    if recipe == "fast" and device == "cpu":
        contestants["channels-last"] = measure.in_one_process(train_published, device, steps, True)
    results = interleave(contestants, arguments.seeds, arguments.log)
    print(measure.header("torch", device=device))
    measure.print_table(results, recipe, form=mean_and_deviation)
    for name in list(results)[1:]:
        ratio = mean_and_deviation(measure.ratios(results[recipe], results[name]))
        print(f"{recipe} takes {ratio} of the time of {name}")


if __name__ == "__main__":
    main()
