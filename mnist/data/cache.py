"""The pictures of a folder, decoded once into a file that all processes of a machine map.

cache = open_cache(find_files("PetImages"), Path("data/cache"), image_size=None)
cache.images        # MappedImages, uint8 [N, 64, 64, 3], or [N, 64, 64] where all are grey

The file's name tells the folder and the size, and the state of the folder's files: whatever is added, removed or
changed, by name, size or time, has it made anew. How the images are split is no part of it. It holds all pixels, then
digest and sums of each image, a JSON text with the rest, and FOOTER: one file, so that it is there whole or not.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from mnist.data.folders import Folder, reasons
from mnist.data.images import Scale, decode_images, follow_parent, ranges_of, scale_of, survey_images
from mnist.data.layout import a_few
from mnist.data.splits import MappedImages
from mnist.errors import UserError
from mnist.files import flush, knows_locks, remove_leftovers, storage_errors, temporary_name
from mnist.launch.hardware import available_cores
from mnist.launch.streams import printable

FORMAT = 2  # of the file, and of how images are read and fitted: a new number has all of them made anew
FOOTER = struct.Struct("<Q8s")  # at the end: the length of the text before it, and who wrote it
MAGIC = b"mnist-u8"
SIZE, SMALL_SIZE = 64, 28
LARGEST_SIDE = 1024  # pixels, as of --image-size
ABOUT_SMALL = 32  # pixels of the shorter side, at the median, up to which grey images become small ones
MOST_BROKEN = 0.1  # of the files that should be images
CHUNK = 16  # images that a process decodes before it hands them over
SPARE_BYTES = 64 << 20  # on the disk, when the file has been written

Answer = TypeVar("Answer")
Task = tuple[Path, str]  # a file, and its name below the folder


class Cache(NamedTuple):
    """A decoded folder: the images that could be read, in the order of its files."""

    images: MappedImages
    digests: NDArray[np.uint8]  # [N, 16]
    sums: NDArray[np.int64]  # [N, 2 x channels]: of the pixels of each channel, then of their squares
    broken: dict[str, str]  # the names of the other files, and why
    scale: Scale | None  # of the images of more than 8 bits per pixel, where there are some


def record_type(channels: int) -> np.dtype[Any]:
    """What follows the pixels for each image."""
    return np.dtype([("digest", np.uint8, (16,)), ("sums", "<i8", (2 * channels,))])


def open_cache(folder: Folder, cache_dir: Path, image_size: int | None, scale: Scale | None = None) -> Cache:
    """The folder's images, decoded by this process or by another, now or earlier.

    `scale` is that of a model for images of more than 8 bits per pixel; without one the folder gets its own.

    Other caches of the folder with the same settings are of files as they were, and removed: a job that still maps
    one keeps it until it ends.
    """
    place = hashlib.sha256(os.fsencode(f"{folder.path}\0{image_size}{'' if scale is None else scale}"))
    state = hashlib.sha256(os.fsencode("\n".join(f"{it.name}\0{it.stamp}" for it in folder.files)))
    state.update(f"\0{FORMAT}".encode())
    stem = f"{printable(folder.path.name)[:40]}-{place.hexdigest()[:8]}"
    path = cache_dir / f"{stem}-{state.hexdigest()[:16]}.u8"
    if path.is_dir():
        raise UserError(f"{path}: a folder, where the decoded images are to be. Remove it.")
    if (cache := _read(path, folder, image_size)) is not None:
        return cache
    with _turn(folder, cache_dir) as locked:
        if (cache := _read(path, folder, image_size)) is None:
            if locked:  # else others may be writing theirs
                remove_leftovers(cache_dir)
            with storage_errors(path, "start again."):
                _build(folder, path, image_size, scale)
            for other in cache_dir.glob("*.u8"):
                if other != path and re.fullmatch(re.escape(stem) + r"-[0-9a-f]{16}\.u8", other.name):
                    other.unlink(missing_ok=True)
            cache = _read(path, folder, image_size)
    if cache is None:
        raise UserError(f"{path}: gone, or changed, as soon as it was written. Start again.")
    return cache


def _read(path: Path, folder: Folder, image_size: int | None) -> Cache | None:
    """A cache, mapped; None where there is none, or what is there is not a whole one of this folder."""
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            return None
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - FOOTER.size))
            length, magic = FOOTER.unpack(file.read().rjust(FOOTER.size))
            if magic != MAGIC or length > size - FOOTER.size:
                return None
            file.seek(size - FOOTER.size - length)
            text = json.loads(file.read(length))
            shape, broken = tuple(text["shape"]), dict(text["broken"])
            scale = None if text["scale"] is None else (float(text["scale"][0]), float(text["scale"][1]))
            if not _fits(shape, len(folder.files) - len(broken), image_size):
                return None
            kind = record_type(3 if len(shape) == 4 else 1)
            if math.prod(shape) + shape[0] * kind.itemsize + length + FOOTER.size != size:
                return None
            file.seek(math.prod(shape))
            records = np.frombuffer(file.read(shape[0] * kind.itemsize), kind)
        return Cache(MappedImages(path, shape, records["digest"]), records["digest"], records["sums"], broken, scale)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Mend that, or remove it.") from error
    except (ValueError, KeyError, TypeError, RecursionError):  # another's text
        return None


def _fits(shape: tuple[Any, ...], count: int, image_size: int | None) -> bool:
    """Whether a shape is that of `count` square images, grey or in color."""
    return (
        all(type(it) is int for it in shape)
        and len(shape) in (3, 4)
        and (shape[0], shape[3:]) in ((count, ()), (count, (3,)))
        and shape[1] == shape[2] == (image_size or shape[1])
        and 0 < shape[1] <= LARGEST_SIDE
    )


@contextlib.contextmanager
def _turn(folder: Folder, cache_dir: Path) -> Iterator[bool]:
    """Hold the lock on the folder of caches, and say so where another process has had it for over a second.

    A file system without locks is no obstacle: what two write at the same time is written twice. Yields whether there
    is a lock.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir / ".lock")
        try:
            lock.acquire(timeout=1)
        except (Timeout, NotImplementedError, OSError):
            if knows_locks(cache_dir):
                if os.environ.get("LOCAL_RANK", "0") == "0":  # one of a job says it for all
                    print(f"Waiting for another process, which decodes images into {cache_dir} ...", flush=True)
                lock.acquire()
    except OSError as error:
        raise UserError(
            f"{cache_dir}: cannot be written ({error.strerror}), and {printable(folder.path.name)} is not decoded there"
            " yet. Name a folder for data that can: --data-dir PATH"
        ) from error
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _build(folder: Folder, path: Path, image_size: int | None, scale: Scale | None) -> None:
    """Decode a folder into a cache, on all cores; nothing is left of it where that fails."""
    tasks = [(folder.path / file.name, file.name) for file in folder.files]
    temporary = temporary_name(path, "new")
    with _pool(folder, len(tasks)) as pool:
        colour, size = _survey(pool, tasks)
        size = image_size or size
        shape = (size, size, 3) if colour else (size, size)
        _announce(folder, path, shape)
        try:
            with temporary.open("wb") as file:
                if not _write(file, pool, folder, tasks, shape, scale):
                    ranges = [it for found in _on_all_cores(pool, ranges_of, tasks) for it in found]
                    file.seek(0)
                    file.truncate()
                    _write(file, pool, folder, tasks, shape, scale_of(ranges))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _survey(pool: ProcessPoolExecutor | None, tasks: Sequence[Task]) -> tuple[bool, int]:
    """Whether the images are in colour, and the size that they are brought to unless the user names one."""
    sides: list[int] = []
    for found in _on_all_cores(pool, survey_images, tasks):
        if found.any_in_colour:
            return True, SIZE
        sides += found.sides
    return False, SMALL_SIZE if sides and statistics.median(sides) <= ABOUT_SMALL else SIZE


