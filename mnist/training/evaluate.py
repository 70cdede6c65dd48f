"""Loss, accuracy and confusion matrix: sums and counts, reduced over processes before dividing; padding never counts.

results = evaluate(model, eval_loaders, loss_function, accelerator)
results["test"].loss, results["test"].accuracy, results["test"].confusion
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mnist.training.calibration import Calibration, Calibrator
from mnist.training.figures import BINS, LEAST_CLASSES, add_to_bins, calibration_error, count_in_top, per_class
from mnist.training.lean import LeanAccelerator

MISTAKES = 40  # kept of the test split
MAX_CLASSES_LOGGED = 20  # with their own accuracy: more would flood the trackers


class Mistake(NamedTuple):
    """A misclassified image."""

    place: int  # of the image in its split
    truth: int
    prediction: int
    probability: float  # of the prediction
    second: int  # the second most likely class
    second_probability: float


@dataclass(frozen=True)
class Result:
    """The evaluation of one split."""

    loss: float  # mean over the images
    confusion: Tensor  # int64 [classes, classes]: count of images by true class (row) and prediction (column)
    bins: Tensor  # float64 [BINS, 3] by confidence: images, sum of confidences, correct ones (figures.py)
    in_top: int  # images whose class is among the five most likely
    mistakes: tuple[Mistake, ...] = ()  # of the test split: the most confident ones, in order
    calibration: Calibration | None = None  # from the val split, if it is large enough

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        """Fraction of images classified correctly, 0 to 1."""
        return self.correct / self.images

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that occur or are predicted, 0 to 1."""
        return float(per_class(self.confusion).f1.nanmean())

    @property
    def balanced_accuracy(self) -> float:
        """Mean accuracy of the classes that have images, 0 to 1."""
        return float(per_class(self.confusion).recall.nanmean())

    def figures(self) -> dict[str, float]:
        """Macro F1, balanced accuracy, expected calibration error and, from six classes on, top-5 accuracy."""
        figures = {"macro_f1": self.macro_f1, "balanced_accuracy": self.balanced_accuracy}
        if len(self.confusion) >= LEAST_CLASSES:
            figures["top5_accuracy"] = self.in_top / self.images
        return figures | {"calibration_error": calibration_error(self.bins)}

    def values(self, split: str, class_names: Sequence[str] = ()) -> dict[str, float]:
        """The logged metrics: `test/loss`, `test/accuracy`, `figures`, and `test/class_accuracy/7` for each class.

        Figures and accuracy per class are only for val and test; the latter if there are at most 20 classes, and for
        classes with images. Of val also `val/temperature` and `val/threshold` (calibration.py).
        """
        values = {f"{split}/loss": self.loss, f"{split}/accuracy": self.accuracy}
        if split != "train":
            values |= {f"{split}/{name}": value for name, value in self.figures().items()}
        if self.calibration is not None:
            values |= {f"{split}/{name}": value for name, value in self.calibration._asdict().items()}
        if split != "train" and len(class_names) <= MAX_CLASSES_LOGGED:
            for number, name in enumerate(class_names):
                images = int(self.confusion[number].sum())
                if images > 0:
                    values[f"{split}/class_accuracy/{name}"] = int(self.confusion[number, number]) / images
        return values


def evaluate(
    model: nn.Module,
    eval_loaders: Mapping[str, Iterable[tuple[Tensor, Tensor, Tensor]]],
    loss_function: Callable[[Tensor, Tensor, Tensor], Tensor],
    accelerator: Accelerator,
    before_batch: Callable[[], Any] = lambda: None,
) -> dict[str, Result]:
    """Measure each split over all batches of all processes; real images count 1, padding 0.

    Keeps the most confident mistakes of the test split, and calibrates probabilities by the val split. `before_batch`
    may raise to stop the evaluation.
    """
    return {
        split: evaluate_split(model, loader, loss_function, accelerator, before_batch, split)
        for split, loader in eval_loaders.items()
    }


