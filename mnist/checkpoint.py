"""The trained model as something others can load: weights as safetensors beside a config.json that rebuilds it.

save_model(model, folder / "model", ModelConfig("mlp", ("0", "1", ...), (28, 28)))
model, config = load_model(folder / "model")
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mnist.data import ImageData
from mnist.errors import UserError
from mnist.models import build_model, non_finite_parameters


@dataclass(frozen=True)
class ModelConfig:
    """What is needed, besides the weights, to build the model again and to name its answers."""

    architecture: str
    class_names: tuple[str, ...]
    image_size: tuple[int, int]  # height, width in pixels
    dataset: str

    @classmethod
    def of(cls, architecture: str, data: ImageData) -> "ModelConfig":
        """The description of a model that was trained on `data`."""
        height, width = data.train.images.shape[1:]
        return cls(architecture, data.class_names, (height, width), data.name)


def save_model(model: nn.Module, folder: Path, config: ModelConfig) -> None:
    """Write model.safetensors and config.json, both or neither, replacing what `folder` held.

    Raises UserError for weights that are not finite: nothing is written then.
    """
    from safetensors.torch import save_file

    broken = non_finite_parameters(model)
    if broken:
        raise UserError(
            f"The weights {', '.join(broken)} hold NaN or infinity: not saved. Try a lower --learning-rate."
        )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir()
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    (temporary / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)


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
    )
    model = build_model(config.architecture, len(config.class_names))
    model.load_state_dict(weights)
    return model.eval(), config
