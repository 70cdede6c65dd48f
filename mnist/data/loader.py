"""Images in memory or in a file -> batches that know what each image counts.

data = load_dataset("mnist", "data")      # data/datasets.py
batches = build_batches(data.train, batch_size=10, shuffle=True, seed=0)
for X, y, weight in batches: ...          # [10, 1, 28, 28] in [0, 1], [10], [10]
"""

import copy
import hashlib
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mnist.data.images import Scale, digest_of
from mnist.data.transforms import augment, augmentation_parameters, scale_pixels
from mnist.errors import ConfigError, UserError
from mnist.launch.hardware import free_memory


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


class BatchDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The batches of an epoch: (X, y, weight) for a range of positions in the order of the epoch.

    `weight` [B] is what an image counts in the loss, so that neither the loop nor the loss needs a case for the last
    batch. In training it is such that an optimizer step takes the mean over its true number of images, also in the
    last, shorter window of accumulated batches: 1 / images of the step, times the two factors that others divide by,
    gradient_accumulation_steps (accelerator.backward) and num_processes (DistributedDataParallel). In evaluation
    (`mean_over_batches=None`) it is 1. The last batch is filled up to the full size, and every batch to a `size` that
    the processes can share, with images of weight 0: so all get the same number of images, and all batches have one
    shape.

    Batches are prepared on `device`. The images lie there too where they take at most a quarter of what is free there;
    else each part that is read ahead is copied to it from page-locked memory, while it computes.
    """

    # bytes of images prepared with one operation: an epoch of the tutorial took a twelfth less time by 1024 digits
    READ_AHEAD = 1024 * 28 * 28

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        size: int,
        shuffle: bool,
        seed: int,
        mean_over_batches: int | None,
        scale: float,
        augment: bool,
        flips: bool,
        device: torch.device,
    ) -> None:
        self.device = device
        fits = math.prod(split.images.shape) <= free_memory(device) / 4
        self.home = device if fits else torch.device("cpu")  # of all images, and of what is chosen from with them
        self.split = Split(split.images[:].to(device), split.labels.to(device)) if fits else split
        self.batch_size = batch_size  # of all processes together
        self.size = size  # with what fills it up
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment
        self.flips = flips
        position = torch.arange(self.num_batches * batch_size)
        self.weight = torch.ones(len(position))
        if mean_over_batches is not None:
            window = batch_size * mean_over_batches
            start = position // window * window
            self.weight = scale / (start + window).clamp(max=len(split)).sub(start).to(self.weight.dtype)
        self.weight[len(split) :] = 0
        self.weight = self._fill_up(self.weight).to(self.home)
        self.epoch = -1
        self.set_epoch(0)

    @property
    def num_batches(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __len__(self) -> int:
        return len(self.split)

    def _fill_up(self, values: Tensor) -> Tensor:
        """[batches * batch_size, ...] -> [batches * size, ...], with zeros at the end of each batch."""
        batches = values.view(-1, self.batch_size, *values.shape[1:])
        filling = batches.new_zeros(len(batches), self.size - self.batch_size, *values.shape[1:])
        return torch.cat([batches, filling], dim=1).flatten(0, 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the epoch and what is done to the images, a function of the seed and the epoch alone."""
        if epoch == self.epoch:  # Accelerate calls once more at the start of every pass
            return
        self.epoch, count = epoch, len(self.split)
        order = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        order = np.resize(order, self.num_batches * self.batch_size)  # filled from its start
        self.order = self._fill_up(torch.from_numpy(order)).to(self.home)
        if self.augment:
            parameters = augmentation_parameters(len(order), self.seed, epoch, self.flips)
            self.parameters = self._fill_up(parameters).to(self.home)
        self.ready: dict[range, tuple[Tensor, Tensor, Tensor]] = {}

    def __getitems__(self, positions: range) -> tuple[Tensor, Tensor, Tensor]:
        """X [B, channels, height, width], y [B], weight [B]; a process asks for its own part of each batch."""
        if positions not in self.ready:
            self._read_ahead(positions)
        return self.ready.pop(positions)

    def _read_ahead(self, positions: range) -> None:
        # Always the same batches together, wherever an epoch is entered: the last digit of a sum may depend on where in
        # memory a batch lies (torch.dot's does), and a run that is resumed must not differ from one that is not.
        size, stride = len(positions), self.size
        count = max(1, self.READ_AHEAD // (size * math.prod(self.split.images.shape[1:])))
        batch, offset = divmod(positions.start, stride)
        first = batch // count * count * stride + offset
        parts = [range(start, start + size) for start in range(first, len(self.order), stride)[:count]]
        places = torch.tensor([part.start for part in parts])[:, None] + torch.arange(size)  # [batches, B]
        places = places.to(self.home)
        images, labels = (self._to_device(it) for it in self.split.gather(self.order[places]))
        X, weight = scale_pixels(images), self._to_device(self.weight[places])
        if self.augment:
            parameters = self._to_device(self.parameters[places])
            X = augment(X.flatten(0, 1), parameters.flatten(0, 1)).view_as(X)
        self.ready = dict(zip(parts, zip(X.unbind(), labels.unbind(), weight.unbind(), strict=True), strict=True))

    def _to_device(self, values: Tensor) -> Tensor:
        on_cuda = self.device.type == "cuda"
        if self.home != self.device and on_cuda:  # only from such memory it need not wait
            values = values.pin_memory()
        # Apple's copies whatever is in the memory by then (pytorch issue 189690)
        return values.to(self.device, non_blocking=on_cuda)


class PositionBatches:
    """Yields the positions of each batch as a range. Accelerate gives each process a slice of every one."""

    drop_last = False

    def __init__(self, num_batches: int, batch_size: int) -> None:
        self.num_batches = num_batches
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[range]:
        for start in range(0, self.num_batches * self.batch_size, self.batch_size):
            yield range(start, start + self.batch_size)


def build_batches(
    split: Split,
    batch_size: int,
    num_processes: int = 1,
    device: torch.device | None = None,
    *,
    shuffle: bool = False,
    seed: int = 0,
    window: int = 1,
    augment: bool = False,
    flips: bool = False,
) -> DataLoader[tuple[Tensor, Tensor, Tensor]]:
    """A DataLoader of (X, y, weight), to be prepared by Accelerate with split_batches=True.

    `batch_size` is that of all processes together. Shuffled batches are for training: their weights are for a mean
    over each optimizer step, of `window` accumulated batches; otherwise each image weighs 1, and a batch is no larger
    than the data need. `set_epoch` chooses the order, and with `augment` what is done to the images, where `flips`
    allows it mirroring too. Batches lie on `device`, by default the CPU.
    Raises ConfigError for a training batch larger than the data.
    """
    if shuffle and batch_size > len(split):
        share = f"--batch-size {batch_size // num_processes} x {num_processes} process{'es' * (num_processes > 1)}"
        raise ConfigError(
            f"--global-batch-size {batch_size} ({share}): larger than the {len(split):,} training images."
        )
    if not shuffle:
        batch_size = min(batch_size, len(split))
    size = -(-batch_size // num_processes) * num_processes
    dataset = BatchDataset(
        split,
        batch_size=batch_size,
        size=size,
        shuffle=shuffle,
        seed=seed,
        mean_over_batches=window if shuffle else None,
        scale=float(window * num_processes),
        augment=augment,
        flips=flips,
        device=device or torch.device("cpu"),
    )
    return DataLoader(
        dataset,
        batch_sampler=PositionBatches(dataset.num_batches, size),  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else every epoch would draw from the global one
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def measured_splits(data: ImageData, seed: int) -> dict[str, Split]:
    """What loss and accuracy are taken on: "train", in sample, "val" where it was cut off, and "test".

    In sample are all training images where they are at most twice as many as the test images; otherwise a sample as
    large as the test set, fixed by the seed.
    """
    train, count = data.train, len(data.test)
    if len(train) > 2 * count:
        chosen = np.random.default_rng([seed, 0]).choice(len(train), count, replace=False)
        train = train.take(torch.from_numpy(np.sort(chosen)))
    splits = {"train": train, "val": data.validation, "test": data.test}
    return {part: split for part, split in splits.items() if split is not None}
