"""How far training is: counts batches and optimizer steps, adds up the loss, and keeps the time.

progress = Progress(accelerator, images=60_000, global_batch_size=10, total_steps=18_000)
for batch in progress.remaining(train_loader): ...; progress.update(loss)
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mnist.errors import DivergedError
from mnist.launch.hardware import peak_memory
from mnist.training.evaluate import TrainingLoss


class Progress:
    """The step, the epoch and the batch of a run; a step is an optimizer step of the whole job.

    Its `state_dict` says where a run is resumed, to the batch. It is the same on all processes.
    """

    def __init__(self, accelerator: Accelerator, images: int, global_batch_size: int, total_steps: int) -> None:
        """`images` are those of an epoch, `total_steps` the optimizer steps of the run."""
        self.accelerator = accelerator
        self.images_per_epoch = images
        self.global_batch_size = global_batch_size
        self.batches_per_epoch = -(-images // global_batch_size)
        self.total_steps = total_steps
        self.step = 0  # optimizer steps that are done
        self.epoch = 1  # the current one
        self.batch = 0  # batches of it that are done
        self.seconds = 0.0  # that they took, up to when the clock was last stopped
        self.started: float | None = None  # when the clock was started, while it runs
        self.results: dict[str, Any] = {}  # of the last evaluation
        self.best: float | None = None  # validation loss
        self.is_best = False  # whether the last evaluation has it
        self.loss = TrainingLoss(accelerator)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and dicts of numbers."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "images_seen": (self.epoch - 1) * self.images_per_epoch + self.images_done,
            "seconds": self.elapsed(),
            "results": self.results,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state_dict` was taken. Raises ValueError for a place where this run cannot be."""
        step, epoch, batch = state["step"], state["epoch"], state["batch"]
        if not all(type(number) is int for number in (step, epoch, batch)):
            raise ValueError(f"step {step!r}, epoch {epoch!r}, batch {batch!r}")
        if not 0 <= batch <= self.batches_per_epoch or epoch < 1:
            raise ValueError(f"epoch {epoch}, batch {batch:,} of {self.batches_per_epoch:,}")
        if step != (epoch - 1) * self.steps_per_epoch + self._windows(batch):
            raise ValueError(f"step {step:,} in epoch {epoch}, batch {batch:,}")
        self.step, self.epoch, self.batch = step, epoch, batch
        self.seconds, self.results, self.best = state["seconds"], state["results"], state["best"]

    def _windows(self, batches: int) -> int:
        """Optimizer steps in so many batches, the last perhaps of fewer accumulated ones."""
        accumulation_steps: int = self.accelerator.gradient_accumulation_steps
        return -(-batches // accumulation_steps)

    @property
    def steps_per_epoch(self) -> int:
        return self._windows(self.batches_per_epoch)

    @property
    def steps_left(self) -> int:
        """Optimizer steps to go in this epoch."""
        left = self.steps_per_epoch - self._windows(self.batch)
        return max(0, min(left, self.total_steps - self.step))

    @property
    def images_done(self) -> int:
        """Training images of all processes in this epoch so far."""
        return min(self.batch * self.global_batch_size, self.images_per_epoch)

    @property
    def position(self) -> dict[str, int]:
        """The last step that is done, and its epoch."""
        return {"step": self.step, "epoch": self.epoch - (self.batch == 0 < self.step)}

    @property
    def finished(self) -> bool:
        """Whether the last step of the run is done."""
        return self.step >= self.total_steps

    @property
    def evaluated(self) -> bool:
        """Whether the current weights were evaluated."""
        return self.results.get("step") == self.step

    def epochs(self) -> Iterator[int]:
        """The epochs to go, counted from 1; the first may have been begun by an earlier process."""
        while not (self.finished and self.evaluated):
            yield self.epoch

    def remaining(self, train_loader: Any) -> Iterator[Any]:
        """The batches of this epoch to go, from the DataLoader that Accelerate has prepared, while the clock runs."""
        self.started = time.perf_counter()
        if not self.finished:
            skipped = self.accelerator.skip_first_batches(train_loader, self.batch) if self.batch else train_loader
            for batch in skipped:
                yield batch
                if self.finished:
                    break
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds, self.started = self.elapsed(), None

    def elapsed(self) -> float:
        """Seconds that training took in this epoch so far, without evaluation."""
        return self.seconds + (0.0 if self.started is None else time.perf_counter() - self.started)

    def update(self, loss: Tensor) -> None:
        """Count one batch, and the optimizer step that it completes."""
        self.batch += 1
        self.loss.add(loss)
        self.step += self.accelerator.sync_gradients

    def performance(self) -> dict[str, float]:
        """Speed and memory of the epoch's training so far, by the names under which they are logged."""
        return {
            "perf/images_per_second": self.images_done / self.seconds,
            "perf/epoch_seconds": self.seconds,
            "perf/peak_memory_mib": peak_memory(self.accelerator.device) / 2**20,
        }

    def end_epoch(self, results: dict[str, Any]) -> None:
        """Keep the results of an evaluation, and go on to the next epoch if this one is over."""
        self.results = results
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        loss = results.get("val/loss")
        self.is_best = loss is not None and (self.best is None or loss < self.best)
        if self.is_best:
            self.best = loss

    def finite(self, values: dict[str, float]) -> dict[str, float]:
        """The values themselves. Raises DivergedError, which names the value and the step, for NaN or infinity."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} is {value} at step {self.step} (epoch {self.epoch}): training has diverged. Nothing of it"
                    " is saved. Try a lower --learning-rate, --warmup-steps or --max-grad-norm 1."
                )
        return values
