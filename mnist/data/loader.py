"""Splits -> batches with a weight per image.

data = load_dataset("mnist", "data")      # data/datasets.py
loader = build_loader(data.train, global_batch_size=10, training=Training(seed=0))
for X, y, sample_weight in loader: ...    # [10, 1, 28, 28] in [0, 1], [10], [10]
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mnist.config.settings import TrainConfig
from mnist.data.photographs import photo_parameters, vary
from mnist.data.splits import ImageData, Split, class_weights
from mnist.data.transforms import augment, augmentation_parameters, eval_batch_size, scale_pixels
from mnist.data.writing import rewrite, writing_parameters
from mnist.errors import ConfigError
from mnist.launch.hardware import device_memory, eval_memory
from mnist.launch.processes import check_alike


class Training(NamedTuple):
    """Settings of training batches. Evaluation takes all images in order."""

    seed: int  # of the order and the augmentation
    accumulation_steps: int = 1  # batches per optimizer step
    augment: str = "none"  # none, light, photo or writing
    flips: bool = False  # whether light augmentation may mirror an image
    balanced: bool = False  # whether every class has the same weight


class BatchDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """(X, y, sample_weight) for a range of positions in the order of an epoch.

    `sample_weight` [B] is each image's weight in the loss, so no code treats the last batch specially. In training,
    every optimizer step averages over its actual number of images, even in a shorter last window of accumulated
    batches. The weight is 1 / images of the step, times the divisors applied later: gradient_accumulation_steps
    (accelerator.backward) and num_processes (DistributedDataParallel). For a balanced loss it is multiplied by
    N / (K n) for an image of a class with n of the N images, if there are K classes. In evaluation (`training` is None)
    it is 1. Padding, which fills the last batch, and every batch to a `size` that the processes divide evenly, has
    weight 0.

    Batches are prepared on `device`. Unless the images are there as well (`place_images`), each read-ahead is copied
    from pinned memory while the device computes.
    """

    READ_AHEAD = 1024 * 28 * 28  # bytes of images prepared at once: an epoch of the tutorial takes 8 % less time

    def __init__(
        self, split: Split, global_batch_size: int, num_processes: int, device: torch.device, training: Training | None
    ) -> None:
        self.device = device
        # of all images, labels, weights and parameters; "cuda" and "cuda:0" are the same device, but not equal
        self.home = device if split.labels.device.type == device.type else torch.device("cpu")
        self.split = split
        self.global_batch_size = global_batch_size
        self.size = -(-global_batch_size // num_processes) * num_processes
        self.training = training
        position = torch.arange(self.num_batches * global_batch_size)
        self.sample_weight = torch.ones(len(position))
        if training is not None:
            window = global_batch_size * training.accumulation_steps
            start = position // window * window
            images = (start + window).clamp(max=len(split)).sub(start)  # of each optimizer step
            self.sample_weight = training.accumulation_steps * num_processes / images.to(self.sample_weight.dtype)
        self.sample_weight[len(split) :] = 0
        balanced = training is not None and training.balanced
        self.class_weight = class_weights(split.labels).to(device) if balanced else None
        self.sample_weight = self._fill_up(self.sample_weight).to(self.home)
        self.epoch = -1
        self.set_epoch(0)

    @property
    def num_batches(self) -> int:
        return -(-len(self.split) // self.global_batch_size)

    def __len__(self) -> int:
        return len(self.split)

    def _fill_up(self, values: Tensor) -> Tensor:
        """[batches * global_batch_size, ...] -> [batches, size, ...], padding each batch with zeros."""
        batches = values.view(-1, self.global_batch_size, *values.shape[1:])
        filling = batches.new_zeros(len(batches), self.size - self.global_batch_size, *values.shape[1:])
        return torch.cat([batches, filling], dim=1)

    def set_epoch(self, epoch: int) -> None:
        """Choose an epoch's order and augmentation, which depend on the seed and the epoch alone."""
        if epoch == self.epoch:  # Accelerate calls it again at the start of every pass
            return
        self.epoch, count, training = epoch, len(self.split), self.training
        order = np.random.default_rng([training.seed, epoch]).permutation(count) if training else np.arange(count)
        order = np.resize(order, self.num_batches * self.global_batch_size)  # filled from its start
        self.order = self._fill_up(torch.from_numpy(order)).to(self.home)
        if training and training.augment != "none":
            if training.augment == "light":
                parameters = augmentation_parameters(len(order), training.seed, epoch, training.flips)
            else:
                make = {"photo": photo_parameters, "writing": writing_parameters}[training.augment]
                parameters = make(len(order), training.seed, epoch)
            self.parameters = self._fill_up(parameters).to(self.home)
        self.ready: dict[range, tuple[Tensor, Tensor, Tensor]] = {}

    def __getitems__(self, positions: range) -> tuple[Tensor, Tensor, Tensor]:
        """X [B, channels, height, width], y [B], sample_weight [B] of one process's part of a batch."""
        if positions not in self.ready:
            self._read_ahead(positions)
        return self.ready.pop(positions)

    def _read_ahead(self, positions: range) -> None:
        # Always group the same batches, even if an epoch is resumed midway: the last digit of a sum may depend on a
        # batch's memory address (torch.dot's does), and a resumed run must be identical.
        size = len(positions)
        count = max(1, self.READ_AHEAD // (size * math.prod(self.split.images.shape[1:])))
        batch, offset = divmod(positions.start, self.size)
        first = batch // count * count
        part = slice(first, first + count), slice(offset, offset + size)  # [batches, B]
        images, labels = (self._to_device(values) for values in self.split.gather(self.order[part]))
        X, sample_weight = scale_pixels(images), self._to_device(self.sample_weight[part].clone())
        if self.class_weight is not None:
            sample_weight = sample_weight * self.class_weight[labels]
        if self.training and self.training.augment != "none":
            parameters = self._to_device(self.parameters[part]).flatten(0, 1)
            if self.training.augment == "light":
                X = augment(X.flatten(0, 1), parameters).view_as(X)
            elif self.training.augment == "photo":
                X = vary(X.flatten(0, 1), parameters).view_as(X)
            else:
                rewritten, classes = rewrite(X.flatten(0, 1), labels.flatten(), parameters)
                X, labels = rewritten.view_as(X), classes.view_as(labels)
        starts = range(first * self.size + offset, self.order.numel(), self.size)
        batches = zip(X.unbind(), labels.unbind(), sample_weight.unbind(), strict=True)
        self.ready = {range(start, start + size): batch for start, batch in zip(starts, batches, strict=False)}

    def _to_device(self, values: Tensor) -> Tensor:
        on_cuda = self.device.type == "cuda"
        if self.home != self.device and on_cuda:  # copies from pinned memory do not block
            values = values.pin_memory()
        # not non_blocking on Apple's devices, which would read memory that is reused by then (pytorch issue 189690)
        return values.to(self.device, non_blocking=on_cuda)


class PositionBatches:
    """The positions of each batch, as ranges. Accelerate gives each process a slice of every one."""

    drop_last = False

    def __init__(self, num_batches: int, batch_size: int) -> None:
        self.num_batches = num_batches
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[range]:
        for start in range(0, self.num_batches * self.batch_size, self.batch_size):
            yield range(start, start + self.batch_size)


class BatchLoader(DataLoader[tuple[Tensor, Tensor, Tensor]]):
    """A DataLoader of batches that its dataset makes, without the overhead of torch's own iterator."""

    dataset: BatchDataset

    def __iter__(self) -> Any:
        return map(self.dataset.__getitems__, self.batch_sampler)  # type: ignore[arg-type]


def build_loader(
    split: Split,
    global_batch_size: int,
    num_processes: int = 1,
    device: torch.device | None = None,
    training: Training | None = None,
) -> DataLoader[tuple[Tensor, Tensor, Tensor]]:
    """A DataLoader of (X, y, sample_weight) on `device`, by default the CPU, to be prepared with split_batches=True.

    With `training`, images are shuffled and `set_epoch` chooses order and augmentation; without it they are in order.
    Raises ConfigError if a training batch is larger than the data.
    """
    if training and global_batch_size > len(split):
        raise ConfigError(
            f"--global-batch-size {global_batch_size} (--batch-size {global_batch_size // num_processes} x"
            f" {num_processes} process{'es' * (num_processes > 1)}): larger than the {len(split):,} training images."
            f" Use --batch-size {max(1, len(split) // num_processes)} or less."
        )
    global_batch_size = min(global_batch_size, len(split))
    dataset = BatchDataset(split, global_batch_size, num_processes, device or torch.device("cpu"), training)
    return BatchLoader(
        dataset,
        batch_sampler=PositionBatches(dataset.num_batches, dataset.size),  # type: ignore[arg-type]
        collate_fn=_identity,
        generator=torch.Generator(),  # otherwise an epoch that Accelerate resumes would draw from the global one
    )


def place_images(data: ImageData, device: torch.device) -> ImageData:
    """Move splits to `device`, training images first, as long as they take at most a quarter of its free memory."""
    left = device_memory(device)[0] / 4
    moved: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        if split is not None and (size := math.prod(split.images.shape)) <= left:
            moved[name], left = split.to(device), left - size
    return dataclasses.replace(data, **moved)


def build_loaders(
    data: ImageData, config: TrainConfig, accelerator: Accelerator
) -> tuple[DataLoader[tuple[Tensor, Tensor, Tensor]], dict[str, DataLoader[tuple[Tensor, Tensor, Tensor]]]]:
    """The DataLoader for training, and those for evaluation by split: train, val and test.

    All processes must call it. Raises ConfigError if their data differ or a batch is larger than the data.
    """
    check_alike(data.counts | {"dataset_md5": data.checksum})
    processes, device = accelerator.num_processes, accelerator.device
    data = place_images(data, device)
    balanced = config.loss == "nll-balanced"
    augment = config.augment.replace("strong", "writing" if data.preparation == "digit" else "photo")
    training = Training(config.seed, config.gradient_accumulation_steps, augment, data.flips, balanced)
    global_batch_size = config.batch_sizes(processes).global_batch_size
    train_loader = build_loader(data.train, global_batch_size, processes, device, training)
    eval_batch = eval_batch_size(data.train.images.shape[1:], eval_memory(device)) * processes
    eval_loaders = {
        name: build_loader(split, eval_batch, processes, device)
        for name, split in evaluation_splits(data, config.seed).items()
    }
    return train_loader, eval_loaders


def _identity(batch: Any) -> Any:
    return batch


def evaluation_splits(data: ImageData, seed: int) -> dict[str, Split]:
    """The splits to evaluate: "train", "val" (if any) and "test".

    If there are over twice as many training as test images, "train" is a sample as large as the test split, fixed by
    the seed.
    """
    train, count = data.train, len(data.test)
    if len(train) > 2 * count:
        chosen = np.random.default_rng([seed, 0]).choice(len(train), count, replace=False)
        train = train.take(torch.from_numpy(np.sort(chosen)))
    splits = {"train": train, "val": data.validation, "test": data.test}
    return {part: split for part, split in splits.items() if split is not None}
