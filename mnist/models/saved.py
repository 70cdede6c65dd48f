"""A trained model in files that others can load: model.safetensors, and config.json from which it is built again.

save_model(model, folder / "model", ModelConfig("mlp", ("0", "1", ...), (28, 28), "mnist", preparation="digit"))
model, config = load_model(folder / "model")
"""

import dataclasses
import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn

from mnist.data.splits import ImageData
from mnist.errors import ConfigError, UserError
from mnist.files import new_folder, read_text
from mnist.launch.streams import printable
from mnist.models.by_name import build_model
from mnist.models.networks import MODELS, non_finite_parameters

LARGEST_SIDE = 1024  # pixels, as of --image-size: what a small file can make large is bounded
MOST_CLASSES = 100_000
LARGEST_HEADER = 1 << 20  # bytes of a model.safetensors: the largest networks need a fifth of it, and it takes time


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

    Raises UserError where `folder` holds none, or files that are not those of one.
    """
    folder = Path(folder)
    try:
        config = read_config(folder / "config.json")
        weights = read_weights(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no model here ({error.filename} is missing).") from error
    except OSError as error:
        raise UserError(f"{folder}: {error.filename} cannot be read: {error.strerror}.") from error
    # what it is filled with comes with the weights
    normalization = ([0.0] * config.channels, [1.0] * config.channels) if config.normalized else None
    shape = config.image_shape
    try:
        with init_empty_weights():  # shapes alone: what config.json can ask for takes gigabytes
            model = build_model(config.architecture, len(config.class_names), shape, normalization=normalization)
    except ConfigError as error:
        raise UserError(f"{folder / 'config.json'}: {printable(str(error))}") from error
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    # copied: what is loaded lies in the file itself, which somebody may cut off
    weights = {name: value.to(kinds.get(name, value.dtype), copy=True) for name, value in weights.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # torch names all that does not fit
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: model.safetensors is not of the model in config.json: {problem}") from error
    if broken := non_finite_parameters(model):
        raise UserError(
            f"{folder}: the weights {', '.join(broken[:3])} hold NaN or infinity. Its answers would be none."
        )
    return model.eval(), config


def read_config(path: Path) -> ModelConfig:
    """The description of a model in a config.json; UserError for what is none."""
    try:
        values = json.loads(read_text(_regular(path)))
        config = ModelConfig(
            architecture=_text(values["architecture"]),
            class_names=tuple(printable(_text(name)) for name in values["class_names"]),
            image_size=(_side(values["image_size"][0]), _side(values["image_size"][1])),
            dataset=printable(_text(values["dataset"])),
            channels={1: 1, 3: 3}[values.get("channels", 1)],  # which the first versions did not write
            preparation=_text(values.get("preparation", "digit" if values["dataset"] == "mnist" else "none")),
            normalized=bool(values.get("normalized", False)),
            scale=_scale(values["scale"]) if values.get("scale") else None,
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not the description of a model ({printable(problem)[:200]}).") from error
    if not 1 <= len(config.class_names) <= MOST_CLASSES:
        raise UserError(f"{path}: {len(config.class_names):,} classes, where 1 to {MOST_CLASSES:,} can be.")
    return config


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError for what is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with _regular(path).open("rb") as file:
        start = file.read(100)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a pointer of Git LFS, not the weights. Fetch them: git lfs pull")
    try:
        if (header := int.from_bytes(start[:8], "little")) > LARGEST_HEADER:
            raise ValueError(f"a header of {header:,} bytes")
        return load_file(path)
    except (SafetensorError, ValueError, RuntimeError, MemoryError) as error:  # RuntimeError: torch's, of a shape
        problem = "an empty file" if not start else f"cut off, or another format: {error}"
        raise UserError(f"{path}: no safetensors ({printable(problem)[:200]}). Fetch it again.") from error


def _regular(path: Path) -> Path:
    """The path itself; OSError where it is no file that ends, as a pipe."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.50} is no text")
    return value


def _scale(value: Any) -> tuple[float, float]:
    low, high = float(value[0]), float(value[1])
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"a scale from {low} to {high}")
    return low, high


def _side(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST_SIDE:
        raise ValueError(f"a side of {value!r:.50} pixels, where 1 to {LARGEST_SIDE:,} can be")
    return value


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
