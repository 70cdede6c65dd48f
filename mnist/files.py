"""Writes such that a process that is killed, or has no disk left, leaves the old or the new, whole; locks on folders.

write_file(folder / "state.json", "{}")
with new_folder(folder / "model") as temporary: ...      # gets its name when it is on the disk
with storage_errors("runs/x", "how to go on"): ...       # a full disk is a UserError
read_text(folder / "state.json")                         # OSError for what is larger than any that is written here
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mnist.errors import UserError

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<word>new|old|gone)\.[0-9a-f]{8}")  # as temporary_name makes it
LARGEST_TEXT = 16 << 20  # bytes: lists of nothing take thirty times as much in memory
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def temporary_name(path: Path, word: str) -> Path:
    """A hidden name beside `path` that nobody else has: "new" on its way to `path`, "old" or "gone" from there."""
    return path.with_name(f".{path.name}.{word}.{secrets.token_hex(4)}")


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """The text in a file; OSError for more than `most` bytes, which a sparse file has for nothing."""
    if path.stat().st_size > most:
        raise OSError(errno.EFBIG, f"larger than {most >> 10:,} KiB, as none is that is written here", str(path))
    return path.read_text(encoding="utf-8")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a text, or bytes, under another name beside `path`, flush it to the disk, rename.

    What is there and is no regular file, a pipe or /dev/stdout, is written through.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as device:
            device.write(content.encode() if isinstance(content, str) else content)
        return
    path = path.resolve()  # a link stays one
    temporary = temporary_name(path, "new")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder under another name to write files into; when they are on the disk it takes the place of `folder`.

    If writing fails nothing is left of it, and the old one stays.
    """
    temporary, old = temporary_name(folder, "new"), temporary_name(folder, "old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # which cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it exists, such that it is there whole or not at all."""
    if folder.exists():
        doomed = temporary_name(folder, "gone")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Tidy up what processes that were killed while they wrote have left in `folder`. For the owner of its lock."""
    found = [(path, match) for path in folder.glob(".*") if (match := TEMPORARY.fullmatch(path.name))]
    for path, match in found:  # taken away, but nothing put in its place
        if match["word"] == "old" and not (place := path.with_name(match["name"])).exists():
            path.rename(place)
    for path, _ in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def lock_folder(folder: Path, holder: str) -> FileLock | None:
    """Take the lock on a folder, held until it is released or this process ends, however it does.

    None on a file system that knows no locks. Raises UserError where another process has it; `holder` says who that
    may be.
    """
    place = folder / ".lock"
    if place.is_symlink() or (place.exists() and not place.is_file()):  # which would be emptied where it leads
        raise UserError(f"{place}: not the lock of a run, which is a file. Remove it.")
    lock = FileLock(place)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not knows_locks(folder):
            return None
        raise UserError(
            f"{folder}: another job is training in this folder{holder}. Wait for it or end it, or choose another"
            " --run-name."
        ) from error
    except (OSError, NotImplementedError):
        if knows_locks(folder):
            raise
        return None
    return lock


def knows_locks(folder: Path) -> bool:
    """Whether the file system of a folder takes locks: filelock's versions say in several ways that it does not."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    probe = temporary_name(folder / "lock", "new")
    try:
        with probe.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
    finally:
        probe.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def storage_errors(place: Path, way_on: str) -> Iterator[None]:
    """A full or read-only disk as a UserError with the way on; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            where = f" ({error.filename})" if error.filename else ""
            raise UserError(
                f"{place}: cannot be written any more: {error.strerror}{where}. What was saved before is whole. Make"
                f" room or mend it, then {way_on}"
            ) from error
        raise
