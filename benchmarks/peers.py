"""One epoch of the tutorial's recipe beside what people would use instead.

    python benchmarks/peers.py                          # all that are installed, five rounds
    python benchmarks/peers.py --only ours plain --rounds 9
    python benchmarks/peers.py --only ours plain --batch-sizes 10 64 256 1024 4096
    python benchmarks/peers.py --device cuda            # on a GPU
    pip install -e '.[bench]'                           # Lightning, and Keras with JAX

ours             train.py --compile False, with all that is on by default, W&B (offline) included
compiled         the same with --compile True, the default on a GPU
plain            the loop in plain PyTorch: float images on the device, fused Adam, no logging
reduce-overhead  the same with torch.compile(net, mode="reduce-overhead"), which uses CUDA graphs on a GPU
loader           the plain loop with torch's DataLoader, which the next three use too
tutorial         the tutorial's own way: DataLoader over torchvision's MNIST with ToTensor, Adam with its defaults
accelerate       as in Accelerate's examples, on images in memory: a DataLoader, all of it prepared, no logging
lightning        Lightning's Trainer on images in memory, fused Adam; logging, checkpoints and progress bar switched off
keras            Keras's fit on JAX, which compiles the whole step, on images in memory
jax              a jitted step in JAX, Adam included, in a bare loop; images and their order on the device
jax-scan         the same with jax.lax.scan: the whole epoch is one call

All train 784-64-64-64-10 with Adam at 1e-3 on all 60,000 images, on the same device and number of threads, each in a
process of its own for all rounds. `seconds` are those of the training loop of one epoch, until the device has finished.
Each warms up in its process before, so compiling and loading kernels are not counted. The accuracy, after one epoch,
shows that none wins by not learning.
"""

import gzip
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
import torch.nn.functional as F
from measure import ROOT, WARM_UP, Figures, in_one_process, now, restored, tracker, train_warm
from torch import Tensor

from mnist.data.datasets import FILES, load_dataset
from mnist.launch.hardware import choose_threads
from mnist.models.networks import Net

PACKAGES = ("torch", "accelerate", "torchvision", "wandb", "lightning", "keras", "jax")  # versions that are shown
Batches = Iterable[tuple[Tensor, Tensor]]


class Work(NamedTuple):
    """What all contestants do."""

    scratch: Path
    batch_size: int
    device: str = "cpu"
    seed: int = 0
    steps: int | None = None  # all steps of an epoch if None

    @property
    def num_steps(self) -> int:
        return -(-60_000 // self.batch_size) if self.steps is None else self.steps


def train_ours(work: Work, compiled: bool = False) -> Figures:
    flags = [
        f"--compile={compiled}",
        f"--trackers={tracker()}",
        f"--seed={work.seed}",
        f"--batch-size={work.batch_size}",
    ]
    if work.steps is not None:
        flags.append(f"--limit-train-images={work.steps * work.batch_size}")
    record = train_warm(work.scratch, "--epochs=1", *flags)
    seconds, accuracy = (record.last[name] for name in ("perf/epoch_seconds", "test/accuracy"))
    return figures(work, seconds, accuracy, record.environment["threads"])


def train_compiled(work: Work) -> Figures:
    return train_ours(work, compiled=True)


def train_plain(work: Work, mode: str | None = None) -> Figures:
    images, labels = (values.to(work.device) for values in images_in_memory())

    def batches() -> Batches:  # shuffled while the clock runs
        for index in torch.randperm(len(images), device=work.device).split(work.batch_size):
            yield images[index], labels[index]

    net = Net().to(work.device)
    torch._dynamo.reset()  # of the round before
    forward = net if mode is None else torch.compile(net, mode=mode)
    return train_epoch(net, fused_adam(net), batches, work, forward)


def train_reduce_overhead(work: Work) -> Figures:
    return train_plain(work, "reduce-overhead")


def train_loader(work: Work) -> Figures:
    net = Net().to(work.device)
    return train_epoch(net, fused_adam(net), on_device(loader_in_memory(work), work), work)


def train_tutorial(work: Work) -> Figures:
    from torchvision import datasets, transforms

    images = datasets.MNIST(str(work.scratch), train=True, transform=transforms.ToTensor())
    batches = torch.utils.data.DataLoader(images, batch_size=work.batch_size, shuffle=True)
    net = Net().to(work.device)
    return train_epoch(net, torch.optim.Adam(net.parameters(), lr=0.001), on_device(batches, work), work)


def train_accelerate(work: Work) -> Figures:
    from accelerate import Accelerator

    accelerator, net = Accelerator(cpu=work.device == "cpu"), Net().to(work.device)
    net, optimizer, batches = accelerator.prepare(net, fused_adam(net), loader_in_memory(work))
    return train_epoch(net, optimizer, batches.__iter__, work, backward=accelerator.backward)


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
            self.started = now(work.device)

        def on_train_epoch_end(self) -> None:
            self.seconds = now(work.device) - self.started

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for steps in (min(WARM_UP, work.num_steps), work.steps):
        module = Module()
        trainer = lightning.Trainer(accelerator=work.device, devices=1, max_epochs=1, limit_train_batches=steps, **off)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader_in_memory(work))
    return figures(work, module.seconds, test_accuracy(module.net.cpu()), torch.get_num_threads())


