"""Sums and counts over batches, reduced over the processes before they are divided; padding never counts.

result = evaluate(model, test_batches, loss_function, accelerator)
print(result.loss, result.accuracy, result.confusion)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

MOST_CLASSES_LOGGED = 20  # with an accuracy of their own: more would flood every tracker


class Mistake(NamedTuple):
    """An image that was taken for another class than its own."""

    place: int  # of the image in its split
    truth: int
    prediction: int
    probability: float  # of the prediction
    second: int  # the class that the network holds for the next likely
    second_probability: float


@dataclass(frozen=True)
class Result:
    """What one set of weights makes of a set of images."""

    loss: float  # mean over the images
    confusion: Tensor  # int64 [classes, classes]: images of a class (row) by the class they were taken for (column)
    mistakes: tuple[Mistake, ...]  # those of which the network was surest, the surest first

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        """Share of the images whose likeliest class is the true one, from 0 to 1."""
        return self.correct / self.images

    def values(self, part: str, class_names: Sequence[str] = ()) -> dict[str, float]:
        """The figures as they are logged: `test/loss`, `test/accuracy`, and `test/class_accuracy/7` for each class.

        The classes are told apart out of sample only, where there are at most 20 and as far as they have images.
        """
        values = {f"{part}/loss": self.loss, f"{part}/accuracy": self.accuracy}
        if part != "train" and len(class_names) <= MOST_CLASSES_LOGGED:
            for number, name in enumerate(class_names):
                images = int(self.confusion[number].sum())
                if images > 0:
                    values[f"{part}/class_accuracy/{name}"] = int(self.confusion[number, number]) / images
        return values


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    loss_function: Callable[[Tensor, Tensor, Tensor], Tensor],
    accelerator: Accelerator,
    before_batch: Callable[[], Any] = lambda: None,
    mistakes: int = 0,
) -> Result:
    """Measure over all batches of all processes, in the order of the split; real images weigh 1, padding 0.

    Keeps so many mistakes at most. `before_batch` is called before each; what it raises cuts the evaluation short.
    """
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    loss = torch.zeros(1, dtype=exact, device=accelerator.device)
    confusion: Tensor | None = None  # [classes * classes]
    surest = Surest(mistakes)
    model.eval()
    for number, (X, y, weight) in enumerate(batches):
        before_batch()
        output = model(X)  # [B, classes] log-probabilities
        if confusion is None:
            confusion = torch.zeros(output.shape[1] ** 2, dtype=exact, device=accelerator.device)
        sure, prediction = output.max(dim=1)  # [B], [B]
        loss += loss_function(output, y, weight)
        confusion.index_add_(0, y * output.shape[1] + prediction, weight.to(exact))
        if mistakes:
            # data/loader.py: a batch of all processes is a range of the split, and each process has its slice of it
            first = (number * accelerator.num_processes + accelerator.process_index) * len(y)
            wrong = (prediction != y) & (weight > 0)
            surest.add(
                torch.arange(first, first + len(y), device=y.device), y, output, sure.masked_fill(~wrong, -torch.inf)
            )
    model.train()
    assert confusion is not None
    total, *counts = accelerator.reduce(torch.cat([loss, confusion])).tolist()
    table = torch.tensor(counts).round().long()
    classes = round(len(table) ** 0.5)
    found = sorted(gather_object(surest.list()), key=lambda it: (-it.probability, it.place)) if mistakes else []
    return Result(total / int(table.sum()), table.view(classes, classes), tuple(found[:mistakes]))


class Surest:
    """The mistakes of one process of which the network is surest, kept on the device until they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: tuple[Tensor, ...] = ()  # index [N], truth [N], output [N, classes], log-probability [N]

    def add(self, *batch: Tensor) -> None:
        """Index, truth, output and log-probability of the prediction of images; minus infinity where it is right."""
        joined = [torch.cat(parts) for parts in zip(self.kept, batch, strict=True)] if self.kept else list(batch)
        best = joined[-1].topk(min(self.count, len(joined[-1]))).indices
        self.kept = tuple(values[best] for values in joined)

    def list(self) -> "list[Mistake]":
        """All that are mistakes; `second` is the likeliest class but for the prediction."""
        if not self.kept:
            return []
        index, truth, output, sure = (values.cpu() for values in self.kept)
        probabilities = output.float().exp()
        prediction = output.argmax(dim=1)
        second = output.scatter(1, prediction[:, None], -torch.inf).argmax(dim=1)
        rows = torch.arange(len(index))
        columns = (
            *(index, truth, prediction, probabilities[rows, prediction]),
            *(second, probabilities[rows, second]),
        )
        found = zip(sure.tolist(), *(column.tolist() for column in columns), strict=True)
        return [Mistake(*mistake) for surety, *mistake in found if surety > -torch.inf]


class TrainingLoss:
    """The mean loss of the optimizer steps since it was last read, summed on the device and read seldom.

    `loss` is what `backward` is given, so its mean over the processes and over the batches of a window is the mean over
    the images of that optimizer step (data/loader.py says how the weights see to that).
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sum = torch.zeros((), device=accelerator.device)
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Of this process: the others have sums of their own."""
        return {"sum": float(self.sum), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError for less than no steps."""
        if state["steps"] < 0:
            raise ValueError(f"a loss of {state['steps']} steps")
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
