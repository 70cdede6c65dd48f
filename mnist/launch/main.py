"""Run a training process, from the command line to the exit code.

end_process(run_process(train, RECIPES))
"""

import atexit
import contextlib
import gc
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
    """Call `train` with the command line's settings and the names of the explicit ones.

    Returns the exit code: 0, 1 after a failure, 2 for wrong usage; 143, 130, 129 or 75 after SIGTERM, SIGINT, SIGHUP or
    SIGUSR1.
    """
    keep_output()
    follow_launcher()
    end_at_once()
    try:
        config = parse_command_line(recipes)
        gc.disable()  # until the run has started: what is imported and listed stays, and searching it takes 0.3 s
        from mnist.launch.processes import enough_memory, waiting_for_others  # imports torch, too slow for --help

        with enough_memory(), waiting_for_others(config.timeout_seconds):
            train(config, explicit_settings())
    except KeyboardInterrupt:
        return 130
    except Interrupted as interrupted:
        print(printable_lines(interrupted.message), end="", flush=True)
        return interrupted.exit_code
    except Exception as error:
        report_failure(error)
        return error.exit_code if isinstance(error, UserError) else 1
    finally:
        gc.enable()
    return 0


def report_failure(error: Exception) -> None:
    """Print why this process failed, once for all processes that fail for the same reason, and tell the launcher.

    The first process prints at once. The others wait two seconds; if the first one failed as well, the launcher ends
    them before they print. torchrun shows the content of TORCHELASTIC_ERROR_FILE at the end of its own output.
    """
    message = f"{type(error).__name__}: {error}"
    trace = printable_lines(message) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": trace, "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": message, "extraInfo": details}})
        with contextlib.suppress(OSError):  # optional
            Path(path).write_text(content, encoding="utf-8")
    if not is_first_process():
        time.sleep(2)
        trace = f"Process {os.environ['RANK']}: {trace}"
    print(trace, file=sys.stderr, flush=True)


def end_process(exit_code: int) -> NoReturn:
    """Run the exit handlers and end this process without finalizing the interpreter.

    Finalization may abort the process if a gloo thread still holds a tensor (PyTorch issue 190489; seen once in 43
    runs, as exit code -6).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
