"""Export a trained model to ONNX, for programs without PyTorch. Needs `pip install -e '.[onnx]'`.

mnist export --model runs/latest                        # runs/latest/model.onnx
largest = export_onnx(load("runs/latest"), Path("model.onnx"), data.test.images[:1000])

Input: `images`, float32 [batch, channels, height, width] in [0, 1]. Output: `probabilities`, float32 [batch, classes].
Metadata: `class_names` and `preprocessing`, both as JSON.
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

MAX_DIFFERENCE = 1e-4  # of a probability
DIGIT = "bright ink on black, cropped to the ink, resized to fit 20 x 20, its center of mass moved to the center"
FIT = "shorter side resized to the size, bicubic and antialiased, then center-cropped; colors as RGB"


class Probabilities(nn.Module):
    """A network that returns probabilities instead of their logarithms."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.net(images).exp()
        return probabilities


def export_onnx(model: Model, path: Path, images: Tensor) -> float:
    """Write the model to `path`. Returns the largest difference between its probabilities and those of the original.

    Compares on `images`, uint8 [N, height, width] or [N, height, width, 3]: the first alone, the others in batches.
    Raises UserError, and writes nothing, if a package is missing or the difference is above MAX_DIFFERENCE.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"{error.name} is not installed. Run: pip install -e '.[onnx]'") from error

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
    path = path if is_stream else path.resolve()  # do not replace a link such as /dev/stdout
    # a folder, because large weights go into a second file, to which the first one refers by name
    temporary = Path(tempfile.mkdtemp()) if is_stream else temporary_name(path, "new")
    try:
        temporary.mkdir(exist_ok=True)
        program.save(str(temporary / path.name))
        session = onnxruntime.InferenceSession(temporary / path.name, providers=["CPUExecutionProvider"])
        batches = images[:1], *torch.split(images[1:], eval_batch_size(images.shape[1:]))
        exported = torch.cat([run(session, batch) for batch in batches])
        difference = float((exported - predict(model.net, images)).abs().max())
        if not difference <= MAX_DIFFERENCE:  # or NaN
            raise UserError(
                f"{path}: not written. The exported model's probabilities differ by up to {difference:.1e}, more than"
                f" {MAX_DIFFERENCE:.0e}. Try another version of torch or onnxruntime."
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
    """The exported model's probabilities [N, classes] for uint8 images, computed by onnxruntime."""
    return torch.from_numpy(session.run(["probabilities"], {"images": scale_pixels(images).numpy()})[0])


def metadata(model: Model, shape: tuple[int, ...]) -> dict[str, str]:
    """The metadata of the ONNX file; `shape` is channels, height and width."""
    prepared = {"digit": DIGIT, "fit": FIT}.get(model.config.preparation, "none")
    preprocessing = {"layout": "NCHW", "shape": list(shape), "scale": "uint8 / 255", "image": prepared}
    return {
        "class_names": json.dumps(model.class_names),
        "preprocessing": json.dumps(preprocessing),
        "architecture": model.config.architecture,
        "dataset": model.config.dataset,
    }
