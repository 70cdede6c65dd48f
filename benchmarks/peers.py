"""One epoch of the tutorial's recipe beside what people would use instead, interleaved in one run.

    python benchmarks/peers.py                          # all that are installed, a warm-up and five rounds
    python benchmarks/peers.py --only ours plain --rounds 9
    python benchmarks/peers.py --only ours plain --batch-sizes 10 64 256 1024 4096
    pip install -e '.[bench]'                           # Lightning, and Keras with JAX

ours        accelerate launch train.py, with everything that is on by default, W&B (offline) included
compiled    the same with --compile; compiling is not counted
plain       the loop in plain PyTorch: images in memory as floats, fused Adam, no Accelerate, no logging
loader      the same loop, its images from torch's DataLoader, as the next two have them
tutorial    the tutorial's own way: DataLoader over torchvision's MNIST with ToTensor, Adam as it comes
accelerate  as Accelerate's examples do it, on images in memory: a DataLoader, all of it prepared, no logging
lightning   Lightning's Trainer on images in memory, fused Adam, logging, checkpoints and bar switched off
keras       Keras's fit on JAX, which compiles the whole step, on images in memory; compiling is not counted

All train 784-64-64-64-10 with Adam at 1e-3 on all 60,000 images, on the CPU, on the same number of threads. Seconds
are those of the training loop alone; those of the whole process, from its start to its end, stand beside them. Each
round runs all, each in a process of its own, and begins with another one each time; a ratio is taken within a round,
for these machines are shared and their speed drifts. So that none wins by not learning, the accuracy is shown.
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
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mnist.data.datasets import FILES, load_dataset  # noqa: E402
from mnist.launch.hardware import choose_threads, device_name  # noqa: E402
from mnist.models.networks import Net  # noqa: E402

Batch = tuple[torch.Tensor, torch.Tensor]


class Work(NamedTuple):
    """What all contestants do."""

    batch_size: int
    epochs: int
    steps: int | None  # of an epoch; all of them where it is None


class Result(NamedTuple):
    """What a contestant took, and what came of it."""

    seconds: float  # an epoch
    accuracy: float  # of the test images, after the last epoch
    threads: int


def train_ours(scratch: Path, seed: int, work: Work, *flags: str) -> Result:
    """The trainer, under its launcher."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    command = [sys.executable, "-m", "accelerate.commands.launch", "train.py", "--trackers=wandb", f"--seed={seed}"]
    command += flags
    command += [f"--epochs={work.epochs}", f"--batch-size={work.batch_size}", "--run-name=ours"]
    command += [f"--output-dir={folder}", *([] if work.steps is None else [f"--max-steps={work.steps * work.epochs}"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    threads = re.search(r"with (\d+) CPU thread", done.stdout)
    if done.returncode != 0 or threads is None:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    lines = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.mean(line["perf/epoch_seconds"] for line in lines if "perf/epoch_seconds" in line)
    return Result(seconds, lines[-1]["test/accuracy"], int(threads[1]))


def train_compiled(scratch: Path, seed: int, work: Work) -> Result:
    """The trainer with forward and backward pass in one compiled graph."""
    return train_ours(scratch, seed, work, "--compile")


def train_plain(scratch: Path, seed: int, work: Work) -> Result:
    """The same, as short as PyTorch allows and with nothing around it."""
    images, labels = images_in_memory()

    def batches() -> Iterator[Batch]:
        for index in torch.randperm(len(images)).split(work.batch_size):
            yield images[index], labels[index]

    return train_plainly(seed, work, batches)


def train_loader(scratch: Path, seed: int, work: Work) -> Result:
    """The plain loop with a DataLoader: what of the time of Accelerate's examples and of Lightning is not theirs."""
    return train_plainly(seed, work, in_batches(work).__iter__)


def train_plainly(seed: int, work: Work, batches: Callable[[], Iterator[Batch]]) -> Result:
    """The loop itself; `batches` gives those of an epoch."""
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    started = time.perf_counter()
    for _ in range(work.epochs):
        for X, y in islice(batches(), work.steps):
            optimizer.zero_grad()
            loss = F.nll_loss(net(X), y)
            loss.backward()
            optimizer.step()
    seconds = (time.perf_counter() - started) / work.epochs
    return Result(seconds, test_accuracy(net), torch.get_num_threads())


def train_tutorial(scratch: Path, seed: int, work: Work) -> Result:
    """The same, through PIL images and ToTensor, image by image."""
    from torchvision import datasets, transforms

    torch.manual_seed(seed)
    images = datasets.MNIST(str(scratch), train=True, transform=transforms.ToTensor())
    batches = torch.utils.data.DataLoader(images, batch_size=work.batch_size, shuffle=True)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001)
    started = time.perf_counter()
    for _ in range(work.epochs):
        for X, y in islice(batches, work.steps):
            net.zero_grad()
            loss = F.nll_loss(net(X.view(-1, 784)), y)
            loss.backward()
            optimizer.step()
    seconds = (time.perf_counter() - started) / work.epochs
    return Result(seconds, test_accuracy(net), torch.get_num_threads())


def train_accelerate(scratch: Path, seed: int, work: Work) -> Result:
    """Accelerate as its examples show it."""
    from accelerate import Accelerator

    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    net, batches = Net(), in_batches(work)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    net, optimizer, batches = accelerator.prepare(net, optimizer, batches)
    started = time.perf_counter()
    for _ in range(work.epochs):
        net.train()
        for X, y in islice(batches, work.steps):
            loss = F.nll_loss(net(X), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    seconds = (time.perf_counter() - started) / work.epochs
    return Result(seconds, test_accuracy(net), torch.get_num_threads())


def train_lightning(scratch: Path, seed: int, work: Work) -> Result:
    """Lightning, with all switched off that takes time."""
    import logging

    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], number: int) -> torch.Tensor:
            return F.nll_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)

        def on_train_epoch_start(self) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            seconds.append(time.perf_counter() - self.started)

    torch.manual_seed(seed)
    seconds: list[float] = []
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=work.epochs,
        limit_train_batches=work.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, in_batches(work))
    return Result(statistics.mean(seconds), test_accuracy(module.net), torch.get_num_threads())


