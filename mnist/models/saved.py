"""Save and load a trained model: the weights in model.safetensors, the architecture in config.json.

save_model(model, folder / "model", ModelConfig("mlp", ("0", "1", ...), (28, 28), "mnist", preparation="digit"))
model, config = load_model(folder / "model")
"""

import dataclasses
import errno
import json
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnist.config.settings import MAX_IMAGE_SIZE
from mnist.data.splits import FITS, ImageData
from mnist.errors import ConfigError, UserError
from mnist.files import new_folder, read_text
from mnist.launch.streams import printable
from mnist.models.by_name import build_model
from mnist.models.networks import MODELS, non_finite_parameters

MAX_CLASSES = 100_000
MAX_HEADER = 1 << 20  # bytes of a model.safetensors, slow to parse; the largest networks need a fifth


@dataclass(frozen=True)
class ModelConfig:
    """Everything besides the weights that is needed to rebuild a model and name its predictions."""

    architecture: str
    class_names: tuple[str, ...]
    image_size: tuple[int, int]  # height, width in pixels
    dataset: str
    channels: int = 1  # 3 for images in color
    preparation: str = "none"  # of images: as in ImageData
    normalized: bool = False  # whether the weights include the mean and standard deviation (networks.Normalized)
    scale: tuple[float, float] | None = None  # if trained on images with more than 8 bits per pixel (images.Scale)
    temperature: float = 1.0  # by which log-probabilities are divided for predictions, but not for metrics
    threshold: float = 0.0  # a prediction is confident from this probability on
    pretrained_weights: str = ""  # those that training started from, and their license

    @classmethod
    def of(cls, architecture: str, data: ImageData) -> "ModelConfig":
        """The description of a model trained on `data`."""
        channels, height, width = data.image_shape
        normalized = data.normalization is not None and architecture in MODELS
        size = height, width
        return cls(architecture, data.class_names, size, data.name, channels, data.preparation, normalized, data.scale)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the model's input."""
        return (self.channels, *self.image_size)

    @property
    def fit(self) -> str:
        """How an image becomes square; one that has the size already is not changed."""
        return self.preparation if self.preparation in FITS else "crop"

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape of an image as uint8: height, width, and 3 in color."""
        return self.image_size if self.channels == 1 else (*self.image_size, self.channels)


def save_model(model: nn.Module, folder: Path, config: ModelConfig) -> None:
    """Replace the contents of `folder` atomically with model.safetensors and config.json.

    Raises UserError, and writes nothing, if weights are not finite.
    """
    check_finite(model)
    with new_folder(folder) as temporary:
        save_tensors(weights_of(model), temporary / "model.safetensors")
        save_json(dataclasses.asdict(config), temporary / "config.json")


def load_model(folder: str | os.PathLike[str]) -> tuple[nn.Module, ModelConfig]:
    """Load a model that `save_model` wrote, in evaluation mode, on the CPU.

    Raises UserError if `folder` contains none or its files are invalid.
    """
    folder = Path(folder)
    try:
        config = read_config(folder / "config.json")
        weights = read_weights(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no model here ({error.filename} is missing).") from error
    except OSError as error:
        raise UserError(f"{folder}: {error.filename} cannot be read: {error.strerror}.") from error
    # placeholders, replaced by the weights
    normalization = ([0.0] * config.channels, [1.0] * config.channels) if config.normalized else None
    shape = config.image_shape
    try:
        with _without_memory(config.architecture):  # config.json may request gigabytes
            model = build_model(config.architecture, len(config.class_names), shape, normalization=normalization)
    except ConfigError as error:
        raise UserError(f"{folder / 'config.json'}: {printable(str(error))}") from error
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    # copied, because loaded tensors are mapped from the file, which may be truncated later
    weights = {name: value.to(kinds.get(name, value.dtype), copy=True) for name, value in weights.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # lists every mismatch
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: model.safetensors does not match config.json: {problem}") from error
    if broken := non_finite_parameters(model):
        raise UserError(f"{folder}: the weights {', '.join(broken[:3])} contain NaN or infinity.")
    return model.eval(), config


def _without_memory(architecture: str) -> AbstractContextManager[Any]:
    """A context in which networks are built without allocating their weights."""
    if architecture in MODELS:
        return torch.device("meta")
    from accelerate import init_empty_weights  # torchvision's need real tensors while they are built

    return init_empty_weights()  # type: ignore[no-any-return]


def read_config(path: Path) -> ModelConfig:
    """Read a config.json. Raises UserError if it does not describe a model."""
    try:
        values = json.loads(read_text(_regular(path)))
        config = ModelConfig(
            architecture=_text(values["architecture"]),
            class_names=tuple(printable(_text(name)) for name in values["class_names"]),
            image_size=(_side(values["image_size"][0]), _side(values["image_size"][1])),
            dataset=printable(_text(values["dataset"])),
            channels={1: 1, 3: 3}[values.get("channels", 1)],  # missing in the first versions
            preparation=_preparation(values.get("preparation", "digit" if values["dataset"] == "mnist" else "none")),
            normalized=bool(values.get("normalized", False)),
            scale=_scale(values["scale"]) if values.get("scale") else None,
            temperature=_positive(values.get("temperature", 1.0)),
            threshold=_positive(values.get("threshold", 0.0), or_zero=True),
            pretrained_weights=printable(_text(values.get("pretrained_weights", ""))),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a valid model description ({printable(problem)[:200]}).") from error
    if not 1 <= len(config.class_names) <= MAX_CLASSES:
        raise UserError(f"{path}: {len(config.class_names):,} classes; must be 1 to {MAX_CLASSES:,}.")
    return config


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError if it is not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with _regular(path).open("rb") as file:
        start = file.read(100)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the weights. Run: git lfs pull")
    try:
        if (header := int.from_bytes(start[:8], "little")) > MAX_HEADER:
            raise ValueError(f"a header of {header:,} bytes")
        return load_file(path)
    except (SafetensorError, ValueError, RuntimeError, MemoryError) as error:  # RuntimeError: torch's, of a shape
        problem = f"truncated, or in another format: {error}" if start else "an empty file"
        raise UserError(f"{path}: not a safetensors file ({printable(problem)[:200]}). Download it again.") from error


def _regular(path: Path) -> Path:
    """The path itself. Raises OSError if reading it might never end, such as a pipe."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.50} is not a string")
    return value


