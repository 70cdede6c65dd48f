"""Images in memory or in a file, and a data set made of them: training, validation and test split.

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
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist.data.images import Scale, digest_of
from mnist.errors import ConfigError, UserError


class MappedImages:
    """Images in a file, uint8 [N, height, width] or [N, height, width, 3], read as they are asked for.

    All processes of a machine share what of the file the system keeps in memory, and it may be larger than that. Up to
    MAPPED bytes it is mapped, which is fastest (in a random order, 784 bytes take 0.15 us, and a read 1.6). A larger
    one is read, image by image (12 kB: 2.5 us; from the disk 65, and mapped 240, for a mapping fetches more than was
    asked for). Also, what is mapped counts as a process's memory once it was looked at, a megabyte a look, and a limit
    on memory would end it.
    """

    MAPPED = 512 << 20

    def __init__(self, path: Path, shape: tuple[int, ...], digests: NDArray[np.uint8] | None = None) -> None:
        """The first bytes of a file, as an array of that shape.

        With `digests` [N, 16] (images.py), each image is checked when this process first reads it.
        """
        self.file = path.open("rb", buffering=0)  # what is open stays, though the name may go
        self.item = shape[1:]
        self.places = torch.arange(shape[0])  # in the file
        self.digests = digests
        self.unchecked = np.full(shape[0], digests is not None)
        self.pixels: NDArray[np.uint8] | None = None
        if math.prod(shape) <= self.MAPPED or not hasattr(os, "preadv"):  # Windows
            # not a tensor's: that would be writable, and count as memory that was asked for
            content = mmap.mmap(self.file.fileno(), math.prod(shape), access=mmap.ACCESS_READ)
            self.pixels = np.frombuffer(content, np.uint8).reshape(shape)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.places), *self.item))

    def __len__(self) -> int:
        return len(self.places)

    def dim(self) -> int:
        return 1 + len(self.item)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """The images at `index`, of any shape, as a tensor of their own; UserError where the file has changed."""
        places = self.places[index]
        images = self._read(places) if self.pixels is None else self.pixels.take(places.numpy(), axis=0)
        if self.unchecked[places.numpy()].any():
            self._check(places.flatten().numpy(), images)
        return torch.from_numpy(images)

    def _read(self, places: Tensor) -> NDArray[np.uint8]:
        images, size = np.empty((*places.shape, *self.item), np.uint8), math.prod(self.item)
        buffer = images.reshape(-1).data
        for number, place in enumerate(places.flatten().tolist()):
            if os.preadv(self.file.fileno(), [buffer[number * size : (number + 1) * size]], place * size) < size:
                raise UserError(f"{self.file.name}: was cut off while it was in use. Remove it, and start again.")
        return images

    def _check(self, places: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        assert self.digests is not None
        rows = images.reshape(len(places), -1)
        for number in np.flatnonzero(self.unchecked[places]).tolist():
            if digest_of(rows[number].data) != self.digests[places[number]].tobytes():
                raise UserError(
                    f"{self.file.name}: image {places[number]:,} is not what was decoded: the file was changed, or the"
                    " disk is failing. Remove it, and it is made anew."
                )
        self.unchecked[places] = False

    def at(self, index: slice | Tensor) -> "MappedImages":
        """The images at `index`, in one dimension, none of which is read."""
        images = copy.copy(self)
        images.places = self.places[index]
        return images


class Split(NamedTuple):
    """Images and their classes."""

    images: Tensor | MappedImages  # uint8 [N, height, width], or [N, height, width, 3] in colour
    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: slice | Tensor) -> "Split":
        """The images at `index`; those in a mapped file are not read by it."""
        images = self.images.at(index) if isinstance(self.images, MappedImages) else self.images[index]
        return Split(images, self.labels[index])

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of images and labels at `index`, of any shape."""
        if isinstance(self.images, MappedImages):
            return self.images[index], self.labels[index]
        # which copies an image as a whole, where indexing moves byte by byte: a tenth of the time for 784 of them
        images = self.images.index_select(0, index.flatten()).view(*index.shape, *self.images.shape[1:])
        return images, self.labels[index]


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ImageData:
    """A data set in memory, or mapped into it."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    notes: tuple[str, ...] = ()  # what a person should know about the files
    files: Mapping[Path, str] = field(default_factory=dict)  # that it was read from, with their MD5 sums
    pixels_md5: str = ""  # of what was decoded, where it comes from a folder of pictures
    skipped: tuple[tuple[str, str], ...] = ()  # files in that folder that are not in the data set, and why
    normalization: Normalization | None = None  # of the images to train on, where they come from a folder
    scale: Scale | None = None  # of its images of more than 8 bits per pixel, where there are some
    preparation: str = "none"  # of a person's image for a model of these, see models/saved.py
    flips: bool = False  # whether an image that is mirrored is still one of its class, as writing is not

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image as a network takes it."""
        height, width, *colors = self.test.images.shape[1:]
        return (colors[0] if colors else 1), height, width

    @property
    def title(self) -> str:
        """What a person calls it: `mnist`, `PetImages at 64 x 64 in colour`."""
        height, width, *colours = self.test.images.shape[1:]
        size = f" at {width} x {height} in {'colour' if colours else 'grey'}"
        return self.name + size if self.preparation == "fit" else self.name

    def describe(self) -> dict[str, Any]:
        """What a run should keep of it."""
        return {"data": self.title, **self.counts, "dataset_md5": self.checksum}

    @property
    def counts(self) -> dict[str, int]:
        return {"train_images": len(self.train), "test_images": len(self.test)}

    @property
    def checksum(self) -> str:
        """One MD5 sum for all that was read."""
        if self.pixels_md5:
            return self.pixels_md5
        return hashlib.md5("".join(self.files.values()).encode(), usedforsecurity=False).hexdigest()


def cut_off(
    train: Split, validation_size: int, limit_train_images: int | None, name: str
) -> tuple[Split, Split | None]:
    """The first of the training images to train on, and the last to choose by, if any.

    Raises ConfigError where the latter are all.
    """
    if validation_size and validation_size >= len(train):
        raise ConfigError(
            f"--validation-size {validation_size}: leaves nothing of the {len(train):,} training images of {name}."
        )
    rest = len(train) - validation_size
    validation = train.take(slice(rest, None)) if validation_size else None
    return train.take(slice(0, min(rest, limit_train_images or rest))), validation
