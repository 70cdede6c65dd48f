"""Sums and counts over batches, reduced over the processes before they are divided; padding never counts.

result = evaluate(model, test_batches, loss_function, accelerator)
print(result.loss, result.accuracy)
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class Result(NamedTuple):
    """Loss and accuracy of one set of weights over a set of images."""

    loss: float  # mean over the images
    correct: int
    images: int

    @property
    def accuracy(self) -> float:
        """Share of the images whose likeliest class is the true one, from 0 to 1."""
        return self.correct / self.images


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    loss_function: Callable[[Tensor, Tensor, Tensor], Tensor],
    accelerator: Accelerator,
    before_batch: Callable[[], Any] = lambda: None,
) -> Result:
    """Loss and accuracy over all batches of all processes; the weights of real images are 1, of padding 0.

    `before_batch` is called before each; what it raises cuts the evaluation short.
    """
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    sums = torch.zeros(3, dtype=exact, device=accelerator.device)  # loss, correct, images
    model.eval()
    for X, y, weight in batches:
        before_batch()
        output = model(X)  # [B, classes]
        correct = (output.argmax(dim=1) == y).to(weight.dtype)
        sums += torch.stack([loss_function(output, y, weight), torch.dot(correct, weight), weight.sum()])
    model.train()
    loss, correct_images, images = accelerator.reduce(sums).tolist()
    return Result(loss / images, round(correct_images), round(images))


class TrainingLoss:
    """The mean loss of the optimizer steps since it was last read, summed on the device and read seldom.

    `loss` is what `backward` is given, so its mean over the processes and over the batches of a window is the mean over
    the images of that optimizer step (data.py says how the weights see to that).
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sum = torch.zeros((), device=accelerator.device)
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Of this process: the others have sums of their own."""
        return {"sum": float(self.sum), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.sum.fill_(state["sum"])
        self.steps = state["steps"]

    def add(self, loss: Tensor) -> None:
        """Add the loss of one batch."""
        self.sum += loss.detach()
        self.steps += self.accelerator.sync_gradients

    def read(self) -> float:
        """The mean over all processes since the last reading: the one place where training waits for the device."""
        mean = self.accelerator.reduce(self.sum, "mean") / self.accelerator.gradient_accumulation_steps
        value = float(mean) / max(1, self.steps)
        self.sum.zero_()
        self.steps = 0
        return value
