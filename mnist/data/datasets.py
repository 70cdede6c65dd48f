"""Load a dataset: MNIST or one in its format by name, or a folder of images by its path.

    data = load_dataset("mnist", "data")
    data = load_dataset("PetImages", "data", DataOptions(image_size=64, fit="pad"))

MNIST's files, .gz or raw, are never unpacked on disk: the folder may be read-only, and processes that start together
cannot race.
"""

import gzip
import hashlib
import io
import math
import os
import struct
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist.config.settings import DataOptions, flag
from mnist.data.cache import open_cache
from mnist.data.folders import File, Folder, check_folder, find_files, reasons
from mnist.data.images import Scale
from mnist.data.layout import a_few
from mnist.data.listing import Listing
from mnist.data.splits import ImageData, MappedImages, Normalization, Split, cut_off
from mnist.errors import ConfigError, UserError
from mnist.launch.streams import printable

TEST_FRACTION = 0.2  # of each class, if a folder has no test split
MIN_DEVIATION = 1 / 255  # least standard deviation, so that normalizing does not amplify noise in uniform images
MAX_UNPACKED_BYTES = 256 << 20  # of an unpacked file in MNIST's format: five times the largest known one
MAX_CLASSES_NAMED = 6  # with more classes, only the smallest and largest counts are shown
FILES = tuple(
    f"{kind}-ubyte" for kind in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
)


@dataclass(frozen=True)
class Source:
    """A dataset in MNIST's format, in --data-dir/torchvision_class/raw."""

    torchvision_class: str
    class_names: tuple[str, ...]
    md5: dict[str, str]  # of the .gz files, from torchvision's classes
    flips: bool  # as in ImageData

    def folder(self, data_dir: str | Path) -> Path:
        return Path(data_dir) / self.torchvision_class / "raw"


def _source(torchvision_class: str, class_names: str, *md5: str, flips: bool = False) -> Source:
    return Source(torchvision_class, tuple(class_names.split(", ")), dict(zip(FILES, md5, strict=True)), flips)


