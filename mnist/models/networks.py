"""Networks by name. Each takes [batch, channels, height, width] in [0, 1], returns log-probabilities [batch, classes].

model = build_model("mlp", num_classes=10)
model = build_model("resnet18", num_classes=3, image_shape=(3, 64, 64), pretrained=True)
log_probabilities = model(images)
"""

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist.errors import ConfigError, UserError

ImageShape = tuple[int, int, int]  # channels, height, width


class Net(nn.Module):
    """The tutorial's network, an MLP 784-64-64-64-10; a state_dict saved by the tutorial's own code loads.

    Images of another shape change the size of its first layer. Source: the PyTorch MNIST tutorial (layers fc1 to fc4,
    ReLU between them, log-softmax).
    """

    def __init__(self, num_classes: int = 10, image_shape: ImageShape = (1, 28, 28)) -> None:
        super().__init__()
        self.fc1 = nn.Linear(math.prod(image_shape), 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, 64)
        self.fc4 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)  # [B, 1, 28, 28] -> [B, 784]
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc3(x))
        return F.log_softmax(self.fc4(x), dim=1)


def pooling(sides: tuple[int, int], places: tuple[int, int]) -> nn.MaxPool2d:
    """Max-pooling of a map with such sides that leaves so many places, and cuts nothing off."""
    strides = sides[0] // places[0], sides[1] // places[1]
    # fields that overlap where the side does not divide
    fields = [side - (count - 1) * stride for side, count, stride in zip(sides, places, strides, strict=True)]
    return nn.MaxPool2d((fields[0], fields[1]), strides)


class CNN(nn.Module):
    """A small convolutional network in the line of LeNet-5 (LeCun et al., 1998), with ReLU and max-pooling.

    Of images larger than 28 pixels the second pooling leaves 7 x 7 places too: the first dense layer would otherwise
    have 12.8 million weights at 224 x 224. Of 360 photographs made up of three shapes, 64 x 64 in colour, it knew 98 %
    after 8 epochs of 1,441, with one-cycle to 3e-3 (three seeds); 96 % with fields side by side that leave 8 x 8.
    No BatchNorm: then the gradient of a batch is the sum over its images, and any number of processes that share the
    batch finds the same one. Raises ConfigError for images of which pooling leaves nothing.
    """

    SMALLEST = 4  # pixels, pooled twice

    def __init__(self, num_classes: int = 10, image_shape: ImageShape = (1, 28, 28)) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < self.SMALLEST:
            raise ConfigError(
                f"--model cnn: does not take images of {width} x {height} pixels; each side needs {self.SMALLEST}."
            )
        self.conv1 = nn.Conv2d(channels, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        sides = height // 2, width // 2
        places = min(7, sides[0] // 2), min(7, sides[1] // 2)
        self.pool = pooling(sides, places)  # (2, 2) of 28 pixels
        self.fc1 = nn.Linear(32 * places[0] * places[1], 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # [B, 16, 14, 14] of 28 x 28 pixels
        x = F.relu(self.pool(self.conv2(x)))  # [B, 32, 7, 7]
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


class Strided(nn.Module):
    """Convolutions, of which some take every second place instead of pooling (Springenberg et al., 2015), and one dense
    layer on the 3 x 3 places to which what they find is pooled.

    The images are laid out channels last, and so is all that follows: on a CPU a step takes half the time. The weights
    are He's (He et al., 2015), for there is no BatchNorm here either, and torch's own would make what comes in smaller
    layer by layer. Raises ConfigError for images of which nothing would be left.
    """

    name: str
    layers: tuple[tuple[int, int, int], ...]  # channels, size and stride of each convolution
    padded: bool  # whether they look beyond the edge too, so that only strides make the image smaller

    def __init__(self, num_classes: int = 10, image_shape: ImageShape = (1, 28, 28)) -> None:
        super().__init__()
        channels, height, width = image_shape
        convolutions: list[nn.Module] = []
        for filters, size, stride in self.layers:
            padding = size // 2 if self.padded else 0
            height, width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
            if min(height, width) < 1:
                raise ConfigError(
                    f"--model {self.name}: does not take images of {image_shape[2]} x {image_shape[1]} pixels, of which"
                    f" nothing would be left. --model cnn takes them from {CNN.SMALLEST} x {CNN.SMALLEST} on."
                )
            convolution = nn.Conv2d(channels, filters, size, stride, padding)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            convolutions += [convolution, nn.ReLU()]
            channels = filters
        self.convolutions = nn.Sequential(*convolutions)
        places = min(3, height), min(3, width)
        self.pool = pooling((height, width), places)
        self.fc = nn.Linear(channels * math.prod(places), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.channels_last)  # which contiguous() would not do to images of one channel
        x = self.pool(self.convolutions(x))  # [B, channels, 3, 3]
        return F.log_softmax(self.fc(x.flatten(1)), dim=1)


class QuickCNN(Strided):
    """Three convolutions with little work in them: of 28 pixels a side they leave 12, 5 and 3."""

    name, padded = "cnn-quick", False
    layers = ((24, 5, 2), (32, 3, 2), (48, 3, 1))


class DeepCNN(Strided):
    """Five convolutions with 40 times as much work: of 28 pixels a side they leave 14, 14, 7, 7 and 7."""

    name, padded = "cnn-deep", True
    layers = ((32, 5, 2), (64, 3, 1), (64, 3, 2), (128, 3, 1), (128, 3, 1))


MODELS: dict[str, Callable[[int, ImageShape], nn.Module]] = {
    "mlp": Net,
    "cnn": CNN,
    "cnn-quick": QuickCNN,
    "cnn-deep": DeepCNN,
}


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
    name: str, num_classes: int, image_shape: ImageShape = (1, 28, 28), pretrained: bool = False
) -> nn.Module:
    """The network called `name`, of MODELS or of torchvision's classification models, for images of that shape.

    Fresh weights are from torch's global random generator. `pretrained` takes torchvision's for all but the last layer,
    from its cache or its server; to load others into the model afterwards, leave it away.
    Raises ConfigError for an unknown name and for images of a size that the network does not take, UserError for
    pretrained weights that cannot be had.
    """
    if name in MODELS:
        if pretrained:
            raise ConfigError(f"--pretrained: there are no such weights for {name}, only for torchvision's models.")
        return MODELS[name](num_classes, image_shape)
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError(f"--model {name}: neither {' nor '.join(MODELS)} nor one of torchvision's models.")
    try:
        model = TorchvisionModel(name, num_classes, image_shape, pretrained)
        with torch.no_grad():
            model.eval()(torch.zeros(2, *image_shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        _, height, width = image_shape
        size = max(models.get_model_weights(name).DEFAULT.meta["min_size"])
        raise ConfigError(
            f"--model {name}: does not take images of {width} x {height} pixels ({error}). It takes those of"
            f" --image-size {size}."
        ) from error
    return model.train()


def count_parameters(model: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold a NaN or an infinity."""
    return [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
