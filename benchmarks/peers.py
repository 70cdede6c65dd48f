"""One epoch of the tutorial's recipe, three ways, interleaved in one run.

    python benchmarks/epoch.py                # a warm-up and five rounds, about three minutes on two cores
    python benchmarks/epoch.py --rounds 9 --epochs 3

ours      accelerate launch train.py, with everything that is on by default, W&B (offline) included
plain     the loop in plain PyTorch: images in memory as floats, fused Adam, no Accelerate, no logging
tutorial  the tutorial's own way: DataLoader over torchvision's MNIST with ToTensor, Adam as it comes

All train 784-64-64-64-10 with batches of 10 on all 60,000 images, on the CPU, on the same number of threads. Seconds
are those of the training loop alone; those of the whole process, from its start to its end, stand beside them. Each
round runs all three, each in a process of its own, and begins with another one each time; a ratio is taken within a
round, for these machines are shared and their speed drifts. So that none wins by not learning, the accuracy is shown.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mnist.datasets import FILES, load_dataset  # noqa: E402
from mnist.hardware import choose_threads, device_name  # noqa: E402
from mnist.models import Net  # noqa: E402


class Result(NamedTuple):
    """What a contestant took, and what came of it."""

    seconds: float  # an epoch
    accuracy: float  # of the test images, after the last epoch
    threads: int


def train_ours(scratch: Path, seed: int, epochs: int, steps: int | None) -> Result:
    """The trainer, under its launcher; `steps` of an epoch, or all."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    command = [sys.executable, "-m", "accelerate.commands.launch", "train.py", "--trackers=wandb", f"--seed={seed}"]
    command += [f"--epochs={epochs}", "--run-name=ours", f"--output-dir={folder}"]
    command += [] if steps is None else [f"--max-steps={steps * epochs}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    threads = re.search(r"with (\d+) CPU thread", done.stdout)
    if done.returncode != 0 or threads is None:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    lines = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.mean(line["perf/epoch_seconds"] for line in lines if "perf/epoch_seconds" in line)
    return Result(seconds, lines[-1]["test/accuracy"], int(threads[1]))


def train_plain(scratch: Path, seed: int, epochs: int, steps: int | None) -> Result:
    """The same, as short as PyTorch allows and with nothing around it."""
    torch.manual_seed(seed)
    data = load_dataset("mnist", ROOT / "data")
    images, labels = data.train.images[:].float().div_(255).view(-1, 784), data.train.labels
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    started = time.perf_counter()
    for _ in range(epochs):
        for index in islice(torch.randperm(len(images)).split(10), steps):
            optimizer.zero_grad()
            loss = F.nll_loss(net(images[index]), labels[index])
            loss.backward()
            optimizer.step()
    seconds = (time.perf_counter() - started) / epochs
    return Result(seconds, test_accuracy(net), torch.get_num_threads())


def train_tutorial(scratch: Path, seed: int, epochs: int, steps: int | None) -> Result:
    """The same, through PIL images and ToTensor, image by image."""
    from torchvision import datasets, transforms

    torch.manual_seed(seed)
    images = datasets.MNIST(str(scratch), train=True, transform=transforms.ToTensor())
    batches = torch.utils.data.DataLoader(images, batch_size=10, shuffle=True)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001)
    started = time.perf_counter()
    for _ in range(epochs):
        for X, y in islice(batches, steps):
            net.zero_grad()
            loss = F.nll_loss(net(X.view(-1, 784)), y)
            loss.backward()
            optimizer.step()
    seconds = (time.perf_counter() - started) / epochs
    return Result(seconds, test_accuracy(net), torch.get_num_threads())


CONTESTANTS: dict[str, Callable[[Path, int, int, int | None], Result]] = {
    "ours": train_ours,
    "plain": train_plain,
    "tutorial": train_tutorial,
}


def test_accuracy(net: torch.nn.Module) -> float:
    """Share of the 10,000 test images that the network knows."""
    test = load_dataset("mnist", ROOT / "data").test
    with torch.no_grad():
        answers = net(test.images[:].float().div_(255)).argmax(dim=1)
    return float((answers == test.labels).double().mean())


def timed(name: str, *arguments: Path | int | None) -> tuple[Result, float]:
    """A contestant's result in a process of its own, and the seconds of the whole process."""
    started = time.perf_counter()
    if name == "ours":  # starts a process itself
        return train_ours(*arguments), time.perf_counter() - started  # type: ignore[arg-type]
    fresh, batch = multiprocessing.get_context("spawn"), torch.zeros(10, 1, 28, 28)
    with ProcessPoolExecutor(1, fresh, choose_threads, (Net(), batch)) as pool:  # as many threads as train.py
        result = pool.submit(CONTESTANTS[name], *arguments).result()  # type: ignore[arg-type]
    return result, time.perf_counter() - started


def compare(scratch: Path, rounds: int, epochs: int) -> dict[str, list[tuple[Result, float]]]:
    """Run all contestants in turn, and one short time before that does not count."""
    folder = scratch / "MNIST" / "raw"  # torchvision's class reads unpacked files only
    folder.mkdir(parents=True)
    for file in FILES:
        (folder / file).write_bytes(gzip.decompress((ROOT / "data/MNIST/raw" / f"{file}.gz").read_bytes()))
    names = list(CONTESTANTS)
    for name in names:
        timed(name, scratch, 0, 1, 300)
    results: dict[str, list[tuple[Result, float]]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(timed(name, scratch, number, epochs, None))
        figures = ", ".join(f"{name} {results[name][-1][0].seconds:.2f} s" for name in names)
        print(f"round {number + 1} of {rounds}: {figures}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each contestant runs (default: 5)")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each run (default: 1)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(WANDB_MODE="offline", CUDA_VISIBLE_DEVICES="", TMPDIR=scratch)  # of all contestants
        results = compare(Path(scratch), arguments.rounds, arguments.epochs)

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "torchvision", "wandb"))
    print(f"\n{time.strftime('%Y-%m-%d')}, {device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {packages}")
    print(f"python {shlex.join(sys.argv)}: medians [least, most] of {arguments.rounds} rounds\n")
    row = "{:9} {:>21} {:>9} {:>21} {:>9} {:>8} {:>10}"
    print(row.format("", "seconds an epoch", "images/s", "ratio to plain", "accuracy", "threads", "process s"))
    plain = [result.seconds for result, _ in results["plain"]]
    for name, runs in results.items():
        seconds, accuracies, threads = zip(*(result for result, _ in runs), strict=True)
        ratio = spread([mine / its for mine, its in zip(seconds, plain, strict=True)])
        speed, accuracy = f"{60_000 / statistics.median(seconds):,.0f}", f"{statistics.median(accuracies):.4f}"
        process_seconds = f"{statistics.median(whole for _, whole in runs):.1f}"
        print(row.format(name, spread(seconds), speed, ratio, accuracy, max(threads), process_seconds))


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()
