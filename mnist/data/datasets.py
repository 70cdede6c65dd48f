"""Data sets: MNIST and those of its form by name, and anybody's folder of pictures by its path.

    data = load_dataset("mnist", "data")
    data = load_dataset("PetImages", "data", DataOptions(image_size=64))

The four files of a data set of MNIST's form are read as they lie on the disk, .gz or raw, and never unpacked there: a
read-only folder will do, and processes that start together cannot race.
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

from mnist.config.settings import DataOptions
from mnist.data.cache import open_cache
from mnist.data.folders import File, Folder, find_files, reasons
from mnist.data.images import Scale
from mnist.data.layout import a_few
from mnist.data.splits import ImageData, MappedImages, Normalization, Split, cut_off
from mnist.errors import ConfigError, UserError
from mnist.launch.streams import printable

TEST_FRACTION = 0.2  # of the images of each class, where a folder does not say what to test on
LEAST_DEVIATION = 1 / 255  # of the pixels of a data set: images of one shade are not blown up to noise
MOST_BYTES = 256 << 20  # of a file of MNIST's form, unpacked: five times those that there are
MOST_NAMED = 6  # classes whose counts are shown


@dataclass(frozen=True)
class Source:
    """Where a data set of MNIST's form lies below --data-dir, and what its files must be."""

    torchvision_class: str
    class_names: tuple[str, ...]
    md5: dict[str, str]  # of the .gz files, as torchvision's classes give them
    flips: bool  # as in ImageData

    def folder(self, data_dir: str | Path) -> Path:
        return Path(data_dir) / self.torchvision_class / "raw"


FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


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
) -> ImageData:
    """A data set of SOURCES, or the images in a folder, decoded into a file in `data_dir`/cache.

    Of SOURCES, torchvision downloads what is not in `data_dir`. Images of a folder are `image_size` pixels wide and
    high; None is 28 where all are gray (so are color files whose channels are equal everywhere) and about that small,
    and 64 otherwise. Where the folder is not split, `test_fraction` of each class, by default a fifth, is for testing.
    To test a model, give its `class_names`, some of which the folder may lack, and its `scale` for images of more than
    8 bits per pixel. Processes that call it at once decode once: the others wait.

    Raises ConfigError for a folder that is no data set, or where a setting leaves no image; UserError for a file that
    is missing or corrupt, where more than a tenth of a folder's images or all of a class cannot be read, or where
    nothing can be written.
    """
    if name not in SOURCES:
        return _load_folder(name, cache_folder(data_dir), options, class_names, scale)
    for setting, value in (("--image-size", options.image_size), ("--test-fraction", options.test_fraction)):
        if value is not None:
            raise ConfigError(f"{setting} {value}: for a folder of images only; {name} is as it was published.")
    return _load_source(name, Path(data_dir), options)


def decode_folder(name: str, data_dir: str | Path, image_size: int | None) -> None:
    """Decode a folder of pictures, unless `name` is one of SOURCES or that has been done; errors as `load_dataset`."""
    if name not in SOURCES:
        open_cache(find_files(name), cache_folder(data_dir), image_size)


def cache_folder(data_dir: str | Path) -> Path:
    """Where decoded folders are kept."""
    return Path(data_dir) / "cache"


# --- folders of pictures


def _load_folder(
    path: str, cache_dir: Path, options: DataOptions, class_names: Sequence[str] | None, scale: Scale | None
) -> ImageData:
    """The images in a folder. Their order is random, but always the same: the first are of all classes."""
    folder = find_files(path, class_names)
    cache = open_cache(folder, cache_dir, options.image_size, scale)
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
            f"--validation-size {options.validation_size}: {folder.path} has val/, which is used for that."
        )
    name = printable(folder.path.name)
    train, validation = cut_off(splits["train"], options.validation_size, options.limit_train_images, name)
    content = [
        *folder.class_names,
        str(cache.scale),
        *(f"{part} {file.label} {digest}" for part, file, digest in zip(parts, files, digests, strict=True)),
    ]
    skipped = sorted(folder.skipped + list(cache.broken.items()))
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
            *_describe_duplicates(files, digests, parts),
        ),
        pixels_md5=hashlib.md5("\n".join(content).encode(), usedforsecurity=False).hexdigest(),
        skipped=tuple((printable(file), reason) for file, reason in skipped),
        normalization=_normalization(train, cache.sums) if len(train) else None,
        scale=cache.scale,
        preparation="fit",
        flips=True,
    )


