"""One epoch of the tutorial's recipe, three ways, interleaved in one run.

    python benchmarks/epoch.py                # five rounds, about two minutes on two cores
    python benchmarks/epoch.py --rounds 9

ours      accelerate launch train.py, with everything that is on by default, W&B (offline) included
plain     the loop in plain PyTorch: images in memory as floats, fused Adam, no Accelerate, no logging
tutorial  the tutorial's own way: DataLoader over torchvision's MNIST with ToTensor, Adam as it comes

All train 784-64-64-64-10 with batches of 10 on all 60,000 images, on the same number of threads. Seconds are those of
the training loop alone. Each round runs all three, in turn, each in a process of its own; a ratio is taken within a
round, for these machines are shared and their speed drifts. The accuracy stands beside the time, so that none wins by
not learning.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mnist.data import FILES, load_dataset  # noqa: E402
from mnist.hardware import choose_threads, device_name  # noqa: E402
from mnist.models import Net  # noqa: E402

CONTESTANTS = ("ours", "plain", "tutorial")


def train_ours(scratch: Path) -> tuple[float, float]:
    """Seconds of one epoch and test accuracy after it, under the launcher."""
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        command = [sys.executable, "-m", "accelerate.commands.launch", "train.py", "--epochs=1", "--run-name=bench"]
        environment = os.environ | {"WANDB_MODE": "offline"}
        done = subprocess.run(
            [*command, f"--output-dir={output}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"ours failed:\n{done.stdout}{done.stderr}")
        last = json.loads((Path(output) / "bench" / "metrics.jsonl").read_text().splitlines()[-1])
    return last["epoch_seconds"], last["test/accuracy"]


def train_plain(scratch: Path) -> tuple[float, float]:
    """The same, as short as PyTorch allows and with nothing around it."""
    data = load_dataset("mnist", ROOT / "data")
    images, labels = data.train.images.float().div_(255).view(-1, 784), data.train.labels
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    started = time.perf_counter()
    for index in torch.randperm(len(images)).split(10):
        optimizer.zero_grad()
        loss = F.nll_loss(net(images[index]), labels[index])
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        answers = net(data.test.images.float().div_(255)).argmax(dim=1)
    return seconds, (answers == data.test.labels).float().mean().item()


def train_tutorial(scratch: Path) -> tuple[float, float]:
    """The same, through PIL images and ToTensor, image by image."""
    from torchvision import datasets, transforms

    train = datasets.MNIST(str(scratch), train=True, transform=transforms.ToTensor())
    test = datasets.MNIST(str(scratch), train=False, transform=transforms.ToTensor())
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001)
    started = time.perf_counter()
    for X, y in torch.utils.data.DataLoader(train, batch_size=10, shuffle=True):
        net.zero_grad()
        loss = F.nll_loss(net(X.view(-1, 784)), y)
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        right = [
            (net(X.view(-1, 784)).argmax(dim=1) == y).sum().item()
            for X, y in torch.utils.data.DataLoader(test, batch_size=1000)
        ]
    return seconds, sum(right) / len(test)


def in_its_own_process(contestant: str, scratch: Path) -> tuple[float, float]:
    """Run a contestant as a fresh Python would."""
    if contestant == "ours":
        return train_ours(scratch)
    command = [sys.executable, __file__, "--contestant", contestant, "--scratch", str(scratch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, accuracy = json.loads(done.stdout)
    return seconds, accuracy


def unpack_mnist(folder: Path) -> None:
    """torchvision's class reads unpacked files only."""
    folder.mkdir(parents=True)
    for file in FILES:
        (folder / file).write_bytes(gzip.decompress((ROOT / "data/MNIST/raw" / f"{file}.gz").read_bytes()))


def compare(rounds: int) -> None:
    """Run all contestants in turn and print the table."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as scratch:
        unpack_mnist(Path(scratch) / "MNIST" / "raw")
        for number in range(rounds):
            first = number % len(CONTESTANTS)
            for name in CONTESTANTS[first:] + CONTESTANTS[:first]:
                results[name].append(in_its_own_process(name, Path(scratch)))
            print(f"round {number + 1}: " + ", ".join(f"{name} {results[name][-1][0]:.2f} s" for name in CONTESTANTS))

    print(
        f"\n{time.strftime('%Y-%m-%d')}, {device_name(torch.device('cpu'))}, {torch.get_num_threads()} thread(s),",
        end=" ",
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {rounds} rounds, medians (least to most)\n")
    print(f"{'':10} {'seconds an epoch':>22} {'images/s':>9} {'ratio to plain':>22} {'test accuracy':>14}")
    for name in CONTESTANTS:
        seconds = [result[0] for result in results[name]]
        ratios = [mine / plain[0] for mine, plain in zip(seconds, results["plain"], strict=True)]
        accuracy = statistics.mean(result[1] for result in results[name])
        speed = 60_000 / statistics.median(seconds)
        print(f"{name:10} {spread(seconds):>22} {speed:>9,.0f} {spread(ratios):>22} {accuracy:>14.4f}")


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", choices=("plain", "tutorial"), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    choose_threads(Net(), torch.zeros(10, 1, 28, 28))  # as train.py does: the same for all
    if arguments.contestant is None:
        compare(arguments.rounds)
    else:
        train = train_plain if arguments.contestant == "plain" else train_tutorial
        print(json.dumps(train(arguments.scratch)))


if __name__ == "__main__":
    main()
