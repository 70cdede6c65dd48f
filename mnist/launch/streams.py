"""Standard output and error of a run, which outlives them: a terminal may be closed, a disk full, a reader gone.

keep_output()                   # from now on sys.stdout and sys.stderr never raise
lost_output()                   # "standard output: No space left on device", once something could not be written
print(printable(name))          # one line, whatever is in it
"""

import errno
import io
import os
import select
import sys
from collections.abc import Sequence

NAMES = {"stdout": "standard output", "stderr": "standard error"}


class LastingOutput(io.RawIOBase):
    """A file descriptor that takes what it is given; what cannot be written is gone, and `lost` says why."""

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
            except BlockingIOError:  # whoever started this one has made it so
                select.select([], [self.descriptor], [])
            except OSError as error:
                self.lost = self.lost or os.strerror(error.errno or errno.EIO)
                return len(data)


def keep_output(streams: Sequence[str] = ("stdout", "stderr")) -> None:
    """Let these streams, where they are the process's own, go on without whoever reads them.

    What the terminal's encoding lacks is shown as an escape.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:  # one that was closed: the next file would take its place
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
    """Which stream could not be written, and why; None where all could."""
    for name, words in NAMES.items():
        raw = getattr(getattr(getattr(sys, name), "buffer", None), "raw", None)
        if isinstance(raw, LastingOutput) and raw.lost:
            return f"{words}: {raw.lost}"
    return None


def printable_lines(text: str) -> str:
    """As `printable`, where line ends are meant."""
    return "\n".join(map(printable, text.split("\n")))


def printable(text: str) -> str:
    """Text for one line of a terminal: control characters, line ends and bytes that are no text are written out."""
    return "".join(it if it.isprintable() else repr(it)[1:-1] for it in text)


def _is_own(stream: io.TextIOWrapper) -> bool:
    try:
        file = getattr(stream.buffer, "raw", stream.buffer)  # there is no buffer with PYTHONUNBUFFERED
        return stream.fileno() in (1, 2) and isinstance(file, io.FileIO)
    except io.UnsupportedOperation:  # a test's
        return False


def _lasting(raw: LastingOutput, encoding: str, at_once: bool) -> io.TextIOWrapper:
    lines = raw.isatty() or raw.descriptor == 2 or at_once
    buffer = io.BufferedWriter(raw)  # type: ignore[type-var]
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=lines)