def train_keras(scratch: Path, seed: int, work: Work) -> Result:
    """Keras on JAX."""
    threads = torch.get_num_threads()
    one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.update(KERAS_BACKEND="jax", XLA_FLAGS=one if threads == 1 else "", JAX_PLATFORMS="cpu")
    import keras

    keras.utils.set_random_seed(seed)
    images, labels = (values.numpy() for values in images_in_memory())
    layers = [keras.layers.Dense(64, activation="relu") for _ in range(3)]
    net = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(keras.optimizers.Adam(1e-3), loss)
    warm_up = 4 * work.batch_size + len(images) % work.batch_size  # the last batch of an epoch has a shape of its own
    net.fit(images[:warm_up], labels[:warm_up], batch_size=work.batch_size, verbose=0)
    images = images if work.steps is None else images[: work.steps * work.batch_size]
    started = time.perf_counter()
    net.fit(images, labels[: len(images)], batch_size=work.batch_size, epochs=work.epochs, verbose=0)
    seconds = (time.perf_counter() - started) / work.epochs
    test = load_dataset("mnist", ROOT / "data").test
    answers = net.predict(test.images[:].float().div_(255).view(-1, 784).numpy(), batch_size=1000, verbose=0)
    return Result(seconds, float((answers.argmax(axis=1) == test.labels.numpy()).mean()), threads)


CONTESTANTS: dict[str, Callable[[Path, int, Work], Result]] = {
    "ours": train_ours,
    "compiled": train_compiled,
    "plain": train_plain,
    "loader": train_loader,
    "tutorial": train_tutorial,
    "accelerate": train_accelerate,
    "lightning": train_lightning,
    "keras": train_keras,
}
OURS = ("ours", "compiled")
NEEDS = {"lightning": ("lightning",), "keras": ("keras", "jax")}


def images_in_memory() -> tuple[torch.Tensor, torch.Tensor]:
    """All training images, floats [60000, 784], and their labels."""
    train = load_dataset("mnist", ROOT / "data").train
    return train.images[:].float().div_(255).view(-1, 784), train.labels


def in_batches(work: Work) -> Any:
    """The same in a shuffling DataLoader."""
    dataset = torch.utils.data.TensorDataset(*images_in_memory())
    return torch.utils.data.DataLoader(dataset, batch_size=work.batch_size, shuffle=True)


def test_accuracy(net: torch.nn.Module) -> float:
    """Share of the 10,000 test images that the network knows."""
    test = load_dataset("mnist", ROOT / "data").test
    with torch.no_grad():
        answers = net(test.images[:].float().div_(255)).argmax(dim=1)
    return float((answers == test.labels).double().mean())


def timed(name: str, scratch: Path, seed: int, work: Work) -> tuple[Result, float]:
    """A contestant's result in a process of its own, and the seconds of the whole process."""
    started = time.perf_counter()
    if name in OURS:  # starts a process itself
        return CONTESTANTS[name](scratch, seed, work), time.perf_counter() - started
    fresh, batch = multiprocessing.get_context("spawn"), torch.zeros(work.batch_size, 1, 28, 28)
    with ProcessPoolExecutor(1, fresh, choose_threads, (Net(), batch)) as pool:  # as many threads as train.py
        result = pool.submit(CONTESTANTS[name], scratch, seed, work).result()
    return result, time.perf_counter() - started


