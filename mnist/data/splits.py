"""Images in memory or in a file, and datasets made of them: training, validation and test splits.

data = load_dataset("mnist", "data")      # data/datasets.py
data.train.images[:10], data.train.labels[:10]      # uint8 [10, 28, 28], int64 [10]
"""

import copy
import hashlib
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist.config.settings import CHOICES, TrainConfig
from mnist.data.images import Scale, digest_of
from mnist.errors import ConfigError, UserError

if TYPE_CHECKING:
    from mnist.data.listing import Listing

PHOTO_SIDE = 100  # pixels, from which on an image is probably a photograph
FITS = CHOICES["fit"]  # how an image of a folder is made square (images.Form)


class MappedImages:
    """Images in a file, uint8 [N, height, width] or [N, height, width, 3], read on access.

    All processes of a machine share the page cache, and the file may exceed memory. Up to MAPPED bytes it is mapped,
    which is fastest (784 bytes in random order: 0.15 us; with a read 1.6 us). Larger files are read image by image
    (12 kB: 2.5 us; from disk 65 us, or 240 us if mapped, which reads ahead). Mapped pages also count towards the
    process's memory limit once touched.
    """

    MAPPED = 512 << 20
    PIECE = 64 << 20  # bytes copied to a device at once

    def __init__(self, path: Path, shape: tuple[int, ...], digests: NDArray[np.uint8] | None = None) -> None:
        """`shape` is that of the images, which are at the start of the file.

        With `digests` [N, 16] (images.py), each image is checked when this process first reads it.
        """
        self.file = path.open("rb", buffering=0)  # stays readable if the file is deleted
        self.item = shape[1:]
        self.file_indices = torch.arange(shape[0])
        self.digests = digests
        self.unchecked = np.full(shape[0], digests is not None)
        self.pixels: NDArray[np.uint8] | None = None
        if math.prod(shape) <= self.MAPPED or not hasattr(os, "preadv"):  # Windows
            # not torch.from_file, whose memory would be writable and count as allocated
            content = mmap.mmap(self.file.fileno(), math.prod(shape), access=mmap.ACCESS_READ)
            self.pixels = np.frombuffer(content, np.uint8).reshape(shape)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.file_indices), *self.item))

    def __len__(self) -> int:
        return len(self.file_indices)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """Copies of the images at `index`, which may have any shape. Raises UserError if the file has changed."""
        indices = self.file_indices[index]
        images = self._read(indices) if self.pixels is None else self.pixels.take(indices.numpy(), axis=0)
        if self.unchecked[indices.numpy()].any():
            self._check(indices.flatten().numpy(), images)
        return torch.from_numpy(images)

    def _read(self, indices: Tensor) -> NDArray[np.uint8]:
        images, size = np.empty((*indices.shape, *self.item), np.uint8), math.prod(self.item)
        buffer = images.reshape(-1).data
        for number, index in enumerate(indices.flatten().tolist()):
            if os.preadv(self.file.fileno(), [buffer[number * size : (number + 1) * size]], index * size) < size:
                raise UserError(f"{self.file.name}: truncated while in use. Remove it and start again.")
        return images

    def _check(self, indices: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        assert self.digests is not None
        rows = images.reshape(len(indices), -1)
        for number in np.flatnonzero(self.unchecked[indices]).tolist():
            if digest_of(rows[number].data) != self.digests[indices[number]].tobytes():
                raise UserError(
                    f"{self.file.name}: image {indices[number]:,} does not match its checksum: the file was changed or"
                    " the disk is failing. Remove it and start again."
                )
        self.unchecked[indices] = False

    def to(self, device: torch.device) -> Tensor:
        """All images on `device`, read piece by piece: the host's memory may be smaller than the device's."""
        images = torch.empty(self.shape, dtype=torch.uint8, device=device)
        count = max(1, self.PIECE // math.prod(self.item))
        for start in range(0, len(self), count):
            images[start : start + count] = self[start : start + count]
        return images

    def at(self, index: slice | Tensor) -> "MappedImages":
        """The images at the one-dimensional `index`, without reading them."""
        images = copy.copy(self)
        images.file_indices = self.file_indices[index]
        return images


class Split(NamedTuple):
    """Images and their classes."""

    images: Tensor | MappedImages  # uint8 [N, height, width], or [N, height, width, 3] in color
    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: slice | Tensor) -> "Split":
        """The images at `index`, without reading those in a file."""
        images = self.images.at(index) if isinstance(self.images, MappedImages) else self.images[index]
        return Split(images, self.labels[index])

    def to(self, device: torch.device) -> "Split":
        """The same images and labels on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of images and labels at `index`, of any shape."""
        if isinstance(self.images, MappedImages):
            return self.images[index], self.labels[index]
        # copies whole images where indexing copies bytes: a tenth of the time for 784 bytes
        images = self.images.index_select(0, index.flatten()).view(*index.shape, *self.images.shape[1:])
        return images, self.labels[index]


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ImageData:
    """A dataset in memory or in a memory-mapped file."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    notes: tuple[str, ...] = ()  # for the header of a run
    files: Mapping[Path, str] = field(default_factory=dict)  # with their MD5; empty for a folder of images
    pixels_md5: str = ""  # of the decoded images of a folder
    skipped: tuple[tuple[str, str], ...] = ()  # files of a folder that are not in the dataset, and why
    normalization: Normalization | None = None  # of the training images of a folder
    scale: Scale | None = None  # of images with more than 8 bits per pixel, if any
    preparation: str = "none"  # of images to classify: "digit" as in MNIST, one of FITS, "none" if they have the size
    flips: bool = False  # whether a mirrored image keeps its class; False for handwriting
    listing: "Listing | None" = None  # of a folder

    def advice(self, config: TrainConfig) -> list[str]:
        """Notes on settings that suit these images better: very unequal classes, and photographs."""
        notes = []
        sizes = torch.bincount(self.train.labels)
        least, most = int(sizes[sizes > 0].min()), int(sizes.max())
        if most > 10 * least and config.loss == "nll":
            notes.append(
                f"classes of {least:,} to {most:,} training images: --loss nll-balanced gives each the same weight"
            )
        plain = config.recipe == "tutorial" and config.pretrained == "none"
        if self.listing and plain and np.median(self.listing.sides) >= PHOTO_SIDE:
            notes.append("for photographs: --recipe photos, a pretrained network at 224 x 224")
        return notes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's input."""
        height, width, *colors = self.test.images.shape[1:]
        return (colors[0] if colors else 1), height, width

    @property
    def title(self) -> str:
        """`mnist`, `PetImages at 64 x 64 in color`."""
        channels, height, width = self.image_shape
        size = f" at {width} x {height} in {'color' if channels > 1 else 'gray'}"
        return self.name + size if self.preparation in FITS else self.name

    def describe(self) -> dict[str, Any]:
        """What a run records about the data."""
        return {"data": self.title, **self.counts, "dataset_md5": self.checksum}

    @property
    def counts(self) -> dict[str, int]:
        return {"train_images": len(self.train), "test_images": len(self.test)}

    @property
    def checksum(self) -> str:
        """One MD5 sum of all data read."""
        if self.pixels_md5:
            return self.pixels_md5
        return hashlib.md5("".join(self.files.values()).encode(), usedforsecurity=False).hexdigest()


def class_weights(labels: Tensor) -> Tensor:
    """[classes]: weights of an image by its class, whose sums over each class are the same; their mean is 1."""
    sizes = torch.bincount(labels)
    return len(labels) / (torch.count_nonzero(sizes) * sizes.clamp(min=1)).to(torch.get_default_dtype())


def cut_off(
    train: Split, validation_size: int, limit_train_images: int | None, name: str
) -> tuple[Split, Split | None]:
    """Split off the last `validation_size` training images. Raises ConfigError if none would be left to train on."""
    if validation_size and validation_size >= len(train):
        raise ConfigError(
            f"--validation-size {validation_size}: leaves none of the {len(train):,} training images of {name}."
        )
    rest = len(train) - validation_size
    validation = train.take(slice(rest, None)) if validation_size else None
    return train.take(slice(0, min(rest, limit_train_images or rest))), validation
