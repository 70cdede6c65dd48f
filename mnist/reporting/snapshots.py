"""What the last evaluation has seen, for people to look at: which class was taken for which, the surest mistakes, and
ten test images whose answers are followed through the training. It lies in the run's folder, evaluation.json.

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

from mnist.data.splits import ImageData
from mnist.files import write_file
from mnist.training.evaluate import Mistake, Result

MOST_CLASSES_SHOWN = 20  # in the confusion matrix; of more, those that are most confused, and all others as one
LARGEST_SIDE = 96  # pixels of a picture that is kept
OTHERS = "all others"


class Evaluation:
    """For the main process to write, and for all to carry its state."""

    def __init__(self, folder: Path, data: ImageData) -> None:
        """Of the test images of `data`."""
        self.path = folder / "evaluation.json"
        self.split = data.test
        self.class_names = data.class_names
        self.bright_on_black = data.preparation != "fit"  # as sets of MNIST's form: on paper they are shown dark
        self.examples = first_of_each_class(data.test.labels, count=10)
        self.history: list[dict[str, Any]] = []  # what the network made of the examples, an entry an evaluation

    @property
    def images(self) -> Tensor:
        """The examples, uint8 [10, height, width(, 3)]; fewer where there are fewer."""
        return self.split.images[self.examples]

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.history = state["history"]

    def update(self, position: Mapping[str, int], result: Result, answers: Tensor) -> None:
        """Write down an evaluation at `position`, step and epoch; `answers` are the examples' [10, classes]."""
        surest = answers.max(dim=1)
        seen = {"predictions": surest.indices.tolist(), "probabilities": surest.values.tolist()}
        self.history.append({**position, **seen})
        counts = result.confusion
        content = {
            **position,
            "class_names": self.class_names,
            "bright_on_black": self.bright_on_black,
            "images": counts.sum(dim=1).tolist(),
            "correct": counts.diagonal().tolist(),
            "confusion": cut(counts, self.class_names),
            "mistakes": [self._picture_of(mistake) for mistake in result.mistakes],
            "examples": [self._example(*both) for both in zip(self.examples.tolist(), answers, strict=True)],
            "history": self.history,
        }
        write_file(self.path, json.dumps(content, allow_nan=False) + "\n")

    def _picture_of(self, mistake: Mistake) -> dict[str, Any]:
        return mistake._asdict() | {"image": picture(self.split.images[mistake.place])}

    def _example(self, index: int, probabilities: Tensor) -> dict[str, Any]:
        likeliest = probabilities.topk(min(10, len(probabilities))).indices.sort().values
        return {
            "place": index,
            "truth": int(self.split.labels[index]),
            "likeliest": [[number, float(probabilities[number])] for number in likeliest.tolist()],
            "image": picture(self.split.images[index]),
        }


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Positions [count] of the first image of each of the first classes, then of those that come first at all."""
    first: dict[int, int] = {}
    for position, label in enumerate(labels.tolist()):
        first.setdefault(label, position)
    chosen = [first[label] for label in sorted(first)[:count]]
    rest = [position for position in range(min(len(labels), 2 * count)) if position not in chosen]
    return torch.tensor(chosen + rest[: count - len(chosen)])


def cut(counts: Tensor, class_names: Sequence[str], most: int = MOST_CLASSES_SHOWN) -> dict[str, Any]:
    """A confusion matrix [classes, classes] of at most `most` rows, with their names; its sum stays what it is.

    Of more classes, those that are most often confused stay, and the others are taken together as the last one: pairs
    of them that were confused stand on the diagonal then, where `within` says how many.
    """
    if len(counts) <= most:
        return {"names": list(class_names), "counts": counts.tolist(), "within": 0}
    confused = counts.sum(dim=0) + counts.sum(dim=1) - 2 * counts.diagonal()
    kept = confused.argsort(descending=True, stable=True)[: most - 1].sort().values
    place = torch.full((len(counts),), most - 1)
    place[kept] = torch.arange(most - 1)
    flat = place[:, None] * most + place[None, :]  # [classes, classes]
    small = torch.zeros(most * most, dtype=counts.dtype).index_add_(0, flat.flatten(), counts.flatten())
    others = counts[place == most - 1][:, place == most - 1]
    return {
        "names": [class_names[index] for index in kept.tolist()] + [OTHERS],
        "counts": small.view(most, most).tolist(),
        "within": int(others.sum() - others.trace()),
    }


def picture(image: Tensor) -> str:
    """An image, uint8 [height, width], as the address of a PNG that is all in the address itself; in colour, [height,
    width, 3], of a JPEG, a fifth as large.
    """
    small = Image.fromarray(image.numpy())
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer, kind = io.BytesIO(), "png" if image.dim() == 2 else "jpeg"
    small.save(buffer, format=kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
