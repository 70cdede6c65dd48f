"""Export a trained model to ONNX, for programs without PyTorch. Needs `pip install -e '.[onnx]'`.

mnist export --model runs/latest                        # runs/latest/model.onnx
differences = export_onnx(load("runs/latest"), Path("model.onnx"), data.test.images[:1000])

A model of a folder of images takes raw pixels of any size: `images`, uint8 [batch, height, width, 3], in gray [batch,
height, width]; resizing is part of the file (raw_pixels.py). Other models, and with `prepared` these too, take
`images`, float32 [batch, channels, height, width] in [0, 1]. Output: `probabilities`, float32 [batch, classes].
Metadata: `class_names` and `preprocessing`, both as JSON.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mnist.data.splits import FITS
from mnist.data.transforms import eval_batch_size, scale_pixels
from mnist.errors import UserError
from mnist.files import temporary_name, write_file
from mnist.inference.predict import Model, predict
from mnist.inference.raw_pixels import prepend_preparation

MAX_DIFFERENCE = 1e-4  # of a probability
MAX_RAW_DIFFERENCE = 0.03  # of images of another size: Pillow reduces large ones in two steps
RAW_IMAGES = 5
RAW_SHAPES = ((0.6, 0.9), (2.3, 1.7), (5.0, 6.2))  # width and height of those images, in sizes of the network's input
PREPARATIONS = {
    "digit": "bright ink on black, cropped to the ink, resized to fit 20 x 20, its center of mass moved to the center",
    "crop": "shorter side resized to the size, bicubic and antialiased, then center-cropped; colors as RGB",
    "pad": "longer side resized to the size, bicubic and antialiased, then padded by repeating edges; colors as RGB",
}


class Probabilities(nn.Module):
    """A network that returns probabilities instead of their logarithms."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.net(images).exp()
        return probabilities


class Differences(NamedTuple):
    """The largest differences between the probabilities of the file and of the original."""

    same_size: float  # images of the network's size
    other_sizes: float | None  # if the file takes raw pixels


def export_onnx(model: Model, path: Path, images: Tensor, prepared: bool = False) -> Differences:
    """Write the model to `path`, and compare it with the original.

    Compares on `images`, uint8 [N, height, width] or [N, height, width, 3]: the first alone, the others in batches; if
    the file takes raw pixels, also on the first few in other sizes. Raises UserError, and writes nothing, if a package
    is missing or a difference is above MAX_DIFFERENCE, for other sizes MAX_RAW_DIFFERENCE.
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
    is_raw = model.config.preparation in FITS and not prepared
    if is_raw:
        prepend_preparation(program.model, X.shape[-1], model.config.fit, color=X.shape[1] == 3)
    program.model.metadata_props.update(metadata(model, is_raw))
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
        check_difference(path, difference, MAX_DIFFERENCE, "another version of torch or onnxruntime")
        if is_raw:
            differences = [differences_of_sizes(session, model, image) for image in images[:RAW_IMAGES]]
            raw_difference = float(np.max(differences))  # NaN if one is
            check_difference(path, raw_difference, MAX_RAW_DIFFERENCE, "--prepared, which takes no raw pixels")
        found = Differences(difference, raw_difference if is_raw else None)
        if is_stream:
            write_file(path, (temporary / path.name).read_bytes())
            return found
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == path.name):  # the model itself last
            os.replace(file, path.with_name(file.name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def check_difference(path: Path, difference: float, limit: float, way_out: str) -> None:
    """Raise UserError, which suggests `way_out`, if the difference of probabilities is above the limit, or NaN."""
    if not difference <= limit:
        raise UserError(
            f"{path}: not written. The exported model's probabilities differ by up to {difference:.1e}, more than"
            f" {limit:.0e}. Try {way_out}."
        )


def differences_of_sizes(session: Any, model: Model, image: Tensor) -> list[float]:
    """The largest difference of a probability for each of RAW_SHAPES of an image, uint8 [height, width] or [..., 3].

    `session` is onnxruntime's.
    """
    picture, differences = Image.fromarray(image.numpy()), []
    for width, height in RAW_SHAPES:
        raw = picture.resize((round(width * picture.width), round(height * picture.height)), Image.Resampling.BICUBIC)
        expected = predict(model.net, model.prepare(raw).rows[0][0].pixels[None])
        differences.append(float((run(session, torch.from_numpy(np.array(raw))[None]) - expected).abs().max()))
    return differences


def run(session: Any, images: Tensor) -> Tensor:
    """The exported model's probabilities [N, classes] for uint8 images, computed by onnxruntime."""
    is_raw = session.get_inputs()[0].type == "tensor(uint8)"
    inputs = (images if is_raw else scale_pixels(images)).numpy()
    return torch.from_numpy(session.run(["probabilities"], {"images": inputs})[0])


def metadata(model: Model, is_raw: bool) -> dict[str, str]:
    """The metadata of the ONNX file."""
    config = model.config
    preprocessing: dict[str, Any] = {"layout": "NCHW", "shape": list(config.image_shape), "scale": "uint8 / 255"}
    if is_raw:
        shape = ["height", "width", 3] if config.channels == 3 else ["height", "width"]
        preprocessing = {"layout": "NHWC" if config.channels == 3 else "NHW", "shape": shape, "scale": "none"}
    if config.scale is not None:
        preprocessing["more_than_8_bits"] = {"to_0": config.scale[0], "to_255": config.scale[1]}
    preprocessing["image"] = "none, part of this file" if is_raw else PREPARATIONS.get(config.preparation, "none")
    return {
        "class_names": json.dumps(model.class_names),
        "preprocessing": json.dumps(preprocessing),
        "architecture": config.architecture,
        "dataset": config.dataset,
        "pretrained_weights": config.pretrained_weights,
    }
