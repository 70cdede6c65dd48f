"""The tasks of each process in a job launched by tests/launched/test_processes.py:

    torchrun --nproc-per-node 4 tests/support/worker.py <folder> train_most evaluate_all

Each task writes its results to <folder>. Tasks share the process group; the rest of Accelerate's state is reset.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
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
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mnist.data.datasets
import mnist.files
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

SMALL: dict[str, Any] = {"limit_train_images": 200, "limit_test_images": 50}
GLOBAL_BATCH = 24
WRITE_REPORT = LiveReport.write
# each with a number of batches per optimizer step
SCHEDULES = list(zip(CHOICES["schedule"], (1, 4, 1, 4), strict=True))
DTYPES = {"cnn-deep": "float64"}  # in float32 Adam turns rounding errors of near-zero gradients into full steps
CASES = {
    "-".join(map(str, case)): case
    for case in (
        *(("mlp", schedule, accumulation, "float64") for schedule, accumulation in SCHEDULES),
        *(
            (model, schedule, 5 - accumulation, "float64")
            for model in ("mlp", "cnn")
            for schedule, accumulation in SCHEDULES
        ),
        *(
            (model, "one-cycle", accumulation, DTYPES.get(model, "float32"))
            for model in CHOICES["model"]
            for accumulation in (1, 4)
        ),
    )
}
SLOW = tuple(name for name, (model, *_) in CASES.items() if model == "cnn-deep")
SLOW += tuple(f"mlp-{schedule}-{5 - accumulation}-float64" for schedule, accumulation in SCHEDULES)
FEW = ("mlp-one-cycle-4-float64", "cnn-linear-1-float64")
SIZES = (1_009, 1, 3)  # of test sets: a prime, and fewer than processes


def steps_of(name: str) -> int:
    """Several epochs of five batches, or of two accumulation windows."""
    model, _, accumulation, _ = CASES[name]
    return (30 if model == "mlp" else 12) // (1 if accumulation == 1 else 2)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Without reading MNIST for every run, reports, and flushing to disk; the process group serves all tasks."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(mnist.data.datasets, "load_dataset", functools.cache(mnist.data.datasets.load_dataset))
        monkeypatch.setattr(LiveReport, "write", lambda self, status=None: None)
        monkeypatch.setattr(mnist.files, "flush", lambda path: None)
        monkeypatch.setattr(Accelerator, "end_training", compare_weights)
        yield
    torch.set_default_dtype(torch.float32)


def compare_weights(accelerator: Accelerator) -> None:
    """At the end of training, all processes have bit-identical weights."""
    weights = accelerator.unwrap_model(accelerator._models[-1]).state_dict()
    digests = gather_object([hashlib.sha256(save(weights)).hexdigest()])
    assert len(set(digests)) == 1, digests


def train_once(folder: Path, dtype: str = "float32", explicit: tuple[str, ...] = (), **settings: Any) -> None:
    """Train in a run folder below `folder`, with fresh state of Accelerate."""
    reset()
    torch.set_default_dtype(getattr(torch, dtype))
    train.train(TrainConfig(output_dir=str(folder), **settings), explicit_settings=frozenset(explicit))


def reset() -> None:
    hear_again()
    AcceleratorState._reset_state()
    GradientState._reset_state()


def train_case(folder: Path, name: str) -> None:
    """Some optimizer steps on 107 images, with a global batch size of GLOBAL_BATCH."""
    model, schedule, accumulation, dtype = CASES[name]
    train_once(
        folder / "runs",
        dtype,
        run_name=name,
        trackers="none",
        log_every=5,
        model=model,
        schedule=schedule,
        # neither may depend on the number of processes
        augment="light" if schedule == "linear" else "none",
        loss="nll-balanced" if schedule == "linear" else "nll",
        warmup_steps=0 if schedule == "constant" else 4,
        gradient_accumulation_steps=accumulation,
        batch_size=GLOBAL_BATCH // world_size(),
        limit_train_images=107,
        limit_test_images=53,
        epochs=99,
        max_steps=steps_of(name),
        timeout_seconds=10,
    )


def train_most(folder: Path) -> None:
    for name in (name for name in CASES if name not in SLOW):
        train_case(folder, name)


def train_slow(folder: Path) -> None:
    for name in SLOW:
        train_case(folder, name)


def train_few(folder: Path) -> None:
    for name in FEW:
        train_case(folder, name)


def evaluate_all(folder: Path) -> None:
    """Evaluate test sets of several sizes; every process writes its results."""
    torch.set_default_dtype(torch.float32)
    results = {}
    for size in SIZES:
        reset()
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
        images = mnist.data.datasets.load_dataset("mnist", PROJECT_FOLDER / "data").train.take(slice(0, size))
        torch.manual_seed(1)
        loader = build_loader(images, 100 * world_size(), world_size())
        model, loader = accelerator.prepare(build_model("cnn", 10), loader)
        result = evaluate_split(model, loader, LOSSES["nll"], accelerator, split="test")
        mistakes = [(it.place, it.truth, it.prediction, it.second) for it in result.mistakes[:12]]
        calibration = evaluate_split(model, loader, LOSSES["nll"], accelerator, split="val").calibration
        results[size] = [result.loss, result.correct, result.images, result.confusion.tolist(), mistakes, calibration]
    rank = os.environ.get("RANK", "0")
    (folder / f"evaluate-{world_size()}-{rank}.json").write_text(json.dumps(results))


OTHER_NUMBER: dict[str, Any] = {"limit_train_images": 507, "limit_test_images": 100, "epochs": 2, "seed": 3}
OTHER_NUMBER |= {"trackers": "none", "global_batch_size": 20}
MIDDLE = 35  # steps, in the second epoch


def begin_run(folder: Path) -> None:
    """Start a run that another number of processes will resume."""
    train_once(folder / "runs", max_steps=MIDDLE, run_name=f"begun-by-{world_size()}", **OTHER_NUMBER)


def resume_run(folder: Path) -> None:
    """Resume the run that one process started."""
    begun = folder / "runs" / "begun-by-1"
    train_once(folder, explicit=("max_steps",), resume=str(begun), max_steps=52)


def resume_identically(folder: Path) -> None:
    """A run, and its copy resumed from the first of three checkpoints."""
    runs, settings = folder / "runs", SMALL | {"trackers": "none", "global_batch_size": GLOBAL_BATCH}
    train_once(runs, run_name="whole", checkpoint_every=3, max_steps=7, **settings)
    if os.environ["RANK"] == "0":
        shutil.copytree(runs / "whole", runs / "cut")
        for path in sorted((runs / "cut" / "checkpoints").iterdir())[1:]:
            shutil.rmtree(path)
    torch.distributed.barrier()
    train_once(runs, resume=str(runs / "cut"))


def log_to_wandb(folder: Path) -> None:
    """A run with the default trackers."""
    train_once(folder / "whole", epochs=2, log_every=5, global_batch_size=GLOBAL_BATCH, **SMALL)


def train_seen(folder: Path) -> None:
    """A run with everything that people look at."""
    settings: dict[str, Any] = {"limit_train_images": 2000, "limit_test_images": 1003, "validation_size": 500}
    settings |= {"trackers": "wandb,tensorboard", "epochs": 2, "log_every": 20, "max_grad_norm": 1.0}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(LiveReport, "write", WRITE_REPORT)
        train_once(folder / "runs", run_name="seen", **settings)


def train_unlike(folder: Path) -> None:
    """Runs in which rank 1 differs from rank 0; each process writes its error."""
    rank = os.environ["RANK"]
    for case in ("flag", "precision"):
        settings: dict[str, Any] = {"learning_rate": 0.1} if (case, rank) == ("flag", "1") else {}
        with pytest.MonkeyPatch.context() as monkeypatch:
            if (case, rank) == ("precision", "1"):
                monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
            try:
                train_once(folder / "unlike", trackers="none", **settings)
            except ConfigError as error:
                (folder / f"{case}-{rank}").write_text(str(error))


def download(folder: Path) -> None:
    """Load a dataset that no process has, from the test's server."""
    import torchvision

    mnist.data.datasets.load_dataset.cache_clear()  # type: ignore[attr-defined]
    torchvision.datasets.MNIST.mirrors = [os.environ["MIRROR"]]
    train_once(folder / "downloaded", data_dir=str(folder / "data"), max_steps=1, trackers="none", **SMALL)


def train_for_ever(folder: Path) -> None:
    """Through main(), until something ends it."""
    reset()
    torch.set_default_dtype(torch.float32)
    sys.argv[1:] = ["--epochs=100000", "--log-every=10", "--limit-train-images=1000", "--limit-test-images=10"]
    sys.argv += ["--trackers=none", "--timeout-seconds=8", f"--output-dir={folder / 'runs'}", "--run-name=for-ever"]
    end_process(train.main())


def on_rank_1(folder: Path, action: Callable[[], None]) -> None:
    """Train through main(); rank 1 calls `action` at its tenth batch."""
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


if __name__ == "__main__":
    with quick():
        for task in sys.argv[2:]:
            globals()[task](Path(sys.argv[1]))
    end_process(0)
