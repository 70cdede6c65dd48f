"""Decode a folder of images once, into a file that all processes on a machine map.

cache = open_cache(find_files("PetImages"), Path("data/cache"))
cache.images        # MappedImages, uint8 [N, 64, 64, 3], or [N, 64, 64] if all are gray

The file's name depends on the folder, --image-size, --fit, and the names, sizes and times of its files, but not on
the split. If one of them changes, a new cache is made. The cache is one file, so it is complete or absent: all pixels,
a record of each image, JSON with the rest, and FOOTER.
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

from mnist.config.settings import MAX_IMAGE_SIZE
from mnist.data.duplicates import LIKENESS, find_alike
from mnist.data.folders import Folder, reasons
from mnist.data.images import Form, Scale, decode_images, follow_parent, ranges_of, scale_of, survey_images
from mnist.data.layout import a_few
from mnist.data.splits import MappedImages
from mnist.errors import UserError
from mnist.files import flush, knows_locks, remove_leftovers, storage_errors, temporary_name
from mnist.launch.hardware import available_cores
from mnist.launch.streams import printable

FORMAT = 3  # of the file, and of how images are read and resized: increment to invalidate all caches
FOOTER = struct.Struct("<Q8s")  # length of the JSON before it, MAGIC
MAGIC = b"mnist-u8"
SIZE, SMALL_SIZE = 64, 28
ABOUT_SMALL = 32  # gray images whose median shorter side is at most this become SMALL_SIZE
MAX_BROKEN = 0.1  # of the files that should be images
CHUNK = 16  # images per task of a decoding process
SPARE_BYTES = 64 << 20  # to leave free on the disk

Answer = TypeVar("Answer")
Task = tuple[Path, str]  # a file, and its name relative to the folder


class Cache(NamedTuple):
    """A decoded folder: its readable images, in the order of its files."""

    images: MappedImages
    digests: NDArray[np.uint8]  # [N, 16]
    sums: NDArray[np.int64]  # [N, 2 x channels]: sums of each channel's pixels, then of their squares
    sides: NDArray[np.int64]  # [N, 2]: width and height of the image in its file
    alike: NDArray[np.int64]  # [pairs, 2]: near duplicates, without exact ones (duplicates.py)
    broken: dict[str, str]  # name of each unreadable file -> reason
    scale: Scale | None  # of the images with more than 8 bits per pixel, if any


def record_type(channels: int) -> np.dtype[Any]:
    """What the file stores per image after the pixels."""
    return np.dtype([("digest", np.uint8, (16,)), ("sums", "<i8", (2 * channels,)), ("sides", "<i8", (2,))])


def open_cache(
    folder: Folder,
    cache_dir: Path,
    image_size: int | None = None,
    fit: str = "crop",
    scale: Scale | None = None,
    color: bool | None = None,
) -> Cache:
    """The folder's images, decoded now unless a process has done so before.

    `scale` is that of a trained model for images with more than 8 bits per pixel, `color` whether its images are in
    color; by default both are computed from the folder. Outdated caches of the same folder and settings are deleted; a
    running job can still read the one it uses. Raises UserError if the images cannot be decoded or the file cannot be
    written.
    """
    if color is not None:
        cache = _read(cache_dir / _file_names(folder, image_size, fit, scale)[1], folder, image_size)
        if cache is not None and color == (len(cache.images.shape) == 4):
            return cache
    stem, name = _file_names(folder, image_size, fit, scale, color)
    path = cache_dir / name
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a file of decoded images. Remove it.")
    if (cache := _read(path, folder, image_size)) is not None:
        return cache
    with _turn(folder, cache_dir) as locked:
        if (cache := _read(path, folder, image_size)) is None:
            if locked:  # otherwise another process may be writing there
                remove_leftovers(cache_dir)
            with storage_errors(path, "start again."):
                _build(folder, path, image_size, fit, scale, color)
            for other in cache_dir.glob("*.u8"):
                if other != path and re.fullmatch(re.escape(stem) + r"-[0-9a-f]{16}\.u8", other.name):
                    other.unlink(missing_ok=True)
            cache = _read(path, folder, image_size)
    if cache is None:
        raise UserError(f"{path}: disappeared or changed right after it was written. Start again.")
    return cache


def _file_names(
    folder: Folder, image_size: int | None, fit: str, scale: Scale | None, color: bool | None = None
) -> tuple[str, str]:
    """The start of the names of all caches of a folder with these settings, and the name of its present cache."""
    made = f"{image_size}{'' if fit == 'crop' else fit}{'' if scale is None else scale}{'' if color is None else color}"
    source = hashlib.sha256(os.fsencode(f"{folder.path}\0{made}"))
    state = hashlib.sha256(os.fsencode("\n".join(f"{file.name}\0{file.stamp}" for file in folder.files)))
    state.update(f"\0{FORMAT}".encode())
    stem = f"{printable(folder.path.name)[:40]}-{source.hexdigest()[:8]}"
    return stem, f"{stem}-{state.hexdigest()[:16]}.u8"


def _read(path: Path, folder: Folder, image_size: int | None) -> Cache | None:
    """The cache, memory-mapped; None if there is no complete one of this folder."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would never end
            return None
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - FOOTER.size))
            length, magic = FOOTER.unpack(file.read().rjust(FOOTER.size))
            if magic != MAGIC or length > size - FOOTER.size:
                return None
            file.seek(size - FOOTER.size - length)
            header = json.loads(file.read(length))
            shape, broken = tuple(header["shape"]), dict(header["broken"])
            scale = None if header["scale"] is None else (float(header["scale"][0]), float(header["scale"][1]))
            if not _fits(shape, len(folder.files) - len(broken), image_size):
                return None
            kind = record_type(3 if len(shape) == 4 else 1)
            if math.prod(shape) + shape[0] * kind.itemsize + length + FOOTER.size != size:
                return None
            file.seek(math.prod(shape))
            records = np.frombuffer(file.read(shape[0] * kind.itemsize), kind)
            alike = np.array(header["alike"], np.int64).reshape(-1, 2)
            if alike.size and not 0 <= alike.min() <= alike.max() < shape[0]:
                return None
        images = MappedImages(path, shape, records["digest"])
        return Cache(images, records["digest"], records["sums"], records["sides"], alike, broken, scale)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):  # or other JSON
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Fix that or remove it.") from error


