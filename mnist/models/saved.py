"""A trained model in files that others can load: model.safetensors, and config.json from which it is built again.

save_model(model, folder / "model", ModelConfig("mlp", ("0", "1", ...), (28, 28), "mnist", preparation="digit"))
model, config = load_model(folder / "model")
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mnist.data.loader import ImageData
from mnist.errors import UserError
from mnist.files import new_folder
from mnist.models.by_name import build_model
from mnist.models.networks import MODELS, non_finite_parameters


@dataclass(frozen=True)
class ModelConfig:
    """What is needed, besides the weights, to build the model again and to name its answers."""

    architecture: str
    class_names: tuple[str, ...]
    image_size: tuple[int, int]  # height, width in pixels
    dataset: str
    channels: int = 1  # 3 for images in colour
    preparation: str = "none"  # of a person's image: "digit" as MNIST's were, "fit" to the size, "none" if it has it
    normalized: bool = False  # whether mean and deviation of the images are among the weights (networks.Normalized)
    scale: tuple[float, float] | None = None  # of images of more than 8 bits per pixel, if it was trained on such

    @classmethod
    def of(cls, architecture: str, data: ImageData) -> "ModelConfig":
        """The description of a model that was trained on `data`."""
        height, width, *colours = data.train.images.shape[1:]
        channels = colours[0] if colours else 1
        normalized = data.normalization is not None and architecture in MODELS
        size = height, width
        return cls(architecture, data.class_names, size, data.name, channels, data.preparation, normalized, data.scale)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the model takes."""
        return (self.channels, *self.image_size)

    @property
    def pixels(self) -> tuple[int, ...]:
        """The same as pixels are kept: height and width, and in colour 3."""
        return self.image_size if self.channels == 1 else (*self.image_size, self.channels)


def save_model(model: nn.Module, folder: Path, config: ModelConfig) -> None:
    """Write model.safetensors and config.json, both or neither, replacing what `folder` held.

    Raises UserError for weights that are not finite: nothing is written then.
    """
    check_finite(model)
    with new_folder(folder) as temporary:
        save_tensors(weights_of(model), temporary / "model.safetensors")
        save_json(dataclasses.asdict(config), temporary / "config.json")


def load_model(folder: str | os.PathLike[str]) -> tuple[nn.Module, ModelConfig]:
    """Build the model that `save_model` wrote, in evaluation mode, on the CPU.

    Raises UserError where `folder` holds none.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no model here ({error.filename} is missing).") from error
    config = ModelConfig(
        architecture=values["architecture"],
        class_names=tuple(values["class_names"]),
        image_size=tuple(values["image_size"]),
        dataset=values["dataset"],
        channels=values.get("channels", 1),  # which the first versions did not write
        preparation=values.get("preparation", "digit" if values["dataset"] == "mnist" else "none"),
        normalized=values.get("normalized", False),
        scale=tuple(values["scale"]) if values.get("scale") else None,
    )
    # what it is filled with comes with the weights
    normalization = ([0.0] * config.channels, [1.0] * config.channels) if config.normalized else None
    shape = config.image_shape
    model = build_model(config.architecture, len(config.class_names), shape, normalization=normalization)
    model.load_state_dict(weights)
    return model.eval(), config


def check_finite(model: nn.Module) -> None:
    """Raise UserError, with their names, for weights that hold NaN or infinity."""
    if broken := non_finite_parameters(model):
        raise UserError(
            f"The weights {', '.join(broken)} hold NaN or infinity: not saved. Try a lower --learning-rate."
        )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save(dict(tensors), metadata={"format": "pt"}))


def save_json(values: Any, path: Path) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
