"""How far training is: counts optimizer steps, watches the loss, and reports both every `log_every` steps."""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from mnist.errors import UserError
from mnist.metrics import TrainingLoss


class Display(Protocol):
    """What shows progress to a person (terminal.py)."""

    def start_epoch(self, epoch: int, steps: int) -> None: ...
    def step(self) -> None: ...
    def report(self, loss: float, images_per_second: float) -> None: ...
    def end_epoch(self) -> None: ...


class Progress:
    """The step and the epoch of a run, both counted from 1; a step is an optimizer step of the whole job."""

    def __init__(
        self,
        accelerator: Accelerator,
        display: Display,
        log: Callable[[dict[str, Any]], None],
        *,
        log_every: int,
        images_per_epoch: int,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self.accelerator = accelerator
        self.display = display
        self.log = log
        self.log_every = log_every
        self.images_per_epoch = images_per_epoch
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.step = 0
        self.epoch = 0
        self.loss = TrainingLoss(accelerator)

    @property
    def finished(self) -> bool:
        """Whether the last step of the run is done."""
        return self.step >= self.total_steps

    def start_epoch(self, epoch: int) -> None:
        """Start the clock and the bar of an epoch."""
        self.epoch = epoch
        self.first_step = self.step
        self.display.start_epoch(epoch, min(self.steps_per_epoch, self.total_steps - self.step))
        self.started = time.perf_counter()

    def update(self, loss: Tensor) -> None:
        """Take note of one batch; at the end of an optimizer step, and every `log_every` of them, of that too."""
        self.loss.add(loss)
        if self.accelerator.sync_gradients:
            self.step += 1
            self.display.step()
            if self.step % self.log_every == 0:
                value = self.finite(self.loss.read(), "training loss")
                self.log({"step": self.step, "epoch": self.epoch, "train/loss": value})
                self.display.report(value, self.images_per_second(time.perf_counter() - self.started))

    def end_epoch(self) -> dict[str, float]:
        """Stop the clock; where the run is, and what the epoch's training took, evaluation not counted."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - self.started
        self.display.end_epoch()
        return {
            "step": self.step,
            "epoch": self.epoch,
            "images_per_second": self.images_per_second(seconds),
            "epoch_seconds": seconds,
        }

    def images_per_second(self, seconds: float) -> float:
        """Training images of all processes over the seconds since the epoch's start."""
        return self.images_per_epoch * (self.step - self.first_step) / self.steps_per_epoch / seconds

    def finite(self, value: float, name: str) -> float:
        """The value itself; UserError, naming the step, where it is NaN or infinite."""
        if not math.isfinite(value):
            raise UserError(
                f"The {name} is {value} at step {self.step} (epoch {self.epoch}): training has diverged. Nothing of it"
                " is saved. Try a lower --learning-rate, --warmup-steps or --max-grad-norm 1."
            )
        return value