def _fits(shape: tuple[Any, ...], count: int, image_size: int | None) -> bool:
    """Whether it is the shape of `count` square images, gray or in color."""
    return (
        all(type(side) is int for side in shape)
        and len(shape) in (3, 4)
        and (shape[0], shape[3:]) in ((count, ()), (count, (3,)))
        and shape[1] == shape[2] == (image_size or shape[1])
        and 0 < shape[1] <= MAX_IMAGE_SIZE
    )


@contextlib.contextmanager
def _turn(folder: Folder, cache_dir: Path) -> Iterator[bool]:
    """Lock the cache folder, with a message if that takes over a second; yields whether it is locked.

    Without locks in the file system, two processes may write the same cache twice, which is harmless.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir / ".lock")
        try:
            lock.acquire(timeout=1)
        except (Timeout, NotImplementedError, OSError):
            if knows_locks(cache_dir):
                if os.environ.get("LOCAL_RANK", "0") == "0":  # once per job
                    print(f"Waiting for another process to decode images into {cache_dir} ...", flush=True)
                lock.acquire()
    except OSError as error:
        raise UserError(
            f"{cache_dir}: cannot be written ({error.strerror}), but is needed for the decoded images of"
            f" {printable(folder.path.name)}. Choose a writable folder: --data-dir PATH"
        ) from error
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _build(
    folder: Folder, path: Path, image_size: int | None, fit: str, scale: Scale | None, color: bool | None
) -> None:
    """Decode a folder into a cache, on all cores. On failure nothing is left behind."""
    tasks = [(folder.path / file.name, file.name) for file in folder.files]
    temporary = temporary_name(path, "new")
    with _pool(folder, len(tasks)) as pool:
        any_in_color, size = _survey(pool, tasks)
        form = Form(image_size or size, any_in_color if color is None else color, fit)
        _announce(folder, path, form)
        try:
            with temporary.open("w+b") as file:
                if not _write(file, pool, folder, tasks, form, scale):
                    ranges = [limits for chunk in _on_all_cores(pool, ranges_of, tasks) for limits in chunk]
                    file.seek(0)
                    file.truncate()
                    _write(file, pool, folder, tasks, form, scale_of(ranges))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _survey(pool: ProcessPoolExecutor | None, tasks: Sequence[Task]) -> tuple[bool, int]:
    """Whether any image is in color, and the default image size."""
    sides: list[int] = []
    for any_in_color, chunk in _on_all_cores(pool, survey_images, tasks):
        if any_in_color:
            return True, SIZE
        sides += chunk
    return False, SMALL_SIZE if sides and statistics.median(sides) <= ABOUT_SMALL else SIZE


def _write(
    file: BinaryIO,
    pool: ProcessPoolExecutor | None,
    folder: Folder,
    tasks: Sequence[Task],
    form: Form,
    scale: Scale | None,
) -> bool:
    """Write a complete cache. Returns False as soon as an image needs a scale and there is none."""
    records, likenesses, broken = [], [], {}
    work = partial(decode_images, form=form, scale=scale)
    with tqdm(total=len(tasks), unit=" images", leave=False, file=sys.stderr, disable=None) as bar:
        decoded = (image for images in _on_all_cores(pool, work, tasks) for image in images)
        for (_, name), image in zip(tasks, decoded, strict=True):
            if image is None:
                return False
            if isinstance(image, str):
                broken[name] = image
            else:
                file.write(image.pixels)
                records.append((list(image.digest), image.sums, image.sides))
                likenesses.append(image.likeness)
            bar.update()
    _check_readable(folder, broken)
    table = np.array(records, record_type(3 if form.color else 1))
    file.flush()
    images = np.memmap(file, np.uint8, "r", shape=(len(records), *form.shape))
    alike = find_alike(images, table["digest"], np.frombuffer(b"".join(likenesses), np.uint8).reshape(-1, LIKENESS))
    header = {"shape": images.shape, "scale": scale, "broken": broken, "alike": alike.tolist()}
    text = json.dumps(header).encode()
    file.write(table.tobytes())
    file.write(text + FOOTER.pack(len(text), MAGIC))
    return True


def _announce(folder: Folder, path: Path, form: Form) -> None:
    """Print the size of the new cache. Raises UserError if the disk has no room for it."""
    size, free = len(folder.files) * math.prod(form.shape), shutil.disk_usage(path.parent).free
    mebibytes = f"{math.ceil(size / 2**20):,} MiB"
    name, pixels = printable(folder.path.name), f"{form.size} x {form.size}"
    if size + SPARE_BYTES > free:
        raise UserError(
            f"{path.parent}: the {len(folder.files):,} images of {name} at {pixels} need {mebibytes} plus"
            f" {SPARE_BYTES >> 20} MiB to spare, but only {free >> 20:,} MiB are free. Make room, or choose another"
            " disk (--data-dir) or a smaller --image-size."
        )
    color = "color" if form.color else "gray"
    count = f"{len(folder.files):,}"
    print(f"Decoding {count} images of {name} at {pixels} in {color} into {path} ({mebibytes}) ...", flush=True)


def _check_readable(folder: Folder, broken: dict[str, str]) -> None:
    """Raise UserError if over MAX_BROKEN of the images, all of a split or all of a class cannot be read."""
    if len(broken) > MAX_BROKEN * len(folder.files):
        raise UserError(
            f"{folder.flag}: {len(broken):,} of {len(folder.files):,} images (over {MAX_BROKEN:.0%}) cannot be read:"
            f" {reasons(broken.items())}. Fix or remove them: {a_few([printable(name) for name in broken])}."
        )
    every = {(file.part, file.label) for file in folder.files}
    readable = {(file.part, file.label) for file in folder.files if file.name not in broken}
    for part in {part for part, _ in every} - {part for part, _ in readable}:
        raise UserError(f"{folder.flag}: no image of the {part} split can be read. Fix or replace them.")
    for label, name in enumerate(folder.class_names):
        if ("train", label) in every - readable:
            files = [file.name for file in folder.files if (file.part, file.label) == ("train", label)]
            lost = [(file, broken[file]) for file in files]
            raise UserError(
                f"{folder.flag}: no image of class {name} can be read: {reasons(lost)}. Fix some or remove its folder."
            )


# --- all cores


@contextlib.contextmanager
def _pool(folder: Folder, images: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of decoding processes, one per core; None for too few images or one core."""
    workers = min(available_cores(), images // CHUNK)
    if workers < 2:
        yield None
        return
    # spawn: torch has started threads in this process, and a fork of it may hang
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=follow_parent)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"{folder.flag}: a process decoding images was killed, probably out of memory. Start again with more"
            " memory or fewer cores (taskset)."
        ) from error
    finally:
        # Let workers finish their chunks, even after Ctrl-C or on a full disk: if one is killed while sending a result,
        # this process waits for the rest of it forever.
        pool.shutdown(wait=True, cancel_futures=True)


def _on_all_cores(
    pool: ProcessPoolExecutor | None, work: Callable[[Sequence[Task]], Answer], tasks: Sequence[Task]
) -> Iterator[Answer]:
    """Yield work(chunk) for each chunk of the tasks in order, with a bounded number of chunks in flight."""
    chunks = (tasks[start : start + CHUNK] for start in range(0, len(tasks), CHUNK))
    if pool is None:
        yield from map(work, chunks)
        return
    pending: deque[Future[Any]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(work, chunk))
            if len(pending) > 4 * available_cores():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
