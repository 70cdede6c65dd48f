"""How far training is: counts optimizer steps, watches the loss, and reports both every `log_every` steps."""

import math
import time
from collections.abc import Callable, Iterator
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
    """The step, the epoch and the batch of a run; a step is an optimizer step of the whole job.

    Its `state_dict` says where a run goes on, to the batch. All processes have the same.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        display: Display,
        log: Callable[[dict[str, Any]], None],
        log_every: int,
        batch_size: int,
        images: int,
        steps: int,
    ) -> None:
        """`batch_size` is that of all processes together, `images` are those of an epoch, `steps` those of the run."""
        self.accelerator = accelerator
        self.display = display
        self.log = log
        self.log_every = log_every
        self.batch_size = batch_size
        self.images_per_epoch = images
        self.batches_per_epoch = -(-images // batch_size)
        self.total_steps = steps
        self.step = 0  # optimizer steps that are done
        self.epoch = 1  # the one that goes on
        self.batch = 0  # batches of it that are done
        self.seconds = 0.0  # that they took, up to when the clock was last stopped
        self.started: float | None = None  # when the clock was started, while it runs
        self.results: dict[str, Any] = {}  # of the last evaluation
        self.best: float | None = None  # validation loss
        self.loss = TrainingLoss(accelerator)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and dicts of numbers."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "images_seen": (self.epoch - 1) * self.images_per_epoch + self.images(),
            "seconds": self.elapsed(),
            "results": self.results,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.seconds, self.results, self.best = state["seconds"], state["results"], state["best"]

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
        """Whether the weights of this very step were."""
        return self.results.get("step") == self.step

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, counted from 1, the first perhaps begun before."""
        while not (self.finished and self.evaluated):
            yield self.epoch

    def rest(self, batches: Any) -> Any:
        """The batches of the epoch that are left, of the DataLoader that Accelerate has prepared."""
        done = self.batches_per_epoch if self.finished else self.batch
        return self.accelerator.skip_first_batches(batches, done) if done else batches

    def start_epoch(self) -> None:
        """Start the clock and the bar of an epoch, or of what is left of it."""
        window = self.accelerator.gradient_accumulation_steps
        left = -(-self.batches_per_epoch // window) - -(-self.batch // window)
        self.display.start_epoch(self.epoch, max(0, min(left, self.total_steps - self.step)))
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds that training took in this epoch so far, evaluation not counted."""
        return self.seconds + (0.0 if self.started is None else time.perf_counter() - self.started)

    def images(self) -> int:
        """Training images of all processes in this epoch so far."""
        return min(self.batch * self.batch_size, self.images_per_epoch)

    def update(self, loss: Tensor) -> None:
        """Take note of one batch; at the end of an optimizer step, and every `log_every` of them, of that too."""
        self.batch += 1
        self.loss.add(loss)
        if self.accelerator.sync_gradients:
            self.step += 1
            self.display.step()
            if self.step % self.log_every == 0:
                value = self.finite(self.loss.read(), "training loss")
                self.log({"step": self.step, "epoch": self.epoch, "train/loss": value})
                self.display.report(value, self.images() / self.elapsed())

    def end_epoch(self) -> dict[str, float]:
        """Stop the clock; where the run is, and what the epoch's training took, evaluation not counted."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds, self.started = self.elapsed(), None
        self.display.end_epoch()
        return {
            "step": self.step,
            "epoch": self.epoch,
            "images_per_second": self.images() / self.seconds,
            "epoch_seconds": self.seconds,
        }

    def end_evaluation(self, results: dict[str, Any]) -> bool:
        """Go on to the next epoch, if this one is over; whether these are the best weights by the validation loss."""
        self.results = results
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        loss = results.get("val/loss")
        is_best = loss is not None and (self.best is None or loss < self.best)
        if is_best:
            self.best = loss
        return is_best

    def finite(self, value: float, name: str) -> float:
        """The value itself; UserError, naming the step, where it is NaN or infinite."""
        if not math.isfinite(value):
            raise UserError(
                f"The {name} is {value} at step {self.step} (epoch {self.epoch}): training has diverged. Nothing of it"
                " is saved. Try a lower --learning-rate, --warmup-steps or --max-grad-norm 1."
            )
        return value
