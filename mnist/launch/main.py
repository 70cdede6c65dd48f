"""A training process from its start to its exit code.

end_process(run_process(train, RECIPES))
"""

import atexit
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from mnist.config.command_line import explicit_settings, is_first_process, parse_command_line
from mnist.config.settings import TrainConfig
from mnist.errors import UserError
from mnist.launch.signals import Interrupted, end_at_once, follow_launcher
from mnist.launch.streams import keep_output, printable_lines


def run_process(train: Callable[[TrainConfig, frozenset[str]], None], recipes: Mapping[str, TrainConfig]) -> int:
    """Train with the settings of the command line, and those settings of them that it names.

    Returns the exit code: 0, 1 for a run that failed, 2 for wrong usage; 143, 130, 129 or 75 after SIGTERM, SIGINT,
    SIGHUP, SIGUSR1.
    """
    keep_output()
    follow_launcher()
    end_at_once()
    try:
        config = parse_command_line(recipes)
        from mnist.launch.processes import waiting_for_others  # and torch with it, which --help does not wait for

        with waiting_for_others(config.timeout_seconds):
            train(config, explicit_settings())
    except KeyboardInterrupt:
        return 130
    except Interrupted as interrupted:
        print(printable_lines(interrupted.message), end="", flush=True)
        return interrupted.exit_code
    except Exception as error:
        report_failure(error)
        return error.exit_code if isinstance(error, UserError) else 1
    return 0


def report_failure(error: Exception) -> None:
    """Show why this process ends, once for all processes that end for the same reason, and leave it for the launcher.

    The first process speaks at once; the others a moment later, by when their launcher has ended them if the first one
    failed as they did. torchrun shows what it finds in TORCHELASTIC_ERROR_FILE below all that it prints itself.
    """
    message = f"{type(error).__name__}: {error}"
    trace = printable_lines(message) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": trace, "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": message, "extraInfo": details}})
        with contextlib.suppress(OSError):  # the launcher's own place for it, which it does not need
            Path(path).write_text(content, encoding="utf-8")
    if not is_first_process():
        time.sleep(2)
        trace = f"Process {os.environ['RANK']}: {trace}"
    print(trace, file=sys.stderr, flush=True)


def end_process(exit_code: int) -> NoReturn:
    """End this process after what was registered to be done at its exit, but without taking the interpreter down.

    A thread of gloo's may still hold a tensor by then, and aborts the process when it lets go of it: seen
    once, as an exit code of -6, and not again in 42 runs made for it (pytorch issue 190489 describes it).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