def _write(
    file: BinaryIO,
    pool: ProcessPoolExecutor | None,
    folder: Folder,
    tasks: Sequence[Task],
    shape: tuple[int, ...],
    scale: Scale | None,
) -> bool:
    """Write a whole cache; False, half way, where an image needs a scale and there is none."""
    records, broken, colour = [], {}, len(shape) == 3
    work = partial(decode_images, size=shape[0], colour=colour, scale=scale)
    with tqdm(total=len(tasks), unit=" images", leave=False, file=sys.stderr, disable=None) as bar:
        decoded = (image for images in _on_all_cores(pool, work, tasks) for image in images)
        for (_, name), image in zip(tasks, decoded, strict=True):
            if image is None:
                return False
            if isinstance(image, str):
                broken[name] = image
            else:
                file.write(image.pixels)
                records.append((list(image.digest), image.sums))
            bar.update()
    _check_readable(folder, broken)
    text = json.dumps({"shape": [len(records), *shape], "scale": scale, "broken": broken}).encode()
    file.write(np.array(records, record_type(3 if colour else 1)).tobytes())
    file.write(text + FOOTER.pack(len(text), MAGIC))
    return True


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
            f"{folder.flag}: {len(broken):,} of {len(folder.files):,} images cannot be read, over"
            f" one in ten: {reasons(broken.items())}. For example {a_few([printable(name) for name in broken])}."
            " Mend or remove them."
        )
    there = {(file.part, file.label) for file in folder.files}
    left = {(file.part, file.label) for file in folder.files if file.name not in broken}
    for part in {part for part, _ in there} - {part for part, _ in left}:
        raise UserError(f"{folder.flag}: no image of the {part} part can be read. Mend some.")
    lost_classes = there - left
    for label, name in enumerate(folder.class_names):
        if ("train", label) in lost_classes:
            lost = [(it.name, broken[it.name]) for it in folder.files if (it.part, it.label) == ("train", label)]
            raise UserError(
                f"{folder.flag}: no image of the class {name} can be read: {reasons(lost)}. Mend some, or remove its"
                " folder."
            )


# --- all cores


@contextlib.contextmanager
def _pool(folder: Folder, images: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes to decode with, one a core; None where that is not worth their start."""
    workers = min(available_cores(), images // CHUNK)
    if workers < 2:
        yield None
        return
    # started anew: a process that has loaded torch has threads, and a fork of it may hang
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=follow_parent)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"{folder.flag}: a process that decoded images was ended from outside, perhaps for"
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
    most = 4 * available_cores()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