@torch.no_grad()
def evaluate_split(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],
    loss_function: Callable[[Tensor, Tensor, Tensor], Tensor],
    accelerator: Accelerator,
    before_batch: Callable[[], Any] = lambda: None,
    split: str = "",
) -> Result:
    """Measure one split, whose batches come in order."""
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    loss = torch.zeros(1, dtype=exact, device=accelerator.device)
    confusion: Tensor | None = None  # [classes * classes]
    bins, in_top = loss.new_zeros(BINS, 3), loss.new_zeros(1)
    most_confident = MostConfident(MISTAKES)
    calibrator = Calibrator(accelerator.device, exact) if split == "val" else None
    model.eval()
    for number, (X, y, sample_weight) in enumerate(loader):
        before_batch()
        output = model(X)  # [B, classes] log-probabilities
        if confusion is None:
            confusion = torch.zeros(output.shape[1] ** 2, dtype=exact, device=accelerator.device)
        confidence, prediction = output.max(dim=1)  # [B], [B]
        loss += loss_function(output, y, sample_weight)
        confusion.index_add_(0, y * output.shape[1] + prediction, sample_weight.to(exact))
        add_to_bins(bins, confidence.exp(), prediction == y, sample_weight)
        in_top += count_in_top(output, y, sample_weight)
        if calibrator is not None:
            calibrator.add(output, y, sample_weight)
        if split == "test":
            # data/loader.py: a global batch is a range of the split, and each process has a slice of it
            first = (number * accelerator.num_processes + accelerator.process_index) * len(y)
            index = torch.arange(first, first + len(y), device=y.device)
            wrong = (prediction != y) & (sample_weight > 0)
            most_confident.add(index, y, output, confidence.masked_fill(~wrong, -torch.inf))
    model.train()
    assert confusion is not None
    sums = accelerator.reduce(torch.cat([loss, in_top, bins.flatten(), confusion])).cpu()
    total, in_top, bins, confusion = torch.split(sums, [1, 1, bins.numel(), len(confusion)])
    table = confusion.round().long()
    classes = round(len(table) ** 0.5)
    mistakes = gather_object(most_confident.list()) if split == "test" else []
    mistakes.sort(key=lambda mistake: (-mistake.probability, mistake.place))
    calibration = None if calibrator is None else calibrator.result(accelerator.reduce(calibrator.sums))
    loss_per_image = float(total) / int(table.sum())
    sums_of_bins = bins.view(BINS, 3).double()
    counts = table.view(classes, classes), sums_of_bins, round(float(in_top))
    return Result(loss_per_image, *counts, tuple(mistakes[:MISTAKES]), calibration)


class MostConfident:
    """The most confident mistakes of one process, kept on the device."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: tuple[Tensor, ...] = ()  # index [N], truth [N], output [N, classes], log-probability [N]

    def add(self, *batch: Tensor) -> None:
        """Index, true class, output and log-probability of the prediction; minus infinity if it is correct."""
        merged = [torch.cat(parts) for parts in zip(self.kept, batch, strict=True)] if self.kept else list(batch)
        best = merged[-1].topk(min(self.count, len(merged[-1]))).indices
        self.kept = tuple(values[best] for values in merged)

    def list(self) -> "list[Mistake]":
        if not self.kept:
            return []
        index, truth, output, confidence = (values.cpu() for values in self.kept)
        probabilities = output.float().exp()
        prediction = output.argmax(dim=1)
        second = output.scatter(1, prediction[:, None], -torch.inf).argmax(dim=1)
        rows = torch.arange(len(index))
        first = (index, truth, prediction, probabilities[rows, prediction])
        columns = (confidence, *first, second, probabilities[rows, second])
        mistakes = zip(*(column.tolist() for column in columns), strict=True)
        return [Mistake(*mistake) for confidence, *mistake in mistakes if confidence > -torch.inf]


class TrainingLoss:
    """The mean loss of the optimizer steps since it was last read, summed on the device.

    sample_weight (data/loader.py) makes the mean of `loss` over processes and accumulated batches the mean over the
    images of an optimizer step.
    """

    def __init__(self, accelerator: LeanAccelerator) -> None:
        self.accelerator = accelerator
        total = None if accelerator.captured is None else accelerator.captured.total
        self.is_summed = total is not None  # by the CUDA graph
        self.sum = torch.zeros((), device=accelerator.device) if total is None else total
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The state of this process; the others have their own sums."""
        return {"sum": float(self.sum), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a negative number of steps."""
        if state["steps"] < 0:
            raise ValueError(f"a loss of {state['steps']} steps")
        self.sum.fill_(state["sum"])
        self.steps = state["steps"]

    def add(self, loss: Tensor) -> None:
        if not self.is_summed:
            self.sum += loss.detach()
        self.steps += self.accelerator.sync_gradients

    def read(self) -> float:
        """The mean over all processes since the last call. It waits for the device, so call it only to log."""
        mean = self.accelerator.reduce(self.sum, "mean") / self.accelerator.gradient_accumulation_steps
        value = float(mean) / max(1, self.steps)
        self.sum.zero_()
        self.steps = 0
        return value