def _parts_of(folder: Folder, files: Sequence[File], test_fraction: float | None) -> NDArray[np.str_]:
    """Which split each file is in: "train", "val" or "test"."""
    if not folder.is_split:
        return choose_parts(files, TEST_FRACTION if test_fraction is None else test_fraction)
    if test_fraction not in (None, 1):
        raise ConfigError(f"--test-fraction {test_fraction}: {folder.path} says by its folders what to test on.")
    return np.array([file.part for file in files])


def _normalization(train: Split, sums: NDArray[np.int64]) -> Normalization:
    """Of the images to train on, from whole numbers: the same on any machine, in whatever order they are added."""
    assert isinstance(train.images, MappedImages)
    totals = [int(it) for it in sums[train.images.places.numpy()].sum(axis=0)]
    pixels, channels = len(train) * math.prod(train.images.shape[1:3]), len(totals) // 2
    means = [total / pixels for total in totals[:channels]]
    # of whole numbers first: a difference of floating-point numbers might be below zero
    variances = [
        (pixels * squares - total * total) / pixels**2
        for total, squares in zip(totals[:channels], totals[channels:], strict=True)
    ]
    return Normalization(
        tuple(mean / 255 for mean in means), tuple(max(math.sqrt(it) / 255, LEAST_DEVIATION) for it in variances)
    )


def choose_parts(files: Sequence[File], test_fraction: float) -> NDArray[np.str_]:
    """ "test" for that share of the images of each class, at least one and not all; of one alone, and else, "train".

    By a hash of their names, so that files that are added or removed move next to none of the others. A share of 1 is
    all of them.
    """
    parts = np.full(len(files), "train")
    places: dict[int, list[int]] = defaultdict(list)  # of each class
    for place in sorted(range(len(files)), key=lambda it: hashlib.sha256(os.fsencode(files[it].name)).digest()):
        places[files[place].label].append(place)
    for of_class in places.values():
        count = min(max(round(test_fraction * len(of_class)), 1), len(of_class) - (test_fraction < 1))
        parts[of_class[:count]] = "test"
    return parts


def _describe_counts(folder: Folder, labels: Tensor, test: Split) -> str:
    """How many images of each class there are, or of the smallest and the largest where there are many."""
    names = folder.class_names
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    order = sorted(range(len(names)), key=counts.__getitem__)
    if len(names) <= MOST_NAMED:
        told = ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
    else:
        least, most = (f"{counts[label]:,} ({names[label]})" for label in (order[0], order[-1]))
        told = f"{len(names):,} classes, from {least} to {most} images each"
    tested = set(test.labels.tolist())
    untested = [name for label, name in enumerate(names) if label not in tested]
    return f"{told}; none to test on: {a_few(untested)}" if untested else told


def _describe_skipped(folder: Folder, skipped: Sequence[tuple[str, str]]) -> list[str]:
    """A line on the files that are not in the data set, if there are any."""
    if not skipped:
        return []
    files = len(folder.files) + len(folder.skipped)
    return [f"{len(skipped):,} of {files:,} files skipped, listed in skipped.txt: {reasons(skipped)}"]


def _describe_scale(scale: Scale | None) -> list[str]:
    """A line on images of more than 8 bits per pixel, if there are any."""
    return [] if scale is None else [f"more than 8 bits per pixel: {scale[0]:,g} becomes black, {scale[1]:,g} white"]


def _describe_duplicates(files: Sequence[File], digests: Sequence[str], parts: NDArray[np.str_]) -> list[str]:
    """A line on test images that training sees too, pixel for pixel at the size of the data set."""
    known = list(zip(files, digests, parts, strict=True))
    trained_on = {digest: file.name for file, digest, part in known if part == "train"}
    twice = [(file.name, trained_on[digest]) for file, digest, part in known if part == "test" and digest in trained_on]
    if not twice:
        return []
    first, same = (printable(name) for name in twice[0])
    return [
        f"{len(twice):,} of {int((parts == 'test').sum()):,} test images are training images too, pixel for pixel, and"
        f" flatter the accuracy: {first} is {same}{', and so on' if len(twice) > 1 else ''}"
    ]


