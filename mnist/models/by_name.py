"""Networks by name: the project's own, and the classification models of torchvision.

model = build_model("mlp", num_classes=10)
model = build_model("resnet18", num_classes=3, image_shape=(3, 64, 64), pretrained=True)
log_probabilities = model(images)     # [batch, channels, height, width] in [0, 1] -> [batch, classes]
"""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist.errors import ConfigError, UserError
from mnist.models.networks import MODELS, ImageShape, Normalized


def check_batch(model: nn.Module, images: int, image_shape: ImageShape) -> None:
    """Raise ConfigError where a process takes one image at a time, and a BatchNorm has one value of each channel."""
    if images > 1:
        return
    try:
        with torch.random.fork_rng(), torch.no_grad():
            copy.deepcopy(model).train()(torch.zeros(1, *image_shape))
    except ValueError as error:
        raise ConfigError(
            f"--batch-size 1: this network has BatchNorm, and needs two images per process or more ({error})."
        ) from error


INCEPTIONS = ("googlenet", "inception_v3")


class TorchvisionModel(nn.Module):
    """A classification model of torchvision's, with a new last layer, for images of one or three channels.

    Images are normalised in here, by the mean and the deviation that the pretrained weights were made with. The first
    convolution of a model for grey images has the sum of the weights of the three colours: it answers as the one in
    colour would to a grey picture. Auxiliary heads are left away.

    Many of these models have BatchNorm. In training it takes the statistics of a process's own share of a batch, so n
    processes do not train to exactly the weights of one, and a share of one image is refused by torch where the last
    map is a single pixel. Images that fill up the last batch take part in them: they weigh nothing in the loss, but are
    real ones. The running statistics, those of evaluation, are alike in all processes: DistributedDataParallel sends
    them out from the first one.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, num_classes: int, image_shape: ImageShape, pretrained: bool = False) -> None:
        super().__init__()
        channels = image_shape[0]
        self.net, mean, std = _from_torchvision(name, image_shape, pretrained)
        layers = [(path, it) for path, it in self.net.named_modules() if isinstance(it, (nn.Conv2d, nn.Linear))]
        first = next(it for _, it in layers if isinstance(it, nn.Conv2d))
        path, last = layers[-1]
        bias = last.bias is not None
        if isinstance(last, nn.Conv2d):  # SqueezeNet's, before the mean over all places
            self.net.set_submodule(path, nn.Conv2d(last.in_channels, num_classes, 1, bias=bias))
        else:
            self.net.set_submodule(path, nn.Linear(last.in_features, num_classes, bias=bias))
        if channels == 1:
            first.weight, first.in_channels = nn.Parameter(first.weight.detach().sum(dim=1, keepdim=True)), 1
            mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
        self.register_buffer("mean", mean)  # saved with the weights, which are of no use without them
        self.register_buffer("std", std)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, also without the versions of the layers, which MNASNet needs and a file of tensors has not."""
        state = OrderedDict(state_dict)
        state._metadata = self.state_dict()._metadata  # type: ignore[attr-defined]
        return super().load_state_dict(state, strict, assign)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.net((x - self.mean) / self.std), dim=1)


def _from_torchvision(name: str, image_shape: ImageShape, pretrained: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The model as torchvision builds it, for images in colour; mean and deviation [3, 1, 1] of what it was made for.

    Raises UserError where pretrained weights cannot be had; ValueError or AssertionError, as torchvision does, for a
    size that is not that of the weights or no multiple of what it must be.
    """
    from torchvision import models

    _, height, width = image_shape
    weights = models.get_model_weights(name).DEFAULT
    options: dict[str, object] = {}
    if name.startswith("vit_"):
        options["image_size"] = height
    elif name.startswith("maxvit_"):
        options["input_size"] = height, width
    elif name in INCEPTIONS:
        options["init_weights"] = not pretrained
    try:
        net = models.get_model(name, weights=weights if pretrained else None, **options)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        if not pretrained:
            raise
        folder, address = Path(torch.hub.get_dir()) / "checkpoints", urlsplit(weights.url)
        file = folder / Path(address.path).name
        raise UserError(
            f"--pretrained: the weights of {name} cannot be had ({type(error).__name__}: {error}).\n"
            f"They are downloaded from {address.netloc}. Without a network, fetch {weights.url} elsewhere and put it by"
            f" hand here: {file}\nA damaged file of that name must be deleted."
        ) from error
    preset = weights.transforms()
    mean, std = preset.mean, preset.std
    if name in INCEPTIONS:  # their weights are TensorFlow's; the model would correct for it, but in colour only
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
    """The network called `name`, of MODELS or of torchvision's classification models, for images of that shape.

    Fresh weights are from torch's global random generator. `pretrained` takes torchvision's for all but the last layer,
    from its cache or its server; to load others into the model afterwards, omit it. `normalization` is the mean and the
    standard deviation of each channel, which a network of the project's own is to take off its images and divide them
    by; torchvision's have those of their weights. `batch_size` is the number of images per process that it trains on.
    Raises ConfigError for an unknown name and for images of a size that the network does not take, UserError for
    pretrained weights that cannot be had.
    """
    if name in MODELS:
        if pretrained:
            raise ConfigError(f"--pretrained: there are no such weights for {name}, only for torchvision's models.")
        net = MODELS[name](num_classes, image_shape)
        return net if normalization is None else Normalized(net, *normalization)
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError(f"--model {name}: neither {' nor '.join(MODELS)} nor one of torchvision's models.")
    try:
        model = TorchvisionModel(name, num_classes, image_shape, pretrained)
        place = next(model.parameters()).device  # "meta" where shapes alone are asked for: buffers follow
        with torch.no_grad():
            model.to(place).eval()(torch.zeros(2, *image_shape, device=place))
    except (AssertionError, RuntimeError, ValueError) as error:
        _, height, width = image_shape
        size = max(models.get_model_weights(name).DEFAULT.meta["min_size"])
        raise ConfigError(
            f"--model {name}: does not take images of {width} x {height} pixels ({error}). It takes those of"
            f" --image-size {size}."
        ) from error
    check_batch(model, batch_size, image_shape)
    return model.train()
