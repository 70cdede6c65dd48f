"""What each process of a launched job does in tests/launched/test_processes.py, one task after the other:

    torchrun --nproc-per-node 4 tests/support/worker.py <folder> train evaluate

Each task leaves its results in <folder>. Tasks share one process group: only Accelerate's other state is made anew.
"""

import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, gather_object

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mnist.data.datasets
import mnist.training.evaluate
import train
from mnist.config.settings import CHOICES, PROJECT_FOLDER, TrainConfig
from mnist.data.loader import build_loader
from mnist.errors import ConfigError
from mnist.launch.main import end_process
from mnist.models.by_name import build_model
from mnist.reporting.report import LiveReport
from mnist.training.evaluate import evaluate_split
from mnist.training.losses import LOSSES
from tests.support.signals import hear_again

GLOBAL_BATCH = 24
WRITE_REPORT = LiveReport.write
SCHEDULES = [(schedule, number) for number, schedule in enumerate(CHOICES["schedule"])]
DTYPES = {"cnn-deep": "float64"}  # in float32 Adam makes whole steps of the rounding of gradients that are all but zero
CASES = {
    "-".join(map(str, case)): case
    for case in (
        *(("mlp", schedule, accumulation, "float64") for schedule, _ in SCHEDULES for accumulation in (1, 4)),
        *(("cnn", schedule, (1, 4)[number % 2], "float64") for schedule, number in SCHEDULES),
        *(
            (model, "one-cycle", accumulation, DTYPES.get(model, "float32"))
            for model in CHOICES["model"]
            for accumulation in (1, 4)
        ),
    )
}
DEEP = tuple(name for name, (model, *_) in CASES.items() if model == "cnn-deep")  # which take a while
FEW = ("mlp-linear-4-float64", "cnn-cosine-1-float64")
SIZES = (1_009, 1, 3)  # of test sets: a prime, and fewer than processes


def steps_of(name: str) -> int:
    """Several epochs of five batches, or of two windows of batches."""
    model, _, accumulation, _ = CASES[name]
    return (30 if model == "mlp" else 12) // (1 if accumulation == 1 else 2)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Without what takes time and is not looked at here: reading MNIST once more for each training, pictures."""
    kept = mnist.data.datasets.load_dataset, LiveReport.write, Accelerator.end_training
    mnist.data.datasets.load_dataset = functools.cache(mnist.data.datasets.load_dataset)
    LiveReport.write = lambda self, status=None: None  # type: ignore[method-assign]
    Accelerator.end_training = compare_weights  # instead of ending the process group, which serves all tasks
    try:
        yield
    finally:
        mnist.data.datasets.load_dataset, LiveReport.write, Accelerator.end_training = kept  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float32)


def compare_weights(accelerator: Accelerator) -> None:
    """At the end of training all processes have the same weights, to the bit."""
    weights = [value.tolist() for value in accelerator.unwrap_model(accelerator._models[-1]).state_dict().values()]
    digests = gather_object([hashlib.sha256(repr(weights).encode()).hexdigest()])
    assert len(set(digests)) == 1, digests


def new_accelerate() -> None:
    hear_again()
    AcceleratorState._reset_state()
    GradientState._reset_state()


def train_case(folder: Path, name: str) -> None:
    """Some optimizer steps on 107 images, in batches of GLOBAL_BATCH of all processes together."""
    new_accelerate()
    model, schedule, accumulation, dtype = CASES[name]
    torch.set_default_dtype(getattr(torch, dtype))
    config = TrainConfig(
        run_name=name,
        output_dir=str(folder / "runs"),
        trackers="none",
        log_every=5,
        model=model,
        schedule=schedule,
        augment=schedule == "linear",  # an image is to be changed alike wherever it is trained on
        warmup_steps=0 if schedule == "constant" else 4,
        gradient_accumulation_steps=accumulation,
        batch_size=GLOBAL_BATCH // world_size(),
        limit_train_images=107,
        limit_test_images=53,
        epochs=99,
        max_steps=steps_of(name),
        timeout_seconds=10,
    )
    train.train(config)


def train_most(folder: Path) -> None:
    for name in CASES:
        if name not in DEEP:
            train_case(folder, name)


def train_deep(folder: Path) -> None:
    for name in DEEP:
        train_case(folder, name)


def train_few(folder: Path) -> None:
    for name in FEW:
        train_case(folder, name)


def evaluate_all(folder: Path) -> None:
    """Loss and count of correct images for test sets of several sizes; every process writes what it got."""
    torch.set_default_dtype(torch.float32)
    results = {}
    for size in SIZES:
        new_accelerate()
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
        images = mnist.data.datasets.load_dataset("mnist", PROJECT_FOLDER / "data").train.take(slice(0, size))
        torch.manual_seed(1)
        loader = build_loader(images, 100 * world_size(), world_size())
        model, loader = accelerator.prepare(build_model("cnn", 10), loader)
        result = evaluate_split(model, loader, LOSSES["nll"], accelerator, mistakes=12)
        surest = [(it.place, it.truth, it.prediction, it.second) for it in result.mistakes]
        results[size] = [result.loss, result.correct, result.images, result.confusion.tolist(), surest]
    rank = os.environ.get("RANK", "0")
    (folder / f"evaluate-{world_size()}-{rank}.json").write_text(json.dumps(results))