SOURCES = {
    "mnist": _source(
        "MNIST",
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": _source(
        "FashionMNIST",
        "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
        flips=True,
    ),
    "kmnist": _source(
        "KMNIST",
        "o, ki, su, tsu, na, ha, ma, ya, re, wo",
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
}


def load_dataset(
    name: str,
    data_dir: str | Path,
    options: DataOptions = DataOptions(),
    class_names: Sequence[str] | None = None,
    scale: Scale | None = None,
    color: bool | None = None,
) -> ImageData:
    """One of SOURCES, or the images of a folder, decoded into a file in `data_dir`/cache.

    torchvision downloads missing files of SOURCES. Images of a folder become `image_size` pixels square; by default 28
    if all are gray (even if stored in color) and about that small, otherwise 64. A folder without splits is split by
    `test_fraction`, by default a fifth of each class. To test a model, pass its `class_names`, whether its images
    are in `color`, and its `scale` of images with more than 8 bits per pixel. If several processes call this at once,
    only one of them decodes.

    Raises ConfigError if a folder is not a dataset or a setting leaves no image; UserError if a file is missing or
    corrupt, over a tenth of a folder's images or all of a class cannot be read, or nothing can be written.
    """
    check_dataset(name, options)
    if name not in SOURCES:
        return _load_folder(name, Path(data_dir) / "cache", options, class_names, scale, color)
    return _load_source(name, Path(data_dir), options)


def check_dataset(name: str, options: DataOptions) -> None:
    """Raise ConfigError for a folder that is not there, or a setting of folders for another dataset."""
    if name not in SOURCES:
        check_folder(Folder(Path(name).resolve()))
        return
    for setting in ("image_size", "test_fraction", "fit"):
        if (value := getattr(options, setting)) != DataOptions._field_defaults[setting]:
            raise ConfigError(
                f"{flag(setting)} {value}: for a folder of images only, not for {name}. Name a folder: --dataset FOLDER"
            )


def decode_folder(name: str, data_dir: str | Path, options: DataOptions = DataOptions()) -> None:
    """Decode the folder `name`, if it is one and is not decoded yet. Raises the errors of `load_dataset`."""
    if name not in SOURCES:
        open_cache(find_files(name), Path(data_dir) / "cache", options.image_size, options.fit)


# --- folders of images


def _load_folder(
    path: str,
    cache_dir: Path,
    options: DataOptions,
    class_names: Sequence[str] | None,
    scale: Scale | None,
    color: bool | None,
) -> ImageData:
    """The images of a folder, shuffled with a fixed seed so that the first N include all classes."""
    folder = find_files(path, class_names)
    cache = open_cache(folder, cache_dir, options.image_size, options.fit, scale, color)
    files = [file for file in folder.files if file.name not in cache.broken]
    labels = torch.tensor([file.label for file in files])
    digests = [digest.tobytes().hex() for digest in cache.digests]
    parts = _parts_of(folder, files, options.test_fraction)
    rng = np.random.default_rng(0)
    splits = {
        part: Split(cache.images, labels).take(torch.from_numpy(rng.permutation(np.flatnonzero(parts == part))))
        for part in ("train", "val", "test")
    }
    if not len(splits["test"]):
        raise folder.error("no class has two images, one to train on and one to test on. Add some.")
    if options.validation_size and len(splits["val"]):
        raise ConfigError(
            f"--validation-size {options.validation_size}: {folder.path} has its own val/. Omit the flag."
        )
    name = printable(folder.path.name)
    train, validation = cut_off(splits["train"], options.validation_size, options.limit_train_images, name)
    rows = [f"{part} {file.label} {digest}" for part, file, digest in zip(parts, files, digests, strict=True)]
    content = "\n".join([*folder.class_names, str(cache.scale), *rows])
    skipped = sorted(folder.skipped + list(cache.broken.items()))
    if validation is not None:  # --validation-size
        assert isinstance(validation.images, MappedImages)
        parts[validation.images.file_indices.numpy()] = "val"
    listing = Listing.of(cache, files, parts)
    return ImageData(
        name,
        folder.class_names,
        train=train,
        validation=splits["val"] if len(splits["val"]) else validation,
        test=splits["test"].take(slice(0, options.limit_test_images)),
        notes=(
            _describe_counts(folder, labels, splits["test"]),
            *folder.notes,
            *_describe_skipped(folder, skipped),
            *_describe_scale(cache.scale),
            *listing.notes(),
        ),
        pixels_md5=hashlib.md5(content.encode(), usedforsecurity=False).hexdigest(),
        skipped=tuple((printable(file), reason) for file, reason in skipped),
        normalization=_normalization(train, cache.sums) if len(train) else None,
        scale=cache.scale,
        preparation=options.fit,
        flips=True,
        listing=listing,
    )


def _parts_of(folder: Folder, files: Sequence[File], test_fraction: float | None) -> NDArray[np.str_]:
    """Which split each file is in: "train", "val" or "test"."""
    if not folder.is_split:
        return choose_parts(files, TEST_FRACTION if test_fraction is None else test_fraction)
    if test_fraction not in (None, 1):
        raise ConfigError(f"--test-fraction {test_fraction}: {folder.path} has its own test split. Omit the flag.")
    return np.array([file.part for file in files])


def _normalization(train: Split, sums: NDArray[np.int64]) -> Normalization:
    """Mean and standard deviation of the training images, from integers: exact in any order and on any machine."""
    assert isinstance(train.images, MappedImages)
    totals = [int(total) for total in sums[train.images.file_indices.numpy()].sum(axis=0)]
    pixels, channels = len(train) * math.prod(train.images.shape[1:3]), len(totals) // 2
    mean, std = [], []
    for total, squares in zip(totals[:channels], totals[channels:], strict=True):
        mean.append(total / pixels / 255)
        variance = (pixels * squares - total * total) / pixels**2  # exact; with floats it might be negative
        std.append(max(math.sqrt(variance) / 255, MIN_DEVIATION))
    return Normalization(tuple(mean), tuple(std))


def choose_parts(files: Sequence[File], test_fraction: float) -> NDArray[np.str_]:
    """The split of each file: "test" for `test_fraction` of each class, at least one image but not all, else "train".

    Files are chosen by a hash of their names, so adding or removing some rarely moves others. 1 takes all of them.
    """
    parts = np.full(len(files), "train")
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(files)), key=lambda index: hashlib.sha256(os.fsencode(files[index].name)).digest()):
        by_class[files[index].label].append(index)
    for indices in by_class.values():
        count = min(max(round(test_fraction * len(indices)), 1), len(indices) - (test_fraction < 1))
        parts[indices[:count]] = "test"
    return parts


def _describe_counts(folder: Folder, labels: Tensor, test: Split) -> str:
    """The number of images per class; if there are many classes, of the smallest and the largest."""
    names = folder.class_names
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    order = sorted(range(len(names)), key=counts.__getitem__)
    if len(names) <= MAX_CLASSES_NAMED:
        text = ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
    else:
        least, most = (f"{counts[label]:,} ({names[label]})" for label in (order[0], order[-1]))
        unequal = counts[order[0]] < counts[order[-1]]
        text = f"{len(names):,} classes, {f'from {least} to {most}' if unequal else f'{counts[0]:,}'} images each"
    untested = [names[label] for label in sorted(set(range(len(names))) - set(test.labels.tolist()))]
    return f"{text}; no test images: {a_few(untested)}" if untested else text


