"""Pixels -> what the model sees. The one path for training, evaluation and prediction."""

import torch
from torch import Tensor


def scale_pixels(images: Tensor) -> Tensor:
    """uint8 [..., height, width] in 0..255 -> floating point [..., 1, height, width] in [0, 1], as ToTensor does."""
    return images.unsqueeze(-3).to(torch.get_default_dtype()).div_(255)