def _preparation(value: Any) -> str:
    names = {name: name for name in ("digit", "none", *FITS)} | {"fit": "crop"}  # its name in the first versions
    if value not in names:
        raise ValueError(f"preparation {value!r:.50} is unknown")
    return names[value]


def _scale(value: Any) -> tuple[float, float]:
    low, high = float(value[0]), float(value[1])
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"a scale from {low} to {high}")
    return low, high


def _positive(value: Any, or_zero: bool = False) -> float:
    if not (0 < value < math.inf or (or_zero and value == 0)):
        raise ValueError(f"{value!r:.50} is not above 0")
    return float(value)


def _side(value: Any) -> int:
    # a limit to the memory that a small config.json can request
    if type(value) is not int or not 1 <= value <= MAX_IMAGE_SIZE:
        raise ValueError(f"a side of {value!r:.50} pixels; must be 1 to {MAX_IMAGE_SIZE:,}")
    return value


def check_finite(model: nn.Module) -> None:
    """Raise UserError with the names of weights that contain NaN or infinity."""
    if broken := non_finite_parameters(model):
        names = ", ".join(broken)
        raise UserError(f"The weights {names} contain NaN or infinity: not saved. Try a lower --learning-rate.")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save(dict(tensors), metadata={"format": "pt"}))


def save_json(values: Any, path: Path) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
