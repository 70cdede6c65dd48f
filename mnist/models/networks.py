"""The project's own networks: [batch, channels, height, width] in [0, 1] -> log-probabilities [batch, classes].

log_probabilities = Net(num_classes=10, image_shape=(1, 28, 28))(images)
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist.errors import ConfigError

ImageShape = tuple[int, int, int]  # channels, height, width


class Net(nn.Module):
    """The PyTorch MNIST tutorial's MLP, 784-64-64-64-10 with ReLU and log-softmax. Loads the tutorial's state_dict."""

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


class Convolution(nn.Conv2d):
    """nn.Conv2d for small images. On a GPU in float32 or float64 it is the product of all patches and the filters.

    With cuDNN's deterministic algorithms, a CUDA graph of loss and gradients in float32 takes 1.2 to 3 times as long
    (H100). In bf16 cuDNN is about as fast or faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_small = x.shape[2] * x.shape[3] <= 32 * 32  # the patches of large images would take much memory
        if x.device.type != "cuda" or torch.is_autocast_enabled("cuda") or not is_small:
            return super().forward(x)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """The same in channels-last layout, by matrix multiplication."""
        (height, width), (down, right), (rows, columns) = self.kernel_size, self.stride, map(int, self.padding)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, columns, columns, rows, rows))  # [B, height, width, channels]
        # [B, height, width, channels * filter height * filter width]
        patches = padded.unfold(1, height, down).unfold(2, width, right).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def pooling(sides: tuple[int, int], pooled: tuple[int, int]) -> nn.Module:
    """Max-pooling from `sides` to exactly `pooled`, with overlapping windows if they do not divide."""
    if sides == pooled:
        return nn.Identity()
    strides = sides[0] // pooled[0], sides[1] // pooled[1]
    windows = [side - (count - 1) * stride for side, count, stride in zip(sides, pooled, strides, strict=True)]
    return nn.MaxPool2d((windows[0], windows[1]), strides)


class Normalized(nn.Module):
    """A network that normalizes its images by the mean and standard deviation of each channel, saved as buffers.

    Networks learn slowly from images whose mean is far from zero, such as drawings on white.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])  # [channels, 1, 1]
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net((x - self.mean) / self.std)
        return output


class CNN(nn.Module):
    """A small convolutional network in the style of LeNet-5 (LeCun et al., 1998), with ReLU and max-pooling.

    The second pooling reduces larger images to 7 x 7 as well; otherwise, at 224 x 224, the first dense layer would have
    12.8 million weights. After 8 epochs on 1,441 generated photographs of three shapes (64 x 64, color), one-cycle to
    3e-3, it reached 98 % on 360 others (three seeds), and 96 % with non-overlapping windows that leave 8 x 8. Without
    BatchNorm, gradients do not depend on the number of processes. Raises ConfigError if images are too small.
    """

    MIN_SIDE = 4  # pixels per side, because images are pooled twice

    def __init__(self, num_classes: int = 10, image_shape: ImageShape = (1, 28, 28)) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < self.MIN_SIDE:
            raise ConfigError(
                f"--model cnn: does not accept images of {width} x {height} pixels; the minimum is {self.MIN_SIDE}."
            )
        self.conv1 = Convolution(channels, 16, 5, padding=2)
        self.conv2 = Convolution(16, 32, 5, padding=2)
        sides = height // 2, width // 2
        pooled = min(7, sides[0] // 2), min(7, sides[1] // 2)
        self.pool = pooling(sides, pooled)  # 2 x 2 windows for 28 x 28 pixels
        self.fc1 = nn.Linear(32 * pooled[0] * pooled[1], 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # [B, 16, 14, 14] from 28 x 28 pixels
        x = F.relu(self.pool(self.conv2(x)))  # [B, 32, 7, 7]
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


class Strided(nn.Module):
    """Convolutions with strides instead of pooling (Springenberg et al., 2015), pooling to 3 x 3 and a dense layer.

    Channels-last layout halves the time of a step on a CPU. He initialization (He et al., 2015): without BatchNorm,
    torch's default would shrink activations layer by layer. Raises ConfigError if images are too small.
    """

    name: str
    layers: tuple[tuple[int, int, int], ...]  # channels, size and stride of each convolution
    padded: bool  # if True, only strides reduce the image size

    def __init__(self, num_classes: int = 10, image_shape: ImageShape = (1, 28, 28)) -> None:
        super().__init__()
        channels, height, width = image_shape
        convolutions: list[nn.Module] = []
        for filters, size, stride in self.layers:
            padding = size // 2 if self.padded else 0
            height, width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
            if min(height, width) < 1:
                raise ConfigError(
                    f"--model {self.name}: does not accept images of {image_shape[2]} x {image_shape[1]} pixels, which"
                    f" are too small. --model cnn accepts {CNN.MIN_SIDE} x {CNN.MIN_SIDE} and larger."
                )
            convolution = Convolution(channels, filters, size, stride, padding)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            convolutions += [convolution, nn.ReLU()]
            channels = filters
        self.convolutions = nn.Sequential(*convolutions)
        pooled = min(3, height), min(3, width)
        self.pool = pooling((height, width), pooled)
        self.fc = nn.Linear(channels * math.prod(pooled), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.channels_last)  # contiguous() would not change images with one channel
        x = self.pool(self.convolutions(x))  # [B, channels, 3, 3]
        return F.log_softmax(self.fc(x.flatten(1)), dim=1)


class QuickCNN(Strided):
    """Three small convolutions: 28 x 28 -> 12, 5 and 3 pixels per side."""

    name, padded = "cnn-quick", False
    layers = ((24, 5, 2), (32, 3, 2), (48, 3, 1))


class DeepCNN(Strided):
    """Five convolutions with 40 times the work: 28 x 28 -> 14, 14, 7, 7 and 7 pixels per side."""

    name, padded = "cnn-deep", True
    layers = ((32, 5, 2), (64, 3, 1), (64, 3, 2), (128, 3, 1), (128, 3, 1))


MODELS: dict[str, Callable[[int, ImageShape], nn.Module]]
MODELS = {"mlp": Net, "cnn": CNN, "cnn-quick": QuickCNN, "cnn-deep": DeepCNN}


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that contain NaN or infinity."""
    return [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
