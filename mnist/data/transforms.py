"""Pixels -> model input (the same for training, evaluation and prediction), and augmentation for training.

X = scale_pixels(images)                                         # uint8 -> [B, channels, height, width] in [0, 1]
X = augment(X, augmentation_parameters(len(X), seed=0, epoch=1, flip=False))
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EVAL_IMAGES, EVAL_VALUES = 500, 2_000_000  # at most, per batch on a CPU: activations take many times the memory
EVAL_BYTES = 400  # per value of an image, on a GPU: activations take up to 372 (vit_h_14), VGG's 175, the CNN's 112
MAX_ANGLE = math.radians(10)
MAX_ZOOM = MAX_SHIFT = 0.1  # as a fraction of the image's sides


def scale_pixels(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> floating point in [0, 1], as ToTensor does.

    Gray: [..., height, width] -> [..., 1, height, width]. Color: [..., height, width, 3] -> [..., 3, height, width].
    """
    # reorder bytes, not floats four times as large
    images = images.movedim(-1, -3).contiguous() if images.shape[-1] == 3 else images.unsqueeze(-3)
    return images.to(torch.get_default_dtype()).div_(255)


def eval_batch_size(pixels: Sequence[int], memory: int = 0) -> int:
    """Images of that shape per batch and process in evaluation; `memory` is what a GPU has for them, in bytes."""
    on_cpu = max(1, min(EVAL_IMAGES, EVAL_VALUES // math.prod(pixels)))
    return max(on_cpu, memory // (EVAL_BYTES * math.prod(pixels)))


def augmentation_parameters(count: int, seed: int, epoch: int, flip: bool) -> Tensor:
    """[count, 5]: angle, zoom, shift right, shift down and 1 to mirror (half of them if `flip`); zeros change nothing.

    They depend only on the arguments, not on the number of processes or on where a run was resumed.
    """
    random = np.random.default_rng([seed, epoch, 1])  # [seed, epoch] is the order of the images
    moves = random.uniform(-1, 1, (count, 4)) * [MAX_ANGLE, MAX_ZOOM, MAX_SHIFT, MAX_SHIFT]
    mirrored = (random.random((count, 1)) < 0.5) & flip
    return torch.from_numpy(np.hstack([moves, mirrored])).to(torch.get_default_dtype())


def augment(X: Tensor, parameters: Tensor) -> Tensor:
    """Rotate, zoom, shift and mirror X [B, channels, height, width] by `parameters` [B, 5], in one interpolation.

    Pixels from outside the image repeat its nearest edge pixel, so photographs get no black corners.
    """
    angle, zoom, right, down, mirrored = parameters.to(X)[:, :, None, None].unbind(1)  # each [B, 1, 1]
    height, width = X.shape[2:]
    x = centers(width, X)  # [1, width]
    y = centers(height, X)[0, :, None]  # [height, 1]
    x, y = (x - 2 * right) / (1 + zoom) * (1 - 2 * mirrored), (y - 2 * down) / (1 + zoom)
    cos, sin, ratio = angle.cos(), angle.sin(), height / width  # rotate in pixels, not in fractions of the sides
    # written out because affine_grid's matrix product in TensorFloat-32 is off by a pixel
    grid = torch.stack([x * cos + y * (sin * ratio), y * cos - x * (sin / ratio)], dim=-1)  # [B, height, width, 2]
    return F.grid_sample(X, grid, mode="bilinear", padding_mode="border", align_corners=False)


def centers(count: int, X: Tensor) -> Tensor:
    """[1, count] pixel centers in grid_sample's coordinates, -1 to 1 between the edges."""
    return (2 * torch.arange(count, dtype=X.dtype, device=X.device) + 1 - count)[None] / count