def _describe_skipped(folder: Folder, skipped: Sequence[tuple[str, str]]) -> list[str]:
    files = len(folder.files) + len(folder.skipped)
    note = f"{len(skipped):,} of {files:,} files skipped: {reasons(skipped)}"
    return [note] if skipped else []


def _describe_scale(scale: Scale | None) -> list[str]:
    return [] if scale is None else [f"more than 8 bits per pixel: {scale[0]:,g} maps to black, {scale[1]:,g} to white"]


# --- datasets in MNIST's format


def _load_source(name: str, data_dir: Path, options: DataOptions) -> ImageData:
    source = SOURCES[name]
    folder = source.folder(data_dir)
    if not all(_find(folder, file) for file in FILES):
        _download(name, source, data_dir)
    paths = {file: _find(folder, file) or folder / file for file in FILES}
    # MNIST must be the published files, as in the repository; others may have been recompressed, such as Debian's
    strict = {file: source.md5[file] for file, path in paths.items() if name == "mnist" and path.suffix == ".gz"}
    images, labels, test_images, test_labels = (read_idx(path, strict.get(file)) for file, path in paths.items())
    files = {path: strict.get(file) or _md5(path) for file, path in paths.items()}
    unverified = [path.name for file, path in paths.items() if files[path] != source.md5[file]]
    train = _split(folder, "train", images, labels, source.class_names)
    test = _split(folder, "t10k", test_images, test_labels, source.class_names)
    train, validation = cut_off(train, options.validation_size, options.limit_train_images, name)
    return ImageData(
        name,
        source.class_names,
        train=train,
        validation=validation,
        test=test.take(slice(0, options.limit_test_images)),
        notes=(f"checksums differ from those of the published files: {', '.join(unverified)}",) if unverified else (),
        files=files,
        preparation="digit" if name == "mnist" else "none",
        flips=source.flips,
    )


def _find(folder: Path, file: str) -> Path | None:
    candidates = (folder / f"{file}.gz", folder / file)
    return next((path for path in candidates if path.is_file()), None)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _split(folder: Path, prefix: str, images: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> Split:
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or len(images) == 0:
        shapes = f"{list(images.shape)} and {list(labels.shape)}"
        raise UserError(f"{folder}/{prefix}-*: images and labels have shapes {shapes}, which do not match.")
    if (largest := int(labels.max())) >= len(class_names):
        count = len(class_names)
        raise UserError(f"{folder}/{prefix}-labels: contains label {largest}, but there are only {count} classes.")
    return Split(images, labels.long())


def read_idx(path: Path, md5: str | None = None) -> Tensor:
    """Read an IDX file of bytes, .gz or raw, as uint8 [N, ...]. If `md5` is given, check it (.gz files only).

    Raises UserError with the file's name. Format: "THE IDX FILE FORMAT" on the MNIST database's page.
    """
    again = "Delete it and download it again."
    too_large = f"{path}: over {MAX_UNPACKED_BYTES >> 20} MiB, too large for a dataset in MNIST's format. {again}"
    try:
        if path.stat().st_size > MAX_UNPACKED_BYTES:
            raise UserError(too_large)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    if path.suffix == ".gz":
        if md5 is not None and (actual := _md5(path)) != md5:
            raise UserError(
                f"{path}: corrupt, MD5 {actual}, expected {md5}. Restore it (git checkout -- {path}) if it is in the"
                " repository; otherwise delete it to have it downloaded again."
            )
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_UNPACKED_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a complete .gz file ({error}). {again}") from error
        if len(content) > MAX_UNPACKED_BYTES:
            raise UserError(too_large)
    # two zero bytes, the type (8: unsigned byte), the number of dimensions, then each dimension as big-endian uint32
    dimensions = content[3] if len(content) >= 4 and content[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * dimensions
    if not 1 <= dimensions <= 3 or len(content) < header:
        raise UserError(f"{path}: not an IDX file of bytes. {again}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    size, expected = len(content) - header, math.prod(shape)
    if expected == 0 or size != expected:
        raise UserError(f"{path}: {size:,} bytes of data, but its shape {list(shape)} needs {expected:,}. {again}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def _download(name: str, source: Source, data_dir: str | Path) -> None:
    """Let torchvision download the files into `data_dir`."""
    import torchvision

    print(f"Downloading {name} into {data_dir} ...", flush=True)
    try:
        getattr(torchvision.datasets, source.torchvision_class)(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        missing = [f"{file}.gz" for file in FILES if not _find(source.folder(data_dir), file)]
        raise UserError(
            f"--dataset {name}: download into {data_dir} failed ({error}).\n"
            f"Put these files into {source.folder(data_dir)}, as .gz or unpacked, and start again:\n"
            + "\n".join(f"  {file}  (MD5 {source.md5[file.removesuffix('.gz')]})" for file in missing)
            + ("\nThey are in the repository: git checkout -- data" if name == "mnist" else "")
        ) from error
