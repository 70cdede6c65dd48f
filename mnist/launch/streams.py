"""Output streams that never fail: a run survives a closed terminal, a full disk and a broken pipe.

keep_output()                   # from now on sys.stdout and sys.stderr never raise
lost_output()                   # "standard output: No space left on device" after a failed write
print(printable(name))          # one line, whatever the name contains
"""

import errno
import io
import os
import select
import sys
from collections.abc import Sequence

NAMES = {"stdout": "standard output", "stderr": "standard error"}


class LastingOutput(io.RawIOBase):
    """A file descriptor whose writes never fail; `lost` is the error of the first one that was lost."""

    def __init__(self, descriptor: int, lost: str = "") -> None:
        self.descriptor = descriptor
        self.lost = lost

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: "memoryview | bytes") -> int:  # type: ignore[override]
        while True:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:  # the parent process made it non-blocking
                select.select([], [self.descriptor], [])
            except OSError as error:
                self.lost = self.lost or os.strerror(error.errno or errno.EIO)
                return len(data)


def keep_output(streams: Sequence[str] = ("stdout", "stderr")) -> None:
    """Make these streams survive the loss of their reader, and escape characters that their encoding lacks."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:  # otherwise a file might get the number of a closed stream
        pass
    os.close(opened)
    for name in streams:
        stream = getattr(sys, name)
        if stream is None:
            setattr(
                sys, name, _lasting(LastingOutput(os.open(os.devnull, os.O_WRONLY), "it was closed"), "utf-8", False)
            )
        elif isinstance(stream, io.TextIOWrapper) and _is_own(stream):
            stream.flush()
            setattr(sys, name, _lasting(LastingOutput(stream.fileno()), stream.encoding, stream.write_through))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def lost_output() -> str | None:
    """The stream with a failed write and the reason; None if there is none."""
    for name, words in NAMES.items():
        raw = getattr(getattr(getattr(sys, name), "buffer", None), "raw", None)
        if isinstance(raw, LastingOutput) and raw.lost:
            return f"{words}: {raw.lost}"
    return None


def printable_lines(text: str) -> str:
    """Like `printable`, but keeps newlines."""
    return "\n".join(map(printable, text.split("\n")))


def printable(text: str) -> str:
    """Escape control characters, newlines and undecodable bytes, for one line of a terminal."""
    return text if text.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _is_own(stream: io.TextIOWrapper) -> bool:
    try:
        file = getattr(stream.buffer, "raw", stream.buffer)  # PYTHONUNBUFFERED has no buffer
        return stream.fileno() in (1, 2) and isinstance(file, io.FileIO)
    except io.UnsupportedOperation:  # replaced, e.g. by pytest
        return False


def _lasting(raw: LastingOutput, encoding: str, at_once: bool) -> io.TextIOWrapper:
    lines = raw.isatty() or raw.descriptor == 2 or at_once
    buffer = io.BufferedWriter(raw)  # type: ignore[type-var]
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=lines)
