"""Strong augmentation of photographs: random crop, flip and color jitter.

parameters = photo_parameters(len(X), seed=0, epoch=1)      # [B, 8], the same for any number of processes
X = vary(X, parameters)                                     # [B, channels, size, size] in [0, 1]

Random resized crops (Szegedy et al., "Going deeper with convolutions", 2014) and color jitter, each image by itself and
in one interpolation.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist.data.transforms import centers

MIN_AREA = 0.35  # of the image, in a crop
MAX_RATIO = 4 / 3  # of a crop's sides
JITTER = 0.4  # largest change of brightness, contrast and saturation, as in timm
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in gray: ITU-R BT.601


def photo_parameters(count: int, seed: int, epoch: int) -> Tensor:
    """[count, 8]: width and height of the crop, and x and y of its center, from -1 to 1 between the edges of the image;
    -1 to mirror, otherwise 1; factors of brightness, contrast and saturation.

    They depend only on the arguments, not on the number of processes or on where a run was resumed.
    """
    random = np.random.default_rng([seed, epoch, 3])  # [seed, epoch] is the order of the images
    area = random.uniform(MIN_AREA, 1, (count, 1))
    ratio = np.exp(random.uniform(-1, 1, (count, 1)) * math.log(MAX_RATIO))
    sides = np.minimum(1, np.sqrt(area * np.hstack([ratio, 1 / ratio])))
    center = random.uniform(-1, 1, (count, 2)) * (1 - sides)
    mirrored = np.where(random.random((count, 1)) < 0.5, -1, 1)
    jitter = random.uniform(1 - JITTER, 1 + JITTER, (count, 3))
    return torch.from_numpy(np.hstack([sides, center, mirrored, jitter])).to(torch.get_default_dtype())


def vary(X: Tensor, parameters: Tensor) -> Tensor:
    """Crop, mirror and recolor square images X [B, channels, size, size] in [0, 1] by `parameters` [B, 8]."""
    width, height, right, down, mirrored, *jitter = parameters.to(X)[:, :, None, None].unbind(1)  # each [B, 1, 1]
    place = centers(X.shape[-1], X)  # [1, size]
    x, y = (place * width * mirrored + right).expand(-1, X.shape[-1], -1), place.mT * height + down
    grid = torch.stack([x, y.expand_as(x)], dim=-1)  # [B, size, size, 2]
    cropped = F.grid_sample(X, grid, mode="bilinear", padding_mode="border", align_corners=False)
    brightness, contrast, saturation = (factor[:, None] for factor in jitter)  # each [B, 1, 1, 1]
    # contrast is around the mean of the whole image, from a sum of integers: a sum of floats might depend on the batch,
    # and so on the number of processes
    total = (X * 255).round().to(torch.int32).sum(dim=(1, 2, 3), keepdim=True)
    middle = brightness * (total.to(X.dtype) / (255 * X[0].numel()))
    varied = (cropped * brightness - middle) * contrast + middle
    if X.shape[1] == 3:
        gray = sum(share * varied[:, index : index + 1] for index, share in enumerate(LUMA))
        varied = (varied - gray) * saturation + gray
    return varied.clamp(0, 1)
