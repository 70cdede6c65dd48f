"""One epoch of the tutorial's recipe beside what people would use instead.

    python benchmarks/peers.py                          # all that are installed, a warm-up and five rounds
    python benchmarks/peers.py --only ours plain --rounds 9
    python benchmarks/peers.py --only ours plain --batch-sizes 10 64 256 1024 4096
    pip install -e '.[bench]'                           # Lightning, and Keras with JAX

ours        accelerate launch train.py, with everything that is on by default, W&B (offline) included
compiled    the same with --compile; compiling is not counted
plain       the loop in plain PyTorch: float images in memory, fused Adam, no logging
loader      the same loop with torch's DataLoader, which the next three use too
tutorial    the tutorial's own way: DataLoader over torchvision's MNIST with ToTensor, Adam with its defaults
accelerate  as in Accelerate's examples, on images in memory: a DataLoader, all of it prepared, no logging
lightning   Lightning's Trainer on images in memory, fused Adam; logging, checkpoints and progress bar switched off
keras       Keras's fit on JAX, which compiles the whole step, on images in memory; compiling is not counted

All train 784-64-64-64-10 with Adam at 1e-3 on all 60,000 images, on the CPU, on the same number of threads, each in a
process of its own. `seconds` are those of the training loop, `process` those of the whole process. The accuracy shows
that none wins by not learning.
"""

import gzip
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
import torch.nn.functional as F
from measure import ROOT, Figures, in_fresh_process, run_train
from torch import Tensor

from mnist.data.datasets import FILES, load_dataset
from mnist.launch.hardware import choose_threads
from mnist.models.networks import Net


class Work(NamedTuple):
    """What all contestants do."""

    scratch: Path
    batch_size: int
    seed: int = 0
    steps: int | None = None  # all steps of an epoch if None


def train_ours(work: Work, *flags: str) -> Figures:
    flags += () if work.steps is None else (f"--max-steps={work.steps}",)
    settings = ("--trackers=wandb", f"--seed={work.seed}", "--epochs=1", f"--batch-size={work.batch_size}")
    script = ("-m", "accelerate.commands.launch", "train.py")
    record = run_train(work.scratch, *settings, *flags, script=script)
    return figures(record.last["perf/epoch_seconds"], record.last["test/accuracy"], record.environment["threads"])


def train_compiled(work: Work) -> Figures:
    return train_ours(work, "--compile")


def train_plain(work: Work) -> Figures:
    images, labels = images_in_memory()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:  # shuffled while the clock runs
        for index in torch.randperm(len(images)).split(work.batch_size):
            yield images[index], labels[index]

    net = Net()
    return train_epoch(net, fused_adam(net), batches(), work)


def train_loader(work: Work) -> Figures:
    net = Net()
    return train_epoch(net, fused_adam(net), batches_in_memory(work), work)


def train_tutorial(work: Work) -> Figures:
    from torchvision import datasets, transforms

    images = datasets.MNIST(str(work.scratch), train=True, transform=transforms.ToTensor())
    batches = torch.utils.data.DataLoader(images, batch_size=work.batch_size, shuffle=True)
    net = Net()
    return train_epoch(net, torch.optim.Adam(net.parameters(), lr=0.001), batches, work)


def train_accelerate(work: Work) -> Figures:
    from accelerate import Accelerator

    accelerator, net = Accelerator(cpu=True), Net()
    net, optimizer, batches = accelerator.prepare(net, fused_adam(net), batches_in_memory(work))
    return train_epoch(net, optimizer, batches, work, accelerator.backward)


def train_lightning(work: Work) -> Figures:
    import logging

    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            return F.nll_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return fused_adam(self)

        def on_train_epoch_start(self) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            self.seconds = time.perf_counter() - self.started

    module = Module()
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=work.steps, **off)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches_in_memory(work))
    return figures(module.seconds, test_accuracy(module.net), torch.get_num_threads())


def train_keras(work: Work) -> Figures:
    threads = torch.get_num_threads()
    one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.update(KERAS_BACKEND="jax", XLA_FLAGS=one if threads == 1 else "", JAX_PLATFORMS="cpu")
    import keras

    keras.utils.set_random_seed(work.seed)
    images, labels = (values.numpy() for values in images_in_memory())
    layers = [keras.layers.Dense(64, activation="relu") for _ in range(3)]
    net = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    net.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    warm_up = 4 * work.batch_size + len(images) % work.batch_size  # the last batch of an epoch has a shape of its own
    net.fit(images[:warm_up], labels[:warm_up], batch_size=work.batch_size, verbose=0)
    images = images if work.steps is None else images[: work.steps * work.batch_size]
    started = time.perf_counter()
    net.fit(images, labels[: len(images)], batch_size=work.batch_size, verbose=0)
    seconds = time.perf_counter() - started
    outputs = partial(net.predict, batch_size=1000, verbose=0)
    return figures(seconds, test_accuracy(lambda X: torch.from_numpy(outputs(X.flatten(1).numpy()))), threads)