def choose_jax_device(work: Work) -> int:
    """Set the device of JAX, which is not imported yet, and its threads on a CPU; returns their number."""
    threads = torch.get_num_threads()
    one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    one_thread = work.device == "cpu" and threads == 1
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or it takes three quarters of the GPU's memory
    os.environ.update(JAX_PLATFORMS=work.device, KERAS_BACKEND="jax", **({"XLA_FLAGS": one} if one_thread else {}))
    return threads


def train_keras(work: Work) -> Figures:
    threads = choose_jax_device(work)
    import jax
    import keras

    keras.utils.set_random_seed(work.seed)
    images, labels = (values.numpy() for values in images_in_memory())
    layers = [keras.layers.Dense(64, activation="relu") for _ in range(3)]
    net = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    net.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    warm_up = 4 * work.batch_size + len(images) % work.batch_size  # the last batch of an epoch has a shape of its own
    net.fit(images[:warm_up], labels[:warm_up], batch_size=work.batch_size, verbose=0)
    images = images if work.steps is None else images[: work.steps * work.batch_size]
    started = now()
    net.fit(images, labels[: len(images)], batch_size=work.batch_size, verbose=0)
    jax.block_until_ready([variable.value for variable in net.variables])
    seconds = now() - started
    outputs = partial(net.predict, batch_size=1000, verbose=0)
    return figures(work, seconds, test_accuracy(lambda X: torch.from_numpy(outputs(X.flatten(1).numpy()))), threads)


def train_jax(work: Work, scan: bool = False) -> Figures:
    threads = choose_jax_device(work)
    import jax
    import jax.numpy as jnp

    net, (images, labels) = Net(), (jnp.asarray(values.numpy()) for values in images_in_memory())
    order = jnp.asarray(torch.randperm(len(images)).numpy())

    def loss(weights: list[Any], X: Any, y: Any) -> Any:
        for number in range(0, len(weights), 2):
            X = (jax.nn.relu(X) if number else X) @ weights[number].T + weights[number + 1]
        return -jnp.take_along_axis(jax.nn.log_softmax(X), y[:, None], axis=1).mean()

    def step(state: Any, order: Any, images: Any, labels: Any) -> Any:
        weights, means, squares, count = state
        index = jax.lax.dynamic_slice_in_dim(order, count * work.batch_size, work.batch_size)
        gradients = jax.grad(loss)(weights, images[index], labels[index])
        count = count + 1
        means = [0.9 * mean + 0.1 * gradient for mean, gradient in zip(means, gradients, strict=True)]
        squares = [0.999 * square + 0.001 * gradient**2 for square, gradient in zip(squares, gradients, strict=True)]
        rate, root = 1e-3 / (1 - 0.9**count), jnp.sqrt(1 - 0.999**count)
        moved = zip(weights, means, squares, strict=True)
        weights = [weight - rate * mean / (jnp.sqrt(square) / root + 1e-8) for weight, mean, square in moved]
        return weights, means, squares, count

    def scan_steps(state: Any, *data: Any) -> Any:
        return jax.lax.scan(lambda state, _: (step(state, *data), None), state, length=work.num_steps)[0]

    once = jax.jit(scan_steps if scan else step, donate_argnums=0)

    def train() -> Any:
        weights = [jnp.array(parameter.detach().numpy()) for parameter in net.parameters()]
        means, squares = ([jnp.zeros_like(weight) for weight in weights] for _ in range(2))
        state = jax.block_until_ready((weights, means, squares, jnp.int32(0)))
        started = now()
        for _ in range(1 if scan else work.num_steps):
            state = once(state, order, images, labels)
        weights = jax.block_until_ready(state)[0]
        return now() - started, weights

    train()
    seconds, weights = train()
    with torch.no_grad():
        for parameter, weight in zip(net.parameters(), weights, strict=True):
            parameter.copy_(torch.tensor(weight.tolist()))
    return figures(work, seconds, test_accuracy(net), threads)


