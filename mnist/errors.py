"""What a user can mend: errors that are shown as one message, without a traceback. And how a process ends.

Everything else that goes wrong is a bug or a broken machine, and keeps its traceback.
"""

import atexit
import contextlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """A run cannot start or go on; the message names the thing, the value and the way out."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A setting that cannot be: wrong usage, ended with 2 as by argparse."""

    exit_code = 2


class ImageError(UserError):
    """A file that should be an image, or a folder of them, and cannot be read."""


class DivergedError(UserError):
    """The loss is no number any more."""


def report_failure(error: Exception) -> None:
    """Show why this process ends, once for all processes that end for the same reason, and leave it for the launcher.

    The first process speaks at once; the others a moment later, by when their launcher has ended them if the first one
    failed as they did. torchrun shows what it finds in TORCHELASTIC_ERROR_FILE below all that it prints itself.
    """
    message = f"{type(error).__name__}: {error}"
    trace = message if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": trace, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}), encoding="utf-8")
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(2)
        trace = f"Process {rank}: {trace}"
    print(trace, file=sys.stderr, flush=True)


def print_any_text() -> None:
    """Let a terminal that lacks a letter of a name show it as an escape, instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_process(exit_code: int) -> NoReturn:
    """End this process after what was registered to be done at its exit, but without taking the interpreter down.

    A thread of gloo's may still hold a tensor by then, and aborts the process when it lets go of it: seen
    once, as an exit code of -6, and not again in 42 runs made for it (pytorch issue 190489 describes it).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # nobody reads it any more
            stream.flush()
    os._exit(exit_code)
