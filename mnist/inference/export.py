"""A trained model as an ONNX file, for programs without PyTorch: `pip install -e '.[onnx]'`.

mnist export --model runs/latest                        # runs/latest/model.onnx
largest = export_onnx(load("runs/latest"), Path("model.onnx"), data.test.images[:1000])

The file takes `images`, float32 [batch, channels, height, width] from 0 to 1, and gives `probabilities`, float32
[batch, classes]. Its metadata hold what else a program must know: `class_names` and `preprocessing`, both as JSON.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnist.data.transforms import eval_batch_size, scale_pixels
from mnist.errors import UserError
from mnist.files import temporary_name, write_file
from mnist.inference.predict import Model, predict

LARGEST_DIFFERENCE = 1e-4  # of a probability
DIGITS = (
    "bright ink on black, cropped to the ink, fitted into 20 x 20 with its proportions, its centre of mass moved to the"
    " middle"
)

FITTED = "the shorter side brought to the size, bicubic and antialiased, then cropped to the middle; colours as RGB"


class Probabilities(nn.Module):
    """A network whose answer is what people ask for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.net(images).exp()  # of log-probabilities
        return probabilities


def export_onnx(model: Model, path: Path, images: Tensor) -> float:
    """Write the model to `path` and return the largest difference between its probabilities and the original's.

    It is taken over `images`, uint8 [N, height, width] or [N, height, width, 3], one alone and the others in batches.
    Raises UserError, and writes nothing, where a package is missing or the difference is above LARGEST_DIFFERENCE.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"The package {error.name} is missing: pip install -e '.[onnx]'") from error

    X = scale_pixels(images[:2])  # [2, channels, height, width]
    program = torch.onnx.export(
        Probabilities(model.net).eval(),
        (X,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    program.model.metadata_props.update(metadata(model, tuple(X.shape[1:])))
    is_stream = path.exists() and not path.is_file()  # a pipe, or /dev/null
    path = path if is_stream else path.resolve()  # a link stays one: /dev/stdout is
    # a folder: large weights go into a second file, which the first one names
    temporary = Path(tempfile.mkdtemp()) if is_stream else temporary_name(path, "new")
    try:
        temporary.mkdir(exist_ok=True)
        program.save(str(temporary / path.name))
        session = onnxruntime.InferenceSession(temporary / path.name, providers=["CPUExecutionProvider"])
        expected = predict(model.net, images)
        found = torch.cat(
            [run(session, part) for part in (images[:1], *torch.split(images[1:], eval_batch_size(images.shape[1:])))]
        )
        difference = float((found - expected).abs().max())
        if not difference <= LARGEST_DIFFERENCE:  # also where it is no number
            raise UserError(
                f"{path}: not written. The exported model's probabilities differ by up to {difference:.1e} from the"
                f" original's, where {LARGEST_DIFFERENCE:.0e} is the most; another version of torch or onnxruntime may"
                " do better."
            )
        if is_stream:
            write_file(path, (temporary / path.name).read_bytes())
            return difference
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == path.name):  # the model itself last
            os.replace(file, path.with_name(file.name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def run(session: Any, images: Tensor) -> Tensor:
    """The probabilities [N, classes] that an exported model gives, in onnxruntime, for uint8 images."""
    return torch.from_numpy(session.run(["probabilities"], {"images": scale_pixels(images).numpy()})[0])


def metadata(model: Model, shape: tuple[int, ...]) -> dict[str, str]:
    """What stands in the file besides the network; `shape` is that of an image that it takes."""
    prepared = {"digit": DIGITS, "fit": FITTED}.get(model.config.preparation, "none")
    preprocessing = {"layout": "NCHW", "shape": list(shape), "scale": "uint8 / 255", "image": prepared}
    return {
        "class_names": json.dumps(model.class_names),
        "preprocessing": json.dumps(preprocessing),
        "architecture": model.config.architecture,
        "dataset": model.config.dataset,
    }
