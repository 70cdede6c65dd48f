"""Apply a trained model to images.

from mnist import load
model = load("runs/latest")           # a run, a folder with model.safetensors, user/name on the Hub, or "digits"
model.predict("seven.png").label      # a path, a PIL image, a NumPy array or a tensor; a list of them gives a list
model.predict("number.png").text      # "2026": several digits have no label, but a text
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mnist.data.transforms import eval_batch_size, scale_pixels
from mnist.errors import ConfigError, ImageError, UserError
from mnist.models.saved import ModelConfig, load_model

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are exclusive


LEAST = 0.45  # of the threshold for a confident prediction: below it, there is no digit
DIGITS = Path(__file__).parents[1] / "models" / "digits"  # its card says how it was made


class Digit(NamedTuple):
    """What the network is applied to: a digit that was found in an image, or the whole image."""

    pixels: Tensor  # uint8 [height, width] or [height, width, 3]
    box: Box  # in the image


class Found(NamedTuple):
    rows: list[list[Digit]]  # in reading order
    reason: str = ""  # why there are none
    on_paper: bool = False  # what was found may be a shadow


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or for one of the digits in it."""

    label: str | None  # a class name; None if no digit or several were found
    probability: float  # of the label; of several digits the lowest
    probabilities: dict[str, float]  # by class name, most likely first; empty if there is no label
    network_input: Tensor | None  # the prepared image, uint8 [height, width] or [height, width, 3]
    confident: bool = True  # False: probably not one of the classes
    box: Box | None = None  # in the image; None for several digits
    digits: "tuple[Prediction, ...]" = ()  # those found in the image, in reading order
    text: str = ""  # all labels in reading order, a line per row
    reason: str = ""  # why nothing was found


class Model:
    """A trained network and its description."""

    def __init__(self, net: nn.Module, config: ModelConfig) -> None:
        self.net = net.eval()
        self.config = config

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.config.class_names

    def predict(self, images: Any) -> Any:
        """The Prediction for an image, or a list of them for a list.

        An image is a path, a PIL image, a NumPy array or a tensor (uint8 or in [0, 1]; [height, width] or [height,
        width, 3]; several as [N, height, width]). It is prepared like the training images. Raises ImageError for a
        file that cannot be read, ValueError for an array of another shape.
        """
        is_array = isinstance(images, (np.ndarray, Tensor))
        stacked = is_array and (images.ndim == 4 or (images.ndim == 3 and images.shape[2] not in (3, 4)))
        several = stacked or isinstance(images, (list, tuple))
        found = [self.prepare(image) for image in (images if several else [images])]
        inputs = [digit.pixels for image in found for row in image.rows for digit in row]
        rows = iter(predict(self.net, torch.stack(inputs), self.config.temperature) if inputs else ())
        predictions = [self._prediction(image, rows) for image in found]
        return predictions if several else predictions[0]

    def prepare(self, image: Any) -> Found:
        """The network's inputs, uint8 [height, width] or [height, width, 3]: of the digits found, or of the image."""
        from mnist.data.images import Form, fit_image, in_8_bits, read_image

        scale = self.config.scale
        is_file = isinstance(image, (str, os.PathLike))
        picture = read_image(Path(image), scale=scale) if is_file else in_8_bits(as_picture(image), scale)
        if self.config.preparation == "digit":
            from mnist.inference.handwriting import find_digits

            return find_digits(picture)
        height, width = self.config.image_size
        if self.config.preparation == "none" and picture.size != (width, height):
            raise ImageError(  # resizing alone would not turn a photograph into a bright shape on black
                f"The image is {picture.width} x {picture.height} pixels, but this {self.config.dataset} model needs"
                f" {width} x {height}. Resize it to look like the training images."
            )
        form = Form(height, self.config.channels == 3, self.config.fit)
        pixels = torch.from_numpy(fit_image(picture, form))
        return Found([[Digit(pixels, (0, 0, *picture.size))]])

    def _prediction(self, found: Found, probabilities: Iterator[Tensor]) -> Prediction:
        """The prediction for an image; takes a row of probabilities per digit."""
        rows = [[self._named(next(probabilities), digit) for digit in row] for row in found.rows]
        digits = tuple(digit for row in rows for digit in row)
        # a shadow looks like no digit at all to the network
        least = LEAST * self.config.threshold if found.on_paper else 0
        if all(digit.probability < least for digit in digits):
            return Prediction(None, 0.0, {}, None, confident=False, reason=found.reason or "no digit found")
        if len(digits) == 1:
            return dataclasses.replace(digits[0], digits=digits, text=str(digits[0].label))
        text = "\n".join("".join(str(digit.label) for digit in row) for row in rows)
        lowest = min(digit.probability for digit in digits)
        return Prediction(None, lowest, {}, None, all(digit.confident for digit in digits), None, digits, text)

    def _named(self, probabilities: Tensor, digit: Digit) -> Prediction:
        order = probabilities.argsort(descending=True, stable=True).tolist()
        by_name = {self.class_names[number]: float(probabilities[number]) for number in order}
        label = self.class_names[order[0]]
        confident = by_name[label] >= self.config.threshold
        return Prediction(label, by_name[label], by_name, digit.pixels, confident, digit.box)


