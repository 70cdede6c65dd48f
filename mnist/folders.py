"""A person's folder of pictures -> a data set, decoded once into a file that all processes of a machine map.

    data = load_folder("PetImages", "data/cache")
    data.train.images        # MappedImages, uint8 [N, 64, 64, 3], or [N, 28, 28] where all pictures are grey
    data.notes               # what was found, one line each
    data.skipped             # (("Cat/666.jpg", "an empty file"), ...)

The folder holds a folder a class, or train/ and test/ (or val/) with a folder a class in each. Images may lie deeper.
The cache's name tells the folder and the settings, and the state of its files: whatever is added, removed or changed,
by name, size or time, has it made anew. How the images are split is no part of it.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import struct
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mnist.data import ImageData, MappedImages, Split, cut_off
from mnist.errors import ConfigError, UserError
from mnist.hardware import CORES
from mnist.images import IMAGE_SUFFIXES, any_in_colour, decode_images, follow_parent, printable
from mnist.storage import flush, remove_leftovers, storage_errors, temporary_name

FORMAT = 1  # of the cache, and of how images are read and fitted: a new number has all caches made anew
FOOTER = struct.Struct("<Q8s")  # at the end of a cache: the length of the text before it, and who wrote it
MAGIC = b"mnist-u8"
GREY_SIZE, COLOUR_SIZE = 28, 64
TEST_FRACTION = 0.2  # of the images of each class, where the folder does not say what to test on
MOST_BROKEN = 0.1  # of the files that should be images
CHUNK = 16  # images that a process decodes before it hands them over
MOST_NAMED = 6  # classes whose counts are shown
SPARE_BYTES = 64 << 20  # on the disk, when the cache has been written
PARTS = {  # how a split's folders are called
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
LINK_OUT = "a link that leads out of the folder"
LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}

Answer = TypeVar("Answer")
Task = tuple[Path, str]  # a file, and its name below the folder


class File(NamedTuple):
    """A file that should be an image."""

    name: str  # below the folder, with slashes
    label: int
    part: str  # "train", "val" or "test", where the folder says so
    stamp: tuple[int, ...]  # by which a change of it is noticed


@dataclass
class Folder:
    """What a walk through a folder finds, before any image is opened."""

    path: Path  # without links
    given: str  # as the command line names it
    class_names: tuple[str, ...] = ()
    files: list[File] = field(default_factory=list)  # sorted by part, class and name
    is_split: bool = False  # into train/ and test/ or val/, or all three
    skipped: list[tuple[str, str]] = field(default_factory=list)  # what is no image, and why
    notes: list[str] = field(default_factory=list)

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"--dataset {printable(self.given)}: {problem}")


class Cache(NamedTuple):
    """A decoded folder: the images that could be read, in the order of its files."""

    images: MappedImages
    digests: list[str]  # of each image
    broken: dict[str, str]  # the names of the other files, and why


def load_folder(
    path: str | Path,
    cache_dir: str | Path,
    limit_train_images: int | None = None,
    limit_test_images: int | None = None,
    validation_size: int = 0,
    image_size: int | None = None,
    test_fraction: float | None = None,
) -> ImageData:
    """Read a folder of pictures, decoding it into a file in `cache_dir` unless that has been done.

    Images are `image_size` pixels wide and high; None stands for 28 where all are grey, which includes colour files
    whose channels are equal everywhere, and for 64 otherwise. Where the folder is not split, `test_fraction` of each
    class, a fifth unless told otherwise, is for testing, at least one image and, of a share below 1, not all. The order
    of the images is a random one, but always the same, so that the first and the last are of all classes. Processes
    that call it at once decode once: the others wait.

    Raises ConfigError for a folder that is no data set, or where a setting leaves no image, and UserError where more
    than a tenth of the images, or all of a class, cannot be read, or the cache cannot be written.
    """
    folder = find_files(path)
    cache = open_cache(folder, Path(cache_dir), image_size)
    files = [file for file in folder.files if file.name not in cache.broken]
    labels = torch.tensor([file.label for file in files])
    rng = np.random.default_rng(0)
    if folder.is_split and test_fraction is not None:
        raise ConfigError(f"--test-fraction {test_fraction}: {folder.given} says by its folders what to test on.")
    if folder.is_split:
        parts = np.array([file.part for file in files])
    else:
        parts = choose_parts(files, TEST_FRACTION if test_fraction is None else test_fraction)
    splits = {
        part: Split(cache.images, labels).take(torch.from_numpy(rng.permutation(np.flatnonzero(parts == part))))
        for part in ("train", "val", "test")
    }
    train, test = splits["train"], splits["test"]
    if not len(test):
        raise folder.error("no class has two images, one to train on and one to test on. Add some.")
    skipped = sorted(folder.skipped + list(cache.broken.items()))
    notes = [_describe_counts(folder, labels, test), *folder.notes]
    if skipped:
        notes.append(
            f"{len(skipped):,} of {len(folder.files) + len(folder.skipped):,} files skipped, listed in skipped.txt:"
            f" {_reasons(skipped)}"
        )
    notes += _describe_duplicates(files, cache.digests, parts)
    name = printable(folder.path.name)
    if validation_size and len(splits["val"]):
        raise ConfigError(f"--validation-size {validation_size}: {folder.given} has val/, which is used for that.")
    train, validation = cut_off(train, validation_size, limit_train_images, name)
    content = [
        *folder.class_names,
        *(f"{file.label} {it}" for file, it in zip(files, cache.digests, strict=True)),
    ]
    return ImageData(
        name,
        folder.class_names,
        train=train,
        validation=splits["val"] if len(splits["val"]) else validation,
        test=test.take(slice(0, limit_test_images)),
        notes=tuple(notes),
        pixels_md5=hashlib.md5("\n".join(content).encode(), usedforsecurity=False).hexdigest(),
        skipped=tuple((printable(file), reason) for file, reason in skipped),
        preparation="fit",
        flips=True,
    )


def choose_parts(files: Sequence[File], test_fraction: float) -> NDArray[np.str_]:
    """ "test" for that share of the images of each class, at least one and not all; of one alone, and else, "train".

    By a hash of their names, so that files that are added or removed move next to none of the others. A share of 1 is
    all of them.
    """
    parts = np.full(len(files), "train")
    order = sorted(range(len(files)), key=lambda place: hashlib.sha256(os.fsencode(files[place].name)).digest())
    for label in {file.label for file in files}:
        places = [place for place in order if files[place].label == label]
        count = min(max(round(test_fraction * len(places)), 1), len(places) - (test_fraction < 1))
        parts[places[:count]] = "test"
    return parts


# --- what lies in the folder


def find_files(path: str | Path) -> Folder:
    """Walk through a folder of pictures; raises ConfigError where it is no data set."""
    folder = Folder(Path(path).resolve(), str(path))
    if not folder.path.exists():
        raise folder.error("no such folder. Where it lies elsewhere now, name it there: --dataset PATH")
    if not folder.path.is_dir():
        raise folder.error("a file, where a folder with a folder a class is needed.")
    try:
        _find_classes(folder)
    except OSError as error:
        where = printable(str(error.filename or folder.path))
        raise UserError(f"--dataset {printable(folder.given)}: {where} cannot be read: {error.strerror}.") from error
    return folder


def _find_classes(folder: Folder) -> None:
    top = _subfolders(folder, "")
    if linked := [name for name, reason in folder.skipped if reason == LINK_OUT]:
        folder.notes.append(f"left out, for they are links that lead out of the folder: {printable(_a_few(linked))}")
    called = {PARTS[name.lower()]: name for name in sorted(top, reverse=True) if name.lower() in PARTS}
    test_part = "test" if "test" in called else "val"
    if {"train", test_part} <= called.keys():
        folder.is_split = True
        parts = {part: _subfolders(folder, called[part]) for part in ("train", "val", "test") if part in called}
        if others := sorted(top.keys() - {called[part] for part in parts}):
            read = "/, ".join(called[part] for part in parts)
            folder.notes.append(f"beside {read}/, not read: {printable(', '.join(others))}")
    elif top and len(called) == len(top):
        raise folder.error(
            f"{'/, '.join(sorted(top))}/ is there, but not both train/ and test/ (or val/). Put the images to train on"
            " and those to test on there; or name the folder in which the classes are, and a share is taken for"
            f" testing: --dataset {printable(str(Path(folder.given, sorted(top)[0])))}"
        )
    else:
        parts = {"train": top}
    names = sorted(parts["train"])
    folder.class_names = tuple(printable(name) for name in names)
    place = f"{folder.given}/train" if folder.is_split else folder.given
    if not names:
        raise folder.error(
            f"{printable(place)} holds no folders. Make a folder for each class, and put the images of the class there."
        )
    if len(names) == 1:
        raise folder.error(f"one class only, {printable(names[0])}: there is nothing to tell apart. Add a folder.")
    for part, classes in parts.items():
        if missing := sorted(set(classes) - set(names)):
            raise folder.error(
                f"{part}/ has classes that train/ lacks: {printable(_a_few(missing))}. Training cannot learn them:"
                " move them out of there, or add images of theirs to train/."
            )
    for part, classes in parts.items():
        for label, name in enumerate(names):
            found = sorted(_images_below(folder, classes[name])) if name in classes else []
            # what is called val/ beside train/ alone is what to test on
            role = part if test_part == "test" or part == "train" else "test"
            folder.files += [File(it, label, role, _stamp(folder.path / it)) for it in found]
            if not found and part == "train":
                below = [it for it in folder.skipped if it[0].startswith(f"{classes[name]}/")]
                raise folder.error(
                    f"{printable(classes[name])}/ holds no image"
                    f"{f', only what is skipped: {_reasons(below)}' if below else ''}. Put some there, or remove it."
                )
    if folder.is_split and not any(file.part == "test" for file in folder.files):
        raise folder.error(f"{test_part}/ holds no image of a class. Put some there, or remove it.")


def _subfolders(folder: Folder, parent: str) -> dict[str, str]:
    """The folders in a folder: their names -> where they are below the data set's. Its files are noted as skipped."""
    found = {}
    for entry in _entries(folder, parent):
        if os.path.isdir(entry.path):
            found[entry.name] = _below(parent, entry.name)
        else:
            folder.skipped.append((_below(parent, entry.name), "in no class's folder"))
    return found