def compare(scratch: Path, names: Sequence[str], rounds: int, work: Work) -> dict[str, list[tuple[Result, float]]]:
    """Run the contestants in turn, and one short time before that does not count."""
    for name in names:
        timed(name, scratch, 0, work._replace(epochs=1, steps=min(300, 60_000 // work.batch_size)))
    results: dict[str, list[tuple[Result, float]]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            results[name].append(timed(name, scratch, number, work))
        figures = ", ".join(f"{name} {results[name][-1][0].seconds:.2f} s" for name in names)
        print(f"batches of {work.batch_size}, round {number + 1} of {rounds}: {figures}", flush=True)
    return results


def print_table(results: dict[str, list[tuple[Result, float]]], work: Work) -> None:
    """Medians, least and most; ratios to the plain loop."""
    row = "{:10} {:>21} {:>9} {:>21} {:>9} {:>8} {:>10}"
    print(f"\nbatches of {work.batch_size}")
    print(row.format("", "seconds an epoch", "images/s", "ratio to plain", "accuracy", "threads", "process s"))
    for name, runs in results.items():
        seconds, accuracies, threads = zip(*(result for result, _ in runs), strict=True)
        speed, accuracy = f"{60_000 / statistics.median(seconds):,.0f}", f"{statistics.median(accuracies):.4f}"
        process_seconds = f"{statistics.median(whole for _, whole in runs):.1f}"
        ratio = spread(ratios(results, name))
        print(row.format(name, spread(seconds), speed, ratio, accuracy, max(threads), process_seconds))


def ratios(results: dict[str, list[tuple[Result, float]]], name: str) -> list[float]:
    """A contestant's seconds to those of the plain loop, round by round."""
    return [mine.seconds / its.seconds for (mine, _), (its, _) in zip(results[name], results["plain"], strict=True)]


def draw(results: dict[str, list[tuple[Result, float]]], path: Path, title: str) -> None:
    """A bar a contestant, the median ratio, with the least and the most."""
    from mnist.reporting.plots import REST, TRAIN, drawing

    names = sorted(results, key=lambda name: statistics.median(ratios(results, name)))
    with drawing() as Figure:
        figure = Figure(figsize=(8, 0.9 + 0.45 * len(names)))
        axes = figure.subplots()
        for place, name in enumerate(names):
            found = ratios(results, name)
            middle = statistics.median(found)
            axes.barh(place, middle, color=TRAIN if name in OURS else REST)
            axes.plot([min(found), max(found)], [place, place], color="black", linewidth=1)
            accuracy = statistics.median(result.accuracy for result, _ in results[name])
            axes.text(max(found) + 0.05, place, f"{middle:.2f}   ({100 * accuracy:.1f} %)", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_axisbelow(True)
        axes.margins(x=0.2)
        axes.set_title(title)
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each contestant runs (default: 5)")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each run (default: 1)")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants; default: all that are installed")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[10], metavar="N", help="default: 10")
    parser.add_argument("--picture", type=Path, help="draw the ratios, of the first batch size, into this file")
    arguments = parser.parse_args()
    missing = {name for name, packages in NEEDS.items() if not all(find_spec(it) for it in packages)}
    names = [
        name for name in CONTESTANTS if name in (arguments.only or CONTESTANTS.keys() - missing) or name == "plain"
    ]
    if missing and not arguments.only:
        print(f"not installed, and left out: {', '.join(sorted(missing))} (pip install -e '.[bench]')")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(WANDB_MODE="offline", CUDA_VISIBLE_DEVICES="", TMPDIR=scratch)  # of all contestants
        folder = Path(scratch, "MNIST", "raw")  # torchvision's class reads unpacked files only
        folder.mkdir(parents=True)
        for file in FILES:
            (folder / file).write_bytes(gzip.decompress((ROOT / "data/MNIST/raw" / f"{file}.gz").read_bytes()))
        for size in arguments.batch_sizes:
            work = Work(size, arguments.epochs, None)
            found[work] = compare(Path(scratch), names, arguments.rounds, work)

    wanted = ("torch", "accelerate", "torchvision", "wandb", "lightning", "keras", "jax")
    packages = ", ".join(f"{name} {version(name)}" for name in wanted if find_spec(name))
    print(f"\n{time.strftime('%Y-%m-%d')}, {device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {packages}")
    print(f"python {shlex.join(sys.argv)}: medians [least, most] of {arguments.rounds} rounds")
    for work, results in found.items():
        print_table(results, work)
    if arguments.picture:
        title = "Time of an epoch, plain PyTorch being 1 (and accuracy)"
        draw(found[Work(arguments.batch_sizes[0], arguments.epochs, None)], arguments.picture, title)


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()
