"""Networks by name. Each takes [batch, 1, height, width] in [0, 1] and returns log-probabilities [batch, classes].

model = build_model("mlp", num_classes=10)
log_probabilities = model(images)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """The tutorial's network, an MLP 784-64-64-64-10; a state_dict saved by the tutorial's own code loads.

    Source: the PyTorch MNIST tutorial (layers fc1 to fc4, ReLU between them, log-softmax).
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, 64)
        self.fc4 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)  # [B, 1, 28, 28] -> [B, 784]
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc3(x))
        return F.log_softmax(self.fc4(x), dim=1)


class CNN(nn.Module):
    """A small convolutional network in the line of LeNet-5 (LeCun et al., 1998), with ReLU and max-pooling.

    No BatchNorm: then the gradient of a batch is the sum over its images, and any number of processes that share the
    batch finds the same one.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.fc1 = nn.Linear(32 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # [B, 16, 14, 14]
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # [B, 32, 7, 7]
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


MODELS = {"mlp": Net, "cnn": CNN}


def build_model(name: str, num_classes: int) -> nn.Module:
    """The network called `name`, with fresh weights from torch's global random generator."""
    return MODELS[name](num_classes)


def count_parameters(model: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold a NaN or an infinity."""
    return [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
