"""How far training is: counts optimizer steps, watches the loss, and reports both every `log_every` steps."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from mnist.errors import DivergedError
from mnist.launch.hardware import peak_memory
from mnist.training.evaluate import TrainingLoss


class Display(Protocol):
    """What shows progress to a person (reporting/terminal.py)."""

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
        scheduler: LRScheduler,
        log_every: int,
        batch_size: int,
        images: int,
        steps: int,
    ) -> None:
        """`batch_size` is that of all processes together, `images` are those of an epoch, `steps` those of the run."""
        self.accelerator = accelerator
        self.display = display
        self.log = log
        self.scheduler = scheduler
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
        self.is_best = False  # whether the last evaluation's is
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
        """Go on where `state_dict` was taken. Raises ValueError for a place that this run cannot be at."""
        step, epoch, batch = state["step"], state["epoch"], state["batch"]
        window = self.accelerator.gradient_accumulation_steps
        steps_per_epoch = -(-self.batches_per_epoch // window)
        if not all(type(it) is int for it in (step, epoch, batch)):
            raise ValueError(f"step {step!r}, epoch {epoch!r}, batch {batch!r}")
        if not 0 <= batch <= self.batches_per_epoch or epoch < 1:
            raise ValueError(f"epoch {epoch}, batch {batch:,} of {self.batches_per_epoch:,}")
        if step != (epoch - 1) * steps_per_epoch + -(-batch // window):
            raise ValueError(f"step {step:,} in epoch {epoch}, batch {batch:,}")
        self.step, self.epoch, self.batch = step, epoch, batch
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
    def logs_this_step(self) -> bool:
        """Whether the optimizer step that is being made will be logged."""
        return (self.step + 1) % self.log_every == 0

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

    def update(self, loss: Tensor, gradient_norm: Tensor | None) -> None:
        """Take note of one batch; at the end of an optimizer step, and every `log_every` of them, of that too."""
        self.batch += 1
        self.loss.add(loss)
        if self.accelerator.sync_gradients:
            self.step += 1
            self.display.step()
            if self.step % self.log_every == 0:
                values = self.finite({"train/loss": self.loss.read()}) | self._learning(gradient_norm)
                self.log({"step": self.step, "epoch": self.epoch, **values})
                self.display.report(values["train/loss"], self.images() / self.elapsed())

    def _learning(self, gradient_norm: Tensor | None = None) -> dict[str, float]:
        """The learning rate of the next step, and the length of the last one's gradient before it was clipped."""
        values = {"optim/learning_rate": float(self.scheduler.get_last_lr()[0])}
        norm = math.nan if gradient_norm is None else float(gradient_norm)
        if math.isfinite(norm):  # fp16 leaves a step out where it is infinite
            values["optim/gradient_norm"] = norm
        return values

    def end_epoch(self) -> dict[str, float]:
        """Stop the clock, start that of the evaluation; where the run is, and what the epoch's training took."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds, self.started = self.elapsed(), None
        self.display.end_epoch()
        self.evaluating_since = time.perf_counter()
        return {
            "step": self.step,
            "epoch": self.epoch,
            **self._learning(),
            "perf/images_per_second": self.images() / self.seconds,
            "perf/epoch_seconds": self.seconds,
            "perf/peak_memory_mib": peak_memory(self.accelerator.device) / 2**20,
        }

    def end_evaluation(self, results: dict[str, Any]) -> dict[str, Any]:
        """The results, and how long they took to get; goes on to the next epoch, if this one is over.

        `is_best` says whether these are the best weights by the validation loss.
        """
        self.results = results | {"perf/evaluation_seconds": time.perf_counter() - self.evaluating_since}
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        loss = results.get("val/loss")
        self.is_best = loss is not None and (self.best is None or loss < self.best)
        if self.is_best:
            self.best = loss
        return self.results

    def finite(self, values: dict[str, float]) -> dict[str, float]:
        """The values themselves; DivergedError, naming one and the step, where it is NaN or infinite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} is {value} at step {self.step} (epoch {self.epoch}): training has diverged. Nothing of it"
                    " is saved. Try a lower --learning-rate, --warmup-steps or --max-grad-norm 1."
                )
        return values
