"""The progress of a run: counts batches and optimizer steps, sums the loss and measures the time.

progress = Progress(accelerator, images=60_000, global_batch_size=10, total_steps=18_000)
for batch in progress.remaining(train_loader): ...; progress.update(loss)
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mnist.errors import DivergedError
from mnist.launch.hardware import peak_memory
from mnist.training.evaluate import TrainingLoss
from mnist.training.lean import LeanAccelerator


class Progress:
    """The step, epoch and batch of a run, the same on all processes; a step is an optimizer step of the whole job."""

    def __init__(self, accelerator: LeanAccelerator, images: int, global_batch_size: int, total_steps: int) -> None:
        """`images` is the number per epoch, `total_steps` the number of optimizer steps in the run."""
        self.accelerator = accelerator
        self.images_per_epoch = images
        self.global_batch_size = global_batch_size
        self.batches_per_epoch = -(-images // global_batch_size)
        self.total_steps = total_steps
        self.step = 0  # optimizer steps done
        self.epoch = 1  # the current one, counted from 1
        self.batch = 0  # batches of this epoch done
        self.seconds = 0.0  # of this epoch, until the clock last stopped
        self.started: float | None = None  # when the clock started, while it runs
        self.results: dict[str, Any] = {}  # of the last evaluation
        self.best: float | None = None  # validation loss
        self.is_best = False  # whether the last evaluation is the best
        self.loss = TrainingLoss(accelerator)

    def state_dict(self) -> dict[str, Any]:
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
        """Raises ValueError for a position that this run cannot have."""
        step, epoch, batch = (state[name] for name in ("step", "epoch", "batch"))
        possible = all(type(number) is int for number in (step, epoch, batch))
        possible = possible and 0 <= batch <= self.batches_per_epoch and epoch >= 1
        if not possible or step != (epoch - 1) * self.steps_per_epoch + self._windows(batch):
            raise ValueError(f"step {step!r} in epoch {epoch!r}, batch {batch!r} of {self.batches_per_epoch}")
        self.step, self.epoch, self.batch = step, epoch, batch
        self.seconds, self.results, self.best = state["seconds"], state["results"], state["best"]

    def _windows(self, batches: int) -> int:
        """Optimizer steps in this many batches; the last may accumulate fewer."""
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
        """Training images of this epoch so far, over all processes."""
        return min(self.batch * self.global_batch_size, self.images_per_epoch)

    @property
    def position(self) -> dict[str, int]:
        """The last step done, and its epoch."""
        return {"step": self.step, "epoch": self.epoch - (self.batch == 0 < self.step)}

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def evaluated(self) -> bool:
        """Whether the current weights have been evaluated."""
        return self.results.get("step") == self.step

    def epochs(self) -> Iterator[int]:
        """The remaining epochs, counted from 1; the first may be partly done."""
        while not (self.finished and self.evaluated):
            yield self.epoch

    def remaining(self, train_loader: Any) -> Iterator[Any]:
        """The remaining batches of this epoch from a prepared DataLoader; the clock runs meanwhile."""
        self.started = time.perf_counter()
        if not self.finished:
            skipped = self.accelerator.skip_first_batches(train_loader, self.batch) if self.batch else train_loader
            for batch in skipped:
                yield batch
                if self.finished:
                    break
        if self.accelerator.device.type != "cpu":  # on a CPU it would take memory of an unused GPU
            torch.accelerator.synchronize()
        self.seconds, self.started = self.elapsed(), None

    def elapsed(self) -> float:
        """Seconds of training in this epoch so far, without evaluation."""
        return self.seconds + (0.0 if self.started is None else time.perf_counter() - self.started)

    def update(self, loss: Tensor) -> None:
        """Count one batch, and the optimizer step if it completes one."""
        self.batch += 1
        self.loss.add(loss)
        self.step += self.accelerator.sync_gradients

    def performance(self) -> dict[str, float]:
        """Speed and memory of this epoch's training so far, by metric key."""
        return {
            "perf/images_per_second": self.images_done / self.seconds,
            "perf/epoch_seconds": self.seconds,
            "perf/peak_memory_mib": peak_memory(self.accelerator.device) / 2**20,
        }

    def end_epoch(self, results: dict[str, Any]) -> None:
        """Store the results of an evaluation, and move to the next epoch if this one is done."""
        self.results = results
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        loss = results.get("val/loss")
        self.is_best = loss is not None and (self.best is None or loss < self.best)
        if self.is_best:
            self.best = loss

    def finite(self, values: dict[str, float]) -> dict[str, float]:
        """Returns `values`. Raises DivergedError for NaN or infinity, with the metric and the step."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} is {value} at step {self.step} (epoch {self.epoch}): training has diverged. These weights"
                    " are not saved. Try a lower --learning-rate, --warmup-steps or --max-grad-norm 1."
                )
        return values
