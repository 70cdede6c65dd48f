"""Build networks by name: the project's own, and torchvision's classification models.

model = build_model("mlp", num_classes=10)
model = build_model("resnet18", num_classes=3, image_shape=(3, 64, 64), pretrained=True)
log_probabilities = model(images)     # [batch, channels, height, width] in [0, 1] -> [batch, classes]
"""

import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from mnist.errors import ConfigError
from mnist.files import knows_locks
from mnist.models.networks import MODELS, ImageShape, Normalized


def check_batch(model: nn.Module, images: int, image_shape: ImageShape) -> None:
    """Raise ConfigError if one image per process would give a BatchNorm layer a single value per channel."""
    if images > 1:
        return
    try:
        with torch.random.fork_rng(), torch.no_grad():
            copy.deepcopy(model).train()(torch.zeros(1, *image_shape))
    except ValueError as error:
        raise ConfigError(
            f"--batch-size 1: this network has BatchNorm and needs at least 2 images per process ({error})."
        ) from error


INCEPTIONS = ("googlenet", "inception_v3")


class TorchvisionModel(nn.Module):
    """A torchvision classification model with a new last layer, for images with one or three channels.

    It normalizes images by the mean and standard deviation of the pretrained weights. For gray images, the first
    convolution sums the weights over the three colors, so its output equals that for a gray RGB image. Auxiliary heads
    are removed. Stochastic depth is off, because each process would draw other layers to skip.

    BatchNorm layers use the statistics of each process's share of a batch, including padding (real images with weight 0
    in the loss), so n processes do not end with exactly the weights of one. DistributedDataParallel broadcasts
    the running statistics, used in evaluation, from the first process.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, num_classes: int, image_shape: ImageShape, pretrained: bool = False) -> None:
        super().__init__()
        channels = image_shape[0]
        self.net, mean, std = _from_torchvision(name, image_shape, pretrained)
        layers = [(path, layer) for path, layer in self.net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        first = next(layer for _, layer in layers if isinstance(layer, nn.Conv2d))
        path, last = layers[-1]
        bias = last.bias is not None
        if isinstance(last, nn.Conv2d):  # SqueezeNet's, before global average pooling
            self.net.set_submodule(path, nn.Conv2d(last.in_channels, num_classes, 1, bias=bias))
        else:
            self.net.set_submodule(path, nn.Linear(last.in_features, num_classes, bias=bias))
        if channels == 1:
            first.weight, first.in_channels = nn.Parameter(first.weight.detach().sum(dim=1, keepdim=True)), 1
            mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
        self.register_buffer("mean", mean)  # saved with the weights
        self.register_buffer("std", std)
        self.last_layer = path
        self.trains_head_only = False

    def train(self, mode: bool = True) -> "TorchvisionModel":
        super().train(mode)
        if self.trains_head_only:
            self.net.eval().get_submodule(self.last_layer).train(mode)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Like torch's, but adds the layer versions that MNASNet needs and safetensors files lack."""
        state = self.state_dict()  # which has the versions
        for name in state.keys() - state_dict.keys():
            del state[name]
        state.update(state_dict)
        return super().load_state_dict(state, strict, assign)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.net((x - self.mean) / self.std), dim=1)


def describe_weights(name: str) -> str:
    """The pretrained weights of a torchvision model, and their license.

    According to torchvision's README, weights may have terms derived from the dataset they were trained on.
    """
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    terms = weights.meta.get("license", "none of its own (torchvision: BSD-3-Clause)")  # only SWAG's weights have one
    return f"{weights} of torchvision; license: {terms}; the terms of its training images (ImageNet-1K) may apply"


def choose_trained_layers(model: nn.Module, pretrained: str) -> None:
    """With --pretrained `head`, only the last layer is trained, and the others compute as in evaluation."""
    if pretrained == "head":
        assert isinstance(model, TorchvisionModel)  # settings.py refuses the others
        model.trains_head_only = True
        model.requires_grad_(False).net.get_submodule(model.last_layer).requires_grad_()
        model.train()


