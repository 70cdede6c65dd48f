"""evaluation.json in a run's folder: confusion matrix and most confident mistakes of the last evaluation, and
predictions for ten test images after every evaluation.

    evaluation = Evaluation(run.folder, data)
    evaluation.update({"step": 600, "epoch": 1}, result, predict(net, evaluation.images))
    Record.read(run.folder).evaluation["confusion"]["counts"]
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mnist.data.splits import FITS, ImageData
from mnist.files import write_file
from mnist.training.evaluate import Result

MAX_CLASSES_SHOWN = 20  # in the confusion matrix; if there are more, the least confused are merged
MAX_STORED_SIDE = 96  # pixels, of a stored image
OTHERS = "all others"


class Evaluation:
    """Collects evaluations of the test images. Only the main process writes; all processes have the state."""

    def __init__(self, folder: Path, data: ImageData) -> None:
        self.path = folder / "evaluation.json"
        self.split = data.test
        self.class_names = data.class_names
        self.bright_on_black = data.preparation not in FITS  # as in MNIST; such images are shown dark on white
        self.examples = first_of_each_class(data.test.labels, count=10)
        self.history: list[dict[str, Any]] = []  # predictions for the examples, one entry per evaluation

    @property
    def images(self) -> Tensor:
        """The examples, uint8 [10, height, width(, 3)]; fewer if the split has fewer."""
        return self.split.images[self.examples]

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]

    def update(self, position: Mapping[str, int], result: Result, answers: Tensor) -> None:
        """Write an evaluation at `position` (step, epoch); `answers` [10, classes] are the examples' probabilities."""
        probabilities, predictions = answers.max(dim=1)
        latest = {"predictions": predictions.tolist(), "probabilities": probabilities.tolist()}
        self.history.append({**position, **latest})
        counts = result.confusion
        content = {
            **position,
            "class_names": self.class_names,
            "bright_on_black": self.bright_on_black,
            "images": counts.sum(dim=1).tolist(),
            "correct": counts.diagonal().tolist(),
            "predicted": counts.sum(dim=0).tolist(),
            "bins": result.bins.tolist(),
            "confusion": cut(counts, self.class_names),
            "mistakes": [
                mistake._asdict() | {"image": picture(self.split.images[mistake.place])} for mistake in result.mistakes
            ],
            "examples": [self._example(*both) for both in zip(self.examples.tolist(), answers, strict=True)],
            "history": self.history,
        }
        write_file(self.path, json.dumps(content, allow_nan=False) + "\n")

    def _example(self, index: int, probabilities: Tensor) -> dict[str, Any]:
        likeliest = probabilities.topk(min(10, len(probabilities))).indices.sort().values
        return {
            "place": index,
            "truth": int(self.split.labels[index]),
            "likeliest": [[number, float(probabilities[number])] for number in likeliest.tolist()],
            "image": picture(self.split.images[index]),
        }


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Positions [count] of the first image of each class, then of other images, as many as `count` allows."""
    first: dict[int, int] = {}
    for position, label in enumerate(labels.tolist()):
        first.setdefault(label, position)
    chosen = [first[label] for label in sorted(first)[:count]]
    rest = [position for position in range(min(len(labels), 2 * count)) if position not in chosen]
    return torch.tensor(chosen + rest[: count - len(chosen)])


def cut(counts: Tensor, class_names: Sequence[str], most: int = MAX_CLASSES_SHOWN) -> dict[str, Any]:
    """A confusion matrix [classes, classes] reduced to at most `most` rows, with their names and the same sum.

    Keeps the most confused classes and merges the others into the last row and column. `within` counts errors among the
    merged classes, which land on the diagonal.
    """
    if len(counts) <= most:
        return {"names": list(class_names), "counts": counts.tolist(), "within": 0}
    confused = counts.sum(dim=0) + counts.sum(dim=1) - 2 * counts.diagonal()
    kept = confused.argsort(descending=True, stable=True)[: most - 1].sort().values
    new_index = torch.full((len(counts),), most - 1)
    new_index[kept] = torch.arange(most - 1)
    flat = new_index[:, None] * most + new_index[None, :]  # [classes, classes]
    small = torch.zeros(most * most, dtype=counts.dtype).index_add_(0, flat.flatten(), counts.flatten())
    others = counts[new_index == most - 1][:, new_index == most - 1]
    return {
        "names": [class_names[index] for index in kept.tolist()] + [OTHERS],
        "counts": small.view(most, most).tolist(),
        "within": int(others.sum() - others.trace()),
    }


def picture(image: Tensor) -> str:
    """A data URL of an image, uint8 [height, width] as PNG, [height, width, 3] as JPEG (a fifth of the size)."""
    small = Image.fromarray(image.numpy())
    small.thumbnail((MAX_STORED_SIDE, MAX_STORED_SIDE))
    buffer, kind = io.BytesIO(), "png" if image.dim() == 2 else "jpeg"
    small.save(buffer, format=kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