OTHER_NUMBER: dict[str, Any] = {
    "limit_train_images": 507,
    "limit_test_images": 100,
    "epochs": 2,
    "seed": 3,
    "trackers": "none",
    "global_batch_size": 20,
}
MIDDLE = 35  # steps, in the second epoch


def begin_run(folder: Path) -> None:
    """A run that this number of processes begins, for another number to resume it."""
    new_accelerate()
    torch.set_default_dtype(torch.float32)
    run = f"begun-by-{world_size()}"
    train.train(TrainConfig(max_steps=MIDDLE, output_dir=str(folder / "runs"), run_name=run, **OTHER_NUMBER))


def resume_run(folder: Path) -> None:
    """Resume the run that one process has begun."""
    new_accelerate()
    torch.set_default_dtype(torch.float32)
    begun = folder / "runs" / "begun-by-1"
    train.train(TrainConfig(resume=str(begun), max_steps=52), explicit_settings=frozenset({"max_steps"}))


def log_to_wandb(folder: Path) -> None:
    """A run with all that is on by default, pictures apart."""
    new_accelerate()
    torch.set_default_dtype(torch.float32)
    settings: dict[str, Any] = {"limit_train_images": 200, "limit_test_images": 50, "global_batch_size": GLOBAL_BATCH}
    train.train(TrainConfig(output_dir=str(folder / "whole"), epochs=2, log_every=5, **settings))


def train_seen(folder: Path) -> None:
    """A run with all that a person can look at."""
    new_accelerate()
    torch.set_default_dtype(torch.float32)
    settings: dict[str, Any] = {"limit_train_images": 2000, "limit_test_images": 1003, "validation_size": 500}
    settings |= {"trackers": "wandb,tensorboard", "epochs": 2, "log_every": 20, "max_grad_norm": 1.0}
    without, LiveReport.write = LiveReport.write, WRITE_REPORT  # type: ignore[method-assign]
    train.train(TrainConfig(output_dir=str(folder / "runs"), run_name="seen", **settings))
    LiveReport.write = without  # type: ignore[method-assign]


def train_unlike(folder: Path) -> None:
    """Runs in which the process of rank 1 differs from the first; each writes the error that it gets."""
    torch.set_default_dtype(torch.float32)
    rank = os.environ["RANK"]
    for case in ("flag", "precision"):
        new_accelerate()
        settings: dict[str, Any] = {"learning_rate": 0.1} if (case, rank) == ("flag", "1") else {}
        with pytest.MonkeyPatch.context() as monkeypatch:
            if (case, rank) == ("precision", "1"):
                monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
            try:
                train.train(TrainConfig(output_dir=str(folder / "unlike"), trackers="none", **settings))
            except ConfigError as error:
                (folder / f"{case}-{rank}").write_text(str(error))


def download(folder: Path) -> None:
    """Load a data set that no process has, from the mirror that the test serves."""
    import torchvision

    new_accelerate()
    mnist.data.datasets.load_dataset.cache_clear()  # type: ignore[attr-defined]
    torchvision.datasets.MNIST.mirrors = [os.environ["MIRROR"]]
    settings: dict[str, Any] = {"limit_train_images": 200, "limit_test_images": 50, "max_steps": 1, "trackers": "none"}
    train.train(TrainConfig(data_dir=str(folder / "data"), output_dir=str(folder / "downloaded"), **settings))


def train_for_ever(folder: Path) -> None:
    """Through main(), until something outside ends it."""
    new_accelerate()
    torch.set_default_dtype(torch.float32)
    sys.argv[1:] = ["--epochs=100000", "--log-every=10", "--limit-train-images=1000", "--limit-test-images=10"]
    sys.argv += ["--trackers=none", "--timeout-seconds=8", f"--output-dir={folder / 'runs'}", "--run-name=for-ever"]
    end_process(train.main())


def on_rank_1(folder: Path, action: Callable[[], None]) -> None:
    """Train through main(), where the process of rank 1 does something at its tenth batch."""
    add, count = mnist.training.evaluate.TrainingLoss.add, 0

    def add_or_act(self: mnist.training.evaluate.TrainingLoss, loss: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == 10 and os.environ["RANK"] == "1":
            (folder / "reached").write_text(str(time.time()))
            action()
        add(self, loss)

    mnist.training.evaluate.TrainingLoss.add = add_or_act  # type: ignore[method-assign]
    train_for_ever(folder)


def fail_on_rank_1(folder: Path) -> None:
    def fail() -> None:
        raise ValueError("raised on purpose")

    on_rank_1(folder, fail)


def hang_on_rank_1(folder: Path) -> None:
    on_rank_1(folder, lambda: os.kill(os.getpid(), signal.SIGSTOP))


TASKS: dict[str, Callable[[Path], None]] = {
    task.__name__: task
    for task in (
        train_most,
        train_deep,
        train_few,
        evaluate_all,
        begin_run,
        resume_run,
        log_to_wandb,
        train_seen,
        train_unlike,
        download,
        train_for_ever,
        fail_on_rank_1,
        hang_on_rank_1,
    )
}

if __name__ == "__main__":
    with quick():
        for task in sys.argv[2:]:
            TASKS[task](Path(sys.argv[1]))
    end_process(0)