def train_jax_scan(work: Work) -> Figures:
    return train_jax(work, scan=True)


CONTESTANTS: dict[str, Callable[[Work], Figures]] = {
    function.__name__.removeprefix("train_").replace("_", "-"): function
    for function in (
        *(train_ours, train_compiled, train_plain, train_reduce_overhead, train_loader, train_tutorial),
        *(train_accelerate, train_lightning, train_keras, train_jax, train_jax_scan),
    )
}
OURS = ("ours", "compiled")
NEEDS = {"lightning": ("lightning",), "keras": ("keras", "jax"), "jax": ("jax",), "jax-scan": ("jax",)}


def not_installed() -> set[str]:
    """The contestants whose packages are missing."""
    return {name for name, packages in NEEDS.items() if not all(map(find_spec, packages))}


def figures(work: Work, seconds: float, accuracy: float, threads: int) -> Figures:
    images = min(60_000, work.num_steps * work.batch_size)
    return {"seconds": seconds, "images/s": images / seconds, "accuracy": accuracy, "threads": threads}


def train_epoch(
    net: Any,
    optimizer: Any,
    batches: Callable[[], Batches],
    work: Work,
    forward: Any = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Figures:
    """Warm up, then train for an epoch; `forward` computes the output of `net`, which does so by default."""
    forward = net if forward is None else forward

    def train(steps: int | None) -> None:
        for X, y in islice(batches(), steps):
            optimizer.zero_grad()
            backward(F.nll_loss(forward(X), y))
            optimizer.step()

    with restored(net, optimizer):
        train(WARM_UP)
    started = now(work.device)
    train(work.steps)
    return figures(work, now(work.device) - started, test_accuracy(net.cpu()), torch.get_num_threads())


def fused_adam(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)


def images_in_memory() -> tuple[Tensor, Tensor]:
    """All training images, floats [60000, 784], and their labels."""
    train = load_dataset("mnist", ROOT / "data").train
    return train.images[:].float().div_(255).view(-1, 784), train.labels


def loader_in_memory(work: Work) -> Any:
    """The same in a shuffling DataLoader."""
    dataset = torch.utils.data.TensorDataset(*images_in_memory())
    return torch.utils.data.DataLoader(dataset, batch_size=work.batch_size, shuffle=True)


def on_device(loader: Batches, work: Work) -> Callable[[], Batches]:
    """A function that returns the batches of an epoch, each moved to the device."""
    return lambda: ((X.to(work.device), y.to(work.device)) for X, y in loader)


@torch.no_grad()
def test_accuracy(net: Callable[[Tensor], Tensor]) -> float:
    """Share of the 10,000 test images that are classified correctly."""
    test = load_dataset("mnist", ROOT / "data").test
    return float((net(test.images[:].float().div_(255)).argmax(dim=1) == test.labels).double().mean())


def train(name: str, work: Work, seed: int) -> Figures:
    """A contestant in this process, on as many threads as train.py would choose."""
    choose_threads(Net(), torch.zeros(work.batch_size, 1, 28, 28))
    torch.manual_seed(seed)
    return CONTESTANTS[name](work._replace(seed=seed))


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
    parser = measure.command_line(__doc__, rounds=5, on_gpus=True)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants; default: all that are installed")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[10], metavar="N", help="default: 10")
    parser.add_argument("--steps", type=int, help="steps per epoch (default: all)")
    parser.add_argument("--picture", type=Path, help="draw the ratios, of the first batch size, into this file")
    arguments = parser.parse_args()
    if arguments.log and len(arguments.batch_sizes) > 1:
        parser.error("--log: needs a single batch size")
    missing, wanted = not_installed(), {"plain"}
    wanted |= set(arguments.only or CONTESTANTS.keys() - missing)
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
            work = Work(Path(scratch), size, arguments.device, steps=arguments.steps)
            contestants = {name: in_one_process(train, name, work) for name in CONTESTANTS if name in wanted}
            by_size[size] = measure.interleave(contestants, arguments.rounds, arguments.log)
    print(measure.header(*PACKAGES, device=arguments.device))
    if measure.tracker() == "none":
        print("wandb is not installed: train.py ran with --trackers none")
    for size, results in by_size.items():
        print(f"batches of {size}")
        measure.print_table(results, "plain")
    if arguments.picture:
        draw(by_size[arguments.batch_sizes[0]], arguments.picture)


if __name__ == "__main__":
    main()
