"""Apply a trained model to images.

from mnist import load
model = load("runs/latest")           # a run, a folder with model.safetensors, or user/name on the Hugging Face Hub
model.predict("seven.png").label      # a path, a PIL image, a NumPy array or a tensor; a list of them gives a list
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mnist.data.transforms import eval_batch_size, scale_pixels
from mnist.errors import ConfigError, ImageError, UserError
from mnist.models.saved import ModelConfig, load_model

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image."""

    label: str | None  # a class name; None if no digit was found
    probability: float  # of the label
    probabilities: dict[str, float]  # by class name, most likely first; empty if no digit was found
    network_input: Tensor | None  # the prepared image, uint8 [height, width] or [height, width, 3]


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
        predictions = self.predict_prepared([self.prepare(image) for image in (images if several else [images])])
        return predictions if several else predictions[0]

    def predict_prepared(self, images: Sequence[Tensor | None]) -> list[Prediction]:
        """The predictions for images returned by `prepare`."""
        found = [image for image in images if image is not None]
        rows = iter(predict(self.net, torch.stack(found)) if found else ())
        return [
            Prediction(None, 0.0, {}, None) if image is None else self._named(next(rows), image) for image in images
        ]

    def _named(self, probabilities: Tensor, image: Tensor) -> Prediction:
        order = probabilities.argsort(descending=True, stable=True).tolist()
        by_name = {self.class_names[number]: float(probabilities[number]) for number in order}
        label = self.class_names[order[0]]
        return Prediction(label, by_name[label], by_name, image)

    def prepare(self, image: Any) -> Tensor | None:
        """The network's input, uint8 [height, width] or [height, width, 3]; None if no digit was found."""
        from mnist.data.images import fit_image, in_8_bits, read_image

        scale = self.config.scale
        is_file = isinstance(image, (str, os.PathLike))
        picture = read_image(Path(image), scale=scale) if is_file else in_8_bits(as_picture(image), scale)
        if self.config.preparation == "digit":
            from mnist.inference.handwriting import prepare_digit

            return prepare_digit(picture)
        height, width = self.config.image_size
        if self.config.preparation == "none" and picture.size != (width, height):
            raise ImageError(  # resizing alone would not turn a photograph into a bright shape on black
                f"The image is {picture.width} x {picture.height} pixels, but this {self.config.dataset} model needs"
                f" {width} x {height}. Resize it to look like the training images."
            )
        return torch.from_numpy(fit_image(picture, height, self.config.channels == 3))


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


def load(source: str | os.PathLike[str]) -> Model:
    """The model of a run (its best weights by validation loss, if any), of a folder with model.safetensors and
    config.json, or of user/name on the Hugging Face Hub. Raises UserError if there is none.
    """
    folder = Path(source)
    for candidate in (folder, folder / "best", folder / "model"):
        if (candidate / "model.safetensors").is_file():
            return Model(*load_model(candidate))
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: this run has no model yet. It is saved when training ends.")
    if not folder.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        from mnist.models.hub import load_from_hub

        return Model(*load_from_hub(str(source)))
    raise ConfigError(f"--model {source}: no model found. Use a run (runs/latest), its model/ folder, or user/name.")


@torch.no_grad()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """The probabilities [N, classes] of images, uint8 [N, height, width] or [..., 3], computed on `net`'s device."""
    training, device = net.training, next(net.parameters()).device
    net.eval()
    batches = torch.split(images, eval_batch_size(images.shape[1:]))
    probabilities = torch.cat([net(scale_pixels(batch).to(device)).exp().cpu() for batch in batches])
    net.train(training)
    return probabilities
