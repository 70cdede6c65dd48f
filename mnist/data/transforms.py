"""Pixels -> what the model sees. The one path for training, evaluation and prediction; and what training may vary.

X = scale_pixels(images)                                         # uint8 -> [B, channels, height, width] in [0, 1]
X = augment(X, augmentation_parameters(len(X), seed=0, epoch=1, flip=False))
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MOST_AT_ONCE = 500, 2_000_000  # images, and values in them, of which a network makes much more memory
LARGEST_ANGLE = math.radians(10)
LARGEST_ZOOM = 0.1  # by which share an image becomes larger or smaller
LARGEST_SHIFT = 0.1  # of the image's width and height


def scale_pixels(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> floating point in [0, 1], as ToTensor does: [..., height, width] -> [..., 1, height, width],
    and in colour, which is what a last dimension of 3 means, [..., height, width, 3] -> [..., 3, height, width].
    """
    # bytes are put in order before they become floats four times as large
    images = images.movedim(-1, -3).contiguous() if images.shape[-1] == 3 else images.unsqueeze(-3)
    return images.to(torch.get_default_dtype()).div_(255)


def eval_batch_size(pixels: Sequence[int]) -> int:
    """Images of that shape per batch and process where a network does not train."""
    images, values = MOST_AT_ONCE
    return max(1, min(images, values // math.prod(pixels)))


def augmentation_parameters(count: int, seed: int, epoch: int, flip: bool) -> Tensor:
    """What is done to the images at `count` positions of an epoch, [count, 5]: angle, zoom, shifts to the right and
    down, and 1 for an image that is mirrored, half of them where `flip` is set. Zeros leave an image as it is.

    A function of its arguments alone, so that the number of processes and the place where a run is resumed change none.
    """
    random = np.random.default_rng([seed, epoch, 1])  # without the 1 it would be that of the order of the images
    largest = [LARGEST_ANGLE, LARGEST_ZOOM, LARGEST_SHIFT, LARGEST_SHIFT]
    moves = random.uniform(-1, 1, (count, 4)) * largest
    mirrored = (random.random((count, 1)) < 0.5) & flip
    return torch.from_numpy(np.hstack([moves, mirrored])).to(torch.get_default_dtype())


def augment(X: Tensor, parameters: Tensor) -> Tensor:
    """X [B, channels, height, width] rotated, zoomed, shifted and mirrored as `parameters` [B, 5] say.

    One bilinear interpolation does all of it. What comes in from outside repeats the nearest pixel of the edge: black
    around digits, and no black corners in a photograph.
    """
    angle, zoom, right, down, mirrored = parameters.to(X)[:, :, None, None].unbind(1)  # each [B, 1, 1]
    height, width = X.shape[2:]
    x = _centres(width, X)  # [1, width]
    y = _centres(height, X)[0, :, None]  # [height, 1]
    x, y = (x - 2 * right) / (1 + zoom) * (1 - 2 * mirrored), (y - 2 * down) / (1 + zoom)
    cos, sin, ratio = angle.cos(), angle.sin(), height / width  # a rotation is one of pixels, not of shares of a side
    # written out, for affine_grid multiplies matrices: in TensorFloat-32 where that is allowed, and so off by a pixel
    grid = torch.stack([x * cos + y * (sin * ratio), y * cos - x * (sin / ratio)], dim=-1)  # [B, height, width, 2]
    return F.grid_sample(X, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _centres(count: int, X: Tensor) -> Tensor:
    """[1, count] centres of pixels as grid_sample counts them, from -1 to 1 between the edges."""
    return (2 * torch.arange(count, dtype=X.dtype, device=X.device) + 1 - count)[None] / count
