"""Atomic writes (after a crash or on a full disk there is the old file or the new one, never half); folder locks.

write_file(folder / "state.json", "{}")
with new_folder(folder / "model") as temporary: ...      # renamed once it is on the disk
with storage_errors("runs/x", "try again"): ...          # a full disk raises UserError
read_text(folder / "state.json")                         # OSError for a file larger than this project writes
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

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<word>new|old|gone)\.[0-9a-f]{8}")  # of temporary_name
MAX_TEXT = 16 << 20  # bytes; parsed JSON can take thirty times as much memory
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def temporary_name(path: Path, word: str) -> Path:
    """A unique hidden name beside `path`: "new" for what will replace it, "old" and "gone" for what it was."""
    return path.with_name(f".{path.name}.{word}.{secrets.token_hex(4)}")


def read_text(path: Path, max_bytes: int = MAX_TEXT) -> str:
    """The text in a file. Raises OSError for more than `max_bytes`; a sparse file can claim any size."""
    if path.stat().st_size > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes >> 10:,} KiB, the limit for this file", str(path))
    return path.read_text(encoding="utf-8")


def write_file(path: Path, content: str | bytes) -> None:
    """Write to a temporary file beside `path`, flush it to the disk and rename it.

    A pipe or a device such as /dev/stdout is written directly.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = path.resolve()  # keeps a symbolic link
    temporary = temporary_name(path, "new")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` once its files are on the disk. If writing fails, `folder` is kept."""
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
    """Wait until a file, or the list of files in a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it exists. Other processes never see it half-removed."""
    if folder.exists():
        doomed = temporary_name(folder, "gone")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`. The caller must hold its lock."""
    leftovers = [(path, match) for path in folder.glob(".*") if (match := TEMPORARY.fullmatch(path.name))]
    for path, match in leftovers:  # restore what was moved away but not replaced
        if match["word"] == "old" and not (original := path.with_name(match["name"])).exists():
            path.rename(original)
    for path, _ in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def lock_folder(folder: Path, holder: str) -> FileLock | None:
    """Lock a folder until the lock is released or this process ends.

    Returns None if the file system does not support locks. Raises UserError if another process holds the lock;
    `holder` describes that process in the message.
    """
    path = folder / ".lock"
    if path.is_symlink() or (path.exists() and not path.is_file()):  # filelock would truncate a link's target
        raise UserError(f"{path}: must be a regular file (the run's lock). Remove it.")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not knows_locks(folder):
            return None
        raise UserError(
            f"{folder}: another job is training in this folder{holder}. Wait for it, stop it, or choose another"
            " --run-name."
        ) from error
    except (OSError, NotImplementedError):
        if knows_locks(folder):
            raise
        return None
    return lock


def knows_locks(folder: Path) -> bool:
    """Whether the file system of a folder supports locks. How filelock reports this depends on its version."""
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
def storage_errors(path: Path, advice: str) -> Iterator[None]:
    """Turn a full or read-only disk into a UserError that says what to do; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            file = f" ({error.filename})" if error.filename else ""
            raise UserError(
                f"{path}: cannot write: {error.strerror}{file}. Earlier files are intact. Free some space or fix the"
                f" permissions, then {advice}"
            ) from error
        raise