# --- data sets of MNIST's form


def _load_source(name: str, data_dir: Path, options: DataOptions) -> ImageData:
    source = SOURCES[name]
    folder = source.folder(data_dir)
    if not all(_find(folder, file) for file in FILES):
        _download(name, source, data_dir)
    paths = {file: _find(folder, file) or folder / file for file in FILES}
    # the project carries MNIST as published; other files may have been compressed again, as Debian's are
    strict = {
        file: source.md5[file] if name == "mnist" and path.suffix == ".gz" else None for file, path in paths.items()
    }
    images, labels, test_images, test_labels = (read_idx(path, strict[file]) for file, path in paths.items())
    files = {path: strict[file] or _md5(path) for file, path in paths.items()}  # the former were checked as it was read
    unverified = [path.name for file, path in paths.items() if not strict[file] and files[path] != source.md5[file]]
    train = _split(folder, "train", images, labels, source.class_names)
    test = _split(folder, "t10k", test_images, test_labels, source.class_names)
    train, validation = cut_off(train, options.validation_size, options.limit_train_images, name)
    return ImageData(
        name,
        source.class_names,
        train=train,
        validation=validation,
        test=test.take(slice(0, options.limit_test_images)),
        notes=(f"read, but not byte for byte as published: {', '.join(unverified)}",) if unverified else (),
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
        raise UserError(f"{folder}/{prefix}-*: images and labels of shapes {shapes} do not belong together.")
    if int(labels.max()) >= len(class_names):
        raise UserError(f"{folder}/{prefix}-labels: class {int(labels.max())} of only {len(class_names)} classes.")
    return Split(images, labels.long())


def read_idx(path: Path, md5: str | None = None) -> Tensor:
    """Read an IDX file of bytes, .gz or raw, as uint8 [N, ...]; a .gz file must have the MD5 sum, where one is given.

    Without one the checksum inside the .gz file still finds what is corrupt. Raises UserError, naming the file.
    Format: the MNIST database's page, "THE IDX FILE FORMAT".
    """
    too_large = f"{path}: larger than {MOST_BYTES >> 20} MiB, as no such file is. Delete it and fetch it again."
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(too_large)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    if path.suffix == ".gz":
        if md5 is not None and (found := _md5(path)) != md5:
            raise UserError(
                f"{path}: corrupt, MD5 {found}, expected {md5}. Restore it (git checkout -- {path}) where the project"
                " carries it; otherwise delete it, and it is downloaded again."
            )
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MOST_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a whole .gz file ({error}). Delete it and fetch it again.") from error
        if len(content) > MOST_BYTES:
            raise UserError(too_large)
    # two zero bytes, the type (8: unsigned byte), the number of dimensions, then each dimension as big-endian uint32
    dimensions = content[3] if len(content) >= 4 and content[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * dimensions
    if not 1 <= dimensions <= 3 or len(content) < header:
        raise UserError(f"{path}: not an IDX file of bytes. Delete it and fetch it again.")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if 0 in shape or len(content) - header != math.prod(shape):
        raise UserError(
            f"{path}: {len(content) - header:,} bytes of data where its shape {list(shape)} needs"
            f" {math.prod(shape):,}. Delete it and fetch it again."
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def _download(name: str, source: Source, data_dir: str | Path) -> None:
    """Let torchvision fetch the files into `data_dir`; say where to put them by hand where it cannot."""
    import torchvision

    print(f"Downloading {name} into {data_dir} ...", flush=True)
    try:
        getattr(torchvision.datasets, source.torchvision_class)(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        missing = [f"{file}.gz" for file in FILES if not _find(source.folder(data_dir), file)]
        raise UserError(
            f"--dataset {name}: cannot be downloaded into {data_dir} ({error}).\n"
            f"Put these files into {source.folder(data_dir)} by hand, as .gz or unpacked, and start again:\n"
            + "\n".join(f"  {file}  (MD5 {source.md5[file.removesuffix('.gz')]})" for file in missing)
            + ("\nThe project carries them: git checkout -- data" if name == "mnist" else "")
        ) from error