@contextmanager
def _weights_of(name: str) -> Iterator[Path]:
    """The file of the pretrained weights, in torch's cache; an error while loading them becomes a ConfigError."""
    from torchvision import models

    address = models.get_model_weights(name).DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(address).path).name
    try:
        yield file
    except (OSError, EOFError, RuntimeError, TypeError, AttributeError, KeyError, pickle.UnpicklingError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"--pretrained: the weights of {name} are not available ({problem}).\n"
            f"They are downloaded from {urlsplit(address).netloc}. Without a network, download {address} elsewhere and"
            f" save it as {file}\nIf that file is damaged, delete it."
            " To train without pretrained weights: --pretrained none"
        ) from error


def fetch_weights(name: str) -> None:
    """Download the pretrained weights, unless they are in torch's cache. Raises ConfigError if that fails.

    Of several processes, the first downloads and the others wait.
    """
    from torchvision import models

    with _weights_of(name) as file:
        if file.is_file():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")) if knows_locks(file.parent) else nullcontext():
            if not file.is_file():
                models.get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True)


def _from_torchvision(name: str, image_shape: ImageShape, pretrained: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """torchvision's model for RGB images, with the mean and standard deviation [3, 1, 1] of its training images.

    Raises ConfigError if pretrained weights are not available; torchvision raises ValueError or AssertionError for some
    image sizes.
    """
    from torchvision import models
    from torchvision.ops import StochasticDepth

    _, height, width = image_shape
    weights = models.get_model_weights(name).DEFAULT
    options: dict[str, object] = {}
    if name.startswith("vit_"):
        options["image_size"] = height
    elif name.startswith("maxvit_"):
        options["input_size"] = height, width
    elif name in INCEPTIONS:
        options["init_weights"] = not pretrained
    with _weights_of(name) if pretrained else nullcontext():
        net = models.get_model(name, weights=weights if pretrained else None, **options)
    for layer in net.modules():
        if isinstance(layer, StochasticDepth):
            layer.p = 0.0
    preset = weights.transforms()
    mean, std = preset.mean, preset.std
    if name in INCEPTIONS:  # TensorFlow's weights; the model's own transform_input handles only color
        net.aux_logits = net.transform_input = False
        net.aux1 = net.aux2 = net.AuxLogits = None
        mean = std = (0.5, 0.5, 0.5)
    return net, torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]


def build_model(
    name: str,
    num_classes: int,
    image_shape: ImageShape = (1, 28, 28),
    pretrained: bool = False,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    batch_size: int = 2,
) -> nn.Module:
    """The network called `name`, from MODELS or torchvision's classification models.

    New weights are drawn from torch's global generator. `pretrained` loads torchvision's weights, from its cache or
    server, for all but the last layer. `normalization`, the mean and standard deviation of each channel, is for the
    networks of MODELS; torchvision's have their own. `batch_size` is the number of images per process in training.
    Raises ConfigError for an unknown name, an unsupported image size, or weights that are not available.
    """
    if name in MODELS:
        if pretrained:
            raise ConfigError(f"--pretrained: {name} has no pretrained weights; only torchvision's models do.")
        net = MODELS[name](num_classes, image_shape)
        return net if normalization is None else Normalized(net, *normalization)
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError(f"--model {name}: neither {' nor '.join(MODELS)} nor one of torchvision's models.")
    try:
        model = TorchvisionModel(name, num_classes, image_shape, pretrained)
        device = next(model.parameters()).device  # "meta" inside models/saved.py: buffers must follow
        with torch.no_grad():
            model.to(device).eval()(torch.zeros(2, *image_shape, device=device))
    except ConfigError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        _, height, width = image_shape
        size = max(models.get_model_weights(name).DEFAULT.meta["min_size"])
        raise ConfigError(
            f"--model {name}: does not accept images of {width} x {height} pixels ({error}). Try --image-size {size}."
        ) from error
    check_batch(model, batch_size, image_shape)
    return model.train()
