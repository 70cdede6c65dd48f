"""What a recipe gives over several seeds: seconds of training and test accuracy of every run, means and spread.

    python benchmarks/recipes.py                           # fast, beside the published recipe, five seeds each
    python benchmarks/recipes.py --recipe best --seeds 3
    python benchmarks/recipes.py --recipe cnn -- --epochs 2     # what comes after -- goes to train.py

fast           python train.py --recipe fast, with everything that is on by default but W&B
published      the fastest recipe to 99 % that we found published (github.com/tuomaso/train_mnist_fast, 2021: 99.04 %
               over 30 seeds), written anew from its description, in plain PyTorch: 215,194 parameters, one epoch,
               batches of 256, Adam with betas 0.7 and 0.9, one-cycle to 0.01, images normalised and in memory
channels-last  the same with the two things that speed `fast` up on a CPU: its images laid out channels last, and memory
               that a step has freed kept for the next

Seconds are those of the training loop, on as many threads as train.py would choose; neither imports nor evaluation
count, on any side. Every run is counted. Each round is one seed and runs all, each in a process of its own, and begins
with another one each time; a ratio is taken within a round, for these machines are shared and their speed drifts.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mnist.config.recipes import RECIPES  # noqa: E402
from mnist.data.datasets import load_dataset  # noqa: E402
from mnist.launch.hardware import choose_threads, device_name, keep_freed_memory  # noqa: E402


class Result(NamedTuple):
    """What a run took, and what came of it."""

    seconds: float  # of the training loop
    accuracy: float  # of the test images, after the last epoch


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


def train_published(seed: int, channels_last: bool) -> Result:
    """The published recipe, as short as PyTorch allows and with nothing around it."""
    torch.manual_seed(seed)
    data = load_dataset("mnist", ROOT / "data")
    mean, std = data.train.images[:].div(255).mean(), data.train.images[:].div(255).std()
    images, test_images = (((it.images[:] / 255 - mean) / std).unsqueeze(1) for it in (data.train, data.test))
    labels, batch_size = data.train.labels, 256
    net = Published(channels_last)
    choose_threads(net, images[:batch_size])
    if channels_last:
        keep_freed_memory()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.7, 0.9), fused=True)
    steps = -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps, cycle_momentum=False)
    started = time.perf_counter()
    for index in torch.split(torch.randperm(len(images)), batch_size):
        optimizer.zero_grad()
        loss = F.nll_loss(net(images[index]), labels[index])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        answers = net(test_images).argmax(dim=1)
    return Result(seconds, float((answers == data.test.labels).double().mean()))


def train_recipe(recipe: str, seed: int, flags: Sequence[str]) -> Result:
    """The trainer with a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", f"--recipe={recipe}", f"--seed={seed}", "--trackers=none", *flags]
        command += [f"--output-dir={folder}", "--run-name=run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "perf/epoch_seconds" in line]
    return Result(sum(line["perf/epoch_seconds"] for line in epochs), epochs[-1]["test/accuracy"])


def run(name: str, seed: int, flags: Sequence[str]) -> Result:
    """One run, in a process of its own."""
    if name in RECIPES:
        return train_recipe(name, seed, flags)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train_published, seed, name == "channels-last").result()


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, standard deviation over the runs, least and most."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, default="fast", help="the recipe to run (default: fast)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each, with the seeds 0, 1, ... (default: 5)")
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of all contestants
    names = [arguments.recipe, *(("published", "channels-last") if arguments.recipe == "fast" else ())]
    results: dict[str, list[Result]] = {name: [] for name in names}
    for seed in range(arguments.seeds):
        first = seed % len(names)
        for name in [*names[first:], *names[:first]]:
            results[name].append(run(name, seed, arguments.flags))
            seconds, accuracy = results[name][-1]
            print(f"seed {seed}  {name:13}  {seconds:8.2f} s   {100 * accuracy:.2f} %", flush=True)

    print(f"\n{time.strftime('%Y-%m-%d')}, {device_name(torch.device('cpu'))}, {os.cpu_count()} cores, ", end="")
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    print(f"python {shlex.join(sys.argv)}: means ± deviations [least, most] of {arguments.seeds} seeds")
    row = "{:13}  {:>30}  {:>30}  {:>28}"
    print(row.format("", "seconds of training", "test accuracy, %", "time of fast to its own"))
    for name, runs in results.items():
        ratios = [mine.seconds / its.seconds for mine, its in zip(results[names[0]], runs, strict=True)]
        columns = spread([it.seconds for it in runs], 2), spread([100 * it.accuracy for it in runs], 3)
        print(row.format(name, *columns, spread(ratios, 2) if name != names[0] else ""))


if __name__ == "__main__":
    main()