def as_picture(image: Any) -> "Image.Image":
    """Convert a NumPy array or a tensor to a PIL image. Raises ValueError for unsupported shapes or values."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    values = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if values.ndim == 3 and values.shape[0] == 1:  # [1, height, width]
        values = values[0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or 0 in values.shape:
        raise ValueError(f"an image of shape {list(values.shape)}: must be [height, width] or [height, width, 3].")
    if values.dtype == np.bool_ or (values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1):
        values = np.rint(values * 255.0)
    if values.dtype.kind not in "uif" or not (values.min() >= 0 and values.max() <= 255):
        raise ValueError(f"an image of {values.dtype} from {values.min()} to {values.max()}: must be in [0, 255].")
    return Image.fromarray(values.astype(np.uint8))


def find_model(source: str | os.PathLike[str]) -> Path | None:
    """The folder of the model that `source` names: of a run its best weights by validation loss, if any; or None.

    `digits` is the included model, unless a folder of that name contains another.
    """
    folder = Path(source)
    candidates = [folder, folder / "best", folder / "model", *([DIGITS] if str(source) == "digits" else [])]
    return next((candidate for candidate in candidates if (candidate / "model.safetensors").is_file()), None)


def load(source: str | os.PathLike[str]) -> Model:
    """The model of a run (its best weights by validation loss, if any), of a folder with model.safetensors and
    config.json, of user/name on the Hugging Face Hub, or the included one, `digits`. Raises UserError if there is none.
    """
    folder = Path(source)
    if found := find_model(source):
        return Model(*load_model(found))
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: this run has no model yet. It is saved when training ends.")
    if not folder.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        from mnist.models.hub import load_from_hub

        return Model(*load_from_hub(str(source)))
    raise ConfigError(f"--model {source}: no model found. Use a run, its model/ folder, user/name, or digits.")


@torch.no_grad()
def predict(net: nn.Module, images: Tensor, temperature: float = 1.0) -> Tensor:
    """The probabilities [N, classes] of images, uint8 [N, height, width] or [..., 3], computed on `net`'s device.

    A `temperature` above 1 brings them closer together (Guo et al., "On calibration of modern neural networks", 2017).
    """
    training, device = net.training, next(net.parameters()).device
    net.eval()
    batches = torch.split(images, eval_batch_size(images.shape[1:]))
    output = torch.cat([net(scale_pixels(batch).to(device)).cpu() for batch in batches])  # log-probabilities
    net.train(training)
    return (output / temperature).softmax(dim=1)