def _images_below(folder: Folder, top: str) -> Iterator[str]:
    """The names of what should be an image in a folder and below."""
    seen, to_do = set(), [top]
    while to_do:
        parent = to_do.pop()
        real = os.path.realpath(folder.path / parent)
        if real in seen:  # links may go in circles
            continue
        seen.add(real)
        for entry in _entries(folder, parent):
            name = _below(parent, entry.name)
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                to_do.append(name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                yield name
            else:
                folder.skipped.append((name, "not called as images are"))


def _entries(folder: Folder, parent: str) -> Iterator["os.DirEntry[str]"]:
    """What is in a folder, but for what has no business there, which is noted as skipped."""
    with os.scandir(folder.path / parent) as entries:
        for entry in entries:
            reason = None
            if entry.name.startswith("."):
                reason = "hidden"
            elif entry.name.lower() in LEFT_BY_SYSTEMS:
                reason = "left by a system"
            elif entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(folder.path):
                reason = LINK_OUT
            if reason is None:
                yield entry
            else:
                folder.skipped.append((_below(parent, entry.name), reason))


def _below(parent: str, name: str) -> str:
    return f"{parent}/{name}" if parent else name


def _stamp(path: Path) -> tuple[int, ...]:
    """Size, time of the last change, and mode: a file that was forbidden may have become readable."""
    try:
        found = path.stat()
    except OSError:  # a link to nothing, say: counted with those that cannot be read
        return ()
    return (found.st_size, found.st_mtime_ns, found.st_mode)


# --- the cache: all pixels, then a JSON text with the rest, then FOOTER; one file, so that it is there whole or not


def open_cache(folder: Folder, cache_dir: Path, image_size: int | None) -> Cache:
    """The folder's images, decoded by this process or by another, now or earlier.

    Other caches of the folder with the same settings are of files as they were, and removed: a job that still maps
    one keeps it until it ends.
    """
    place = hashlib.sha256(os.fsencode(f"{folder.path}\0{image_size}"))
    state = hashlib.sha256(os.fsencode("\n".join(f"{it.name}\0{it.stamp}" for it in folder.files)))
    state.update(f"\0{FORMAT}".encode())
    stem = f"{printable(folder.path.name)[:40]}-{place.hexdigest()[:8]}"
    path = cache_dir / f"{stem}-{state.hexdigest()[:16]}.u8"
    if (cache := _read(path)) is not None:
        return cache
    with _turn(folder, cache_dir):
        if (cache := _read(path)) is None:
            remove_leftovers(cache_dir)
            with storage_errors(path, "start again."):
                _build(folder, path, image_size)
            for other in cache_dir.glob("*.u8"):
                if other != path and re.fullmatch(re.escape(stem) + r"-[0-9a-f]{16}\.u8", other.name):
                    other.unlink(missing_ok=True)
            cache = _read(path)
    if cache is None:
        raise UserError(f"{path}: gone, or changed, as soon as it was written. Start again.")
    return cache


def _read(path: Path) -> Cache | None:
    """A cache, mapped; None where there is none, or what is there is not whole."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - FOOTER.size))
            length, magic = FOOTER.unpack(file.read().rjust(FOOTER.size))
            if magic != MAGIC or length > size - FOOTER.size:
                return None
            file.seek(size - FOOTER.size - length)
            text = json.loads(file.read(length))
        if math.prod(text["shape"]) + length + FOOTER.size != size:
            return None
        return Cache(MappedImages(path, tuple(text["shape"])), text["digests"], text["broken"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Mend that, or remove it.") from error
    except (ValueError, KeyError, TypeError):  # another's text
        return None


@contextlib.contextmanager
def _turn(folder: Folder, cache_dir: Path) -> Iterator[None]:
    """Hold the lock on the folder of caches, and say so where another process has had it for over a second."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir / ".lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one of a job says it for all
                print(f"Waiting for another process, which decodes images into {cache_dir} ...", flush=True)
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"{cache_dir}: cannot be written ({error.strerror}), and {printable(folder.path.name)} is not decoded there"
            " yet. Name a folder for data that can: --data-dir PATH"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _build(folder: Folder, path: Path, image_size: int | None) -> None:
    """Decode a folder into a cache, on all cores; nothing is left of it where that fails."""
    tasks = [(folder.path / file.name, file.name) for file in folder.files]
    temporary = temporary_name(path, "new")
    with _pool(folder, len(tasks)) as pool:
        colour = any(_on_all_cores(pool, any_in_colour, tasks))  # up to the first
        size = image_size or (COLOUR_SIZE if colour else GREY_SIZE)
        shape = (size, size, 3) if colour else (size, size)
        _announce(folder, path, shape)
        digests, broken = [], {}
        try:
            with (
                temporary.open("wb") as file,
                tqdm(total=len(tasks), unit=" images", leave=False, file=sys.stderr, disable=None) as bar,
            ):
                decoded = _on_all_cores(pool, partial(decode_images, size=size, colour=colour), tasks)
                for (_, name), image in zip(tasks, (image for images in decoded for image in images), strict=True):
                    if isinstance(image, str):
                        broken[name] = image
                    else:
                        file.write(image.pixels)
                        digests.append(image.digest.hex())
                    bar.update()
                _check_readable(folder, broken)
                text = json.dumps({"shape": [len(digests), *shape], "digests": digests, "broken": broken}).encode()
                file.write(text + FOOTER.pack(len(text), MAGIC))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _announce(folder: Folder, path: Path, shape: tuple[int, ...]) -> None:
    """Say how large the cache is going to be; raises UserError where the disk has no room for it."""
    size, free = len(folder.files) * math.prod(shape), shutil.disk_usage(path.parent).free
    mebibytes = f"{math.ceil(size / 2**20):,} MiB"
    name, pixels = printable(folder.path.name), f"{shape[0]} x {shape[1]}"
    if size + SPARE_BYTES > free:
        raise UserError(
            f"{path.parent}: {mebibytes} are needed for the {len(folder.files):,} images of {name} at {pixels}, and"
            f" {SPARE_BYTES >> 20} MiB to spare; {free >> 20:,} MiB are free. Make room, name another disk with"
            " --data-dir, or a smaller --image-size."
        )
    colour = "colour" if len(shape) == 3 else "grey"
    print(f"Decoding {len(folder.files):,} images of {name} at {pixels} in {colour} into {path} ({mebibytes}) ...")
    sys.stdout.flush()


def _check_readable(folder: Folder, broken: dict[str, str]) -> None:
    """Raises UserError where too many images cannot be read to be sure that this is meant, or all of a class."""
    if len(broken) > MOST_BROKEN * len(folder.files):
        raise UserError(
            f"--dataset {printable(folder.given)}: {len(broken):,} of {len(folder.files):,} images cannot be read, over"
            f" one in ten: {_reasons(broken.items())}. For example {_a_few([printable(name) for name in broken])}."
            " Mend or remove them."
        )
    for part in {file.part for file in folder.files}:
        left = {file.label for file in folder.files if file.part == part and file.name not in broken}
        if not left:
            raise UserError(f"--dataset {printable(folder.given)}: no image of the {part} part can be read. Mend some.")
        for label, name in enumerate(folder.class_names):
            if label not in left and part == "train":
                lost = [
                    (file.name, broken[file.name]) for file in folder.files if (file.label, file.part) == (label, part)
                ]
                raise UserError(
                    f"--dataset {printable(folder.given)}: no image of the class {name} can be read: {_reasons(lost)}."
                    " Mend some, or remove its folder."
                )


# --- all cores


@contextlib.contextmanager
def _pool(folder: Folder, images: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes to decode with, one a core; None where that is not worth their start."""
    workers = min(len(CORES), images // CHUNK)
    if workers < 2:
        yield None
        return
    # started anew: a process that has loaded torch has threads, and a fork of it may hang
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=follow_parent)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"--dataset {printable(folder.given)}: a process that decoded images was ended from outside, perhaps for"
            " want of memory. Start again, with more of it, or with fewer cores (taskset)."
        ) from error
    finally:
        # After Ctrl-C or on a full disk too they end what they are at, a few chunks: one that is ended while it hands
        # something over has this process wait for the rest of it for ever, and so does one that is not waited for.
        pool.shutdown(wait=True, cancel_futures=True)


def _on_all_cores(
    pool: ProcessPoolExecutor | None, work: Callable[[Sequence[Task]], Answer], tasks: Sequence[Task]
) -> Iterator[Answer]:
    """work(chunk) for one chunk of the tasks after another, in their order, and only so far ahead as memory allows."""
    chunks = (tasks[start : start + CHUNK] for start in range(0, len(tasks), CHUNK))
    if pool is None:
        yield from map(work, chunks)
        return
    waiting: deque[Future[Any]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > 4 * len(CORES):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


# --- what is said


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
    untested = [name for label, name in enumerate(names) if label not in set(test.labels.tolist())]
    return f"{told}; none to test on: {_a_few(untested)}" if untested else told


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


def _reasons(skipped: Any) -> str:
    """(name, reason) -> `an empty file (2), hidden (1)`, without what differs from one file to the next."""
    kinds = Counter(re.split(r" \(|; |, or ", re.sub(r"^\d+ x \d+ (is |pixels, )?", "", it))[0] for _, it in skipped)
    return ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common())


def _a_few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
