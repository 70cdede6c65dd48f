"""A trained model applied to images.

probabilities = predict(model, images)     # [N, classes], for images as they lie in a Split
"""

import torch
from torch import Tensor, nn

from mnist.transforms import scale_pixels


@torch.no_grad()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """The probabilities [N, classes] of images, uint8 [N, height, width], computed where the model is."""
    training = net.training
    device = next(net.parameters()).device
    output = net.eval()(scale_pixels(images).to(device))  # [N, classes] log-probabilities
    net.train(training)
    probabilities: Tensor = output.exp().cpu()
    return probabilities