CONTESTANTS: dict[str, Callable[[Work], Figures]] = {
    function.__name__.removeprefix("train_"): function
    for function in (
        *(train_ours, train_compiled, train_plain, train_loader),
        *(train_tutorial, train_accelerate, train_lightning, train_keras),
    )
}
OURS = ("ours", "compiled")
NEEDS = {"lightning": ("lightning",), "keras": ("keras", "jax")}


def figures(seconds: float, accuracy: float, threads: int) -> Figures:
    return {"seconds": seconds, "images/s": 60_000 / seconds, "accuracy": accuracy, "threads": threads}


def train_epoch(net: Any, optimizer: Any, batches: Any, work: Work, backward: Any = Tensor.backward) -> Figures:
    started = time.perf_counter()
    for X, y in islice(batches, work.steps):
        optimizer.zero_grad()
        backward(F.nll_loss(net(X), y))
        optimizer.step()
    return figures(time.perf_counter() - started, test_accuracy(net), torch.get_num_threads())


def fused_adam(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)


def images_in_memory() -> tuple[Tensor, Tensor]:
    """All training images, floats [60000, 784], and their labels."""
    train = load_dataset("mnist", ROOT / "data").train
    return train.images[:].float().div_(255).view(-1, 784), train.labels


def batches_in_memory(work: Work) -> Any:
    """The same in a shuffling DataLoader."""
    dataset = torch.utils.data.TensorDataset(*images_in_memory())
    return torch.utils.data.DataLoader(dataset, batch_size=work.batch_size, shuffle=True)


@torch.no_grad()
def test_accuracy(net: Callable[[Tensor], Tensor]) -> float:
    """Share of the 10,000 test images that are classified correctly."""
    test = load_dataset("mnist", ROOT / "data").test
    return float((net(test.images[:].float().div_(255)).argmax(dim=1) == test.labels).double().mean())


def train_here(name: str, work: Work) -> Figures:
    """A contestant in this process, on as many threads as train.py would choose."""
    choose_threads(Net(), torch.zeros(work.batch_size, 1, 28, 28))
    torch.manual_seed(work.seed)
    return CONTESTANTS[name](work)


def train(name: str, work: Work, seed: int) -> Figures:
    """A contestant in a process of its own, and the seconds of the whole process."""
    started, work = time.perf_counter(), work._replace(seed=seed)
    result = CONTESTANTS[name](work) if name in OURS else in_fresh_process(train_here, name, work)
    return result | {"process": time.perf_counter() - started}


def draw(results: dict[str, list[Figures]], path: Path) -> None:
    """A bar per contestant: the median ratio, with the least and the most."""
    from mnist.reporting.plots import REST, TRAIN, drawing

    by_name = {name: measure.ratios(runs, results["plain"]) for name, runs in results.items()}
    names = sorted(by_name, key=lambda name: statistics.median(by_name[name]))
    with drawing() as Figure:
        figure = Figure(figsize=(8, 0.9 + 0.45 * len(names)))
        axes = figure.subplots()
        for place, name in enumerate(names):
            least, middle, most = min(by_name[name]), statistics.median(by_name[name]), max(by_name[name])
            axes.barh(place, middle, color=TRAIN if name in OURS else REST)
            axes.plot([least, most], [place, place], color="black", linewidth=1)
            accuracy = 100 * statistics.median(measure.column(results[name], "accuracy"))
            axes.text(most + 0.05, place, f"{middle:.2f}   ({accuracy:.1f} %)", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_axisbelow(True)
        axes.margins(x=0.2)
        axes.set_title("Time per epoch, plain PyTorch being 1 (and accuracy)")
        figure.savefig(path)


def main() -> None:
    parser = measure.command_line(__doc__, rounds=5)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants; default: all that are installed")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[10], metavar="N", help="default: 10")
    parser.add_argument("--picture", type=Path, help="draw the ratios, of the first batch size, into this file")
    arguments = parser.parse_args()
    missing = {name for name, packages in NEEDS.items() if not all(find_spec(package) for package in packages)}
    wanted = {*(arguments.only or CONTESTANTS.keys() - missing), "plain"}
    if missing and not arguments.only:
        print(f"not installed, left out: {', '.join(sorted(missing))} (pip install -e '.[bench]')")
    by_size = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TMPDIR"] = scratch  # of all contestants
        folder = Path(scratch, "MNIST", "raw")  # torchvision's class reads unpacked files only
        folder.mkdir(parents=True)
        for file in FILES:
            (folder / file).write_bytes(gzip.decompress((ROOT / "data/MNIST/raw" / f"{file}.gz").read_bytes()))
        for size in arguments.batch_sizes:
            work = Work(Path(scratch), size)
            names = [name for name in CONTESTANTS if name in wanted]
            for name in names:  # warm-up
                train(name, work._replace(steps=min(300, 60_000 // size)), 0)
            by_size[size] = measure.interleave({name: partial(train, name, work) for name in names}, arguments.rounds)
    print(measure.header("torch", "accelerate", "torchvision", "wandb", "lightning", "keras", "jax"))
    for size, results in by_size.items():
        print(f"batches of {size}")
        measure.print_table(results, "plain")
    if arguments.picture:
        draw(by_size[arguments.batch_sizes[0]], arguments.picture)


if __name__ == "__main__":
    main()
