"""What a run is made with, besides its settings: the processes and what they run on, versions, the state of the code.

environment = describe_environment(accelerator, loss_is_compiled=False)
environment["device"], environment["git_commit"]
"""

import functools
import platform
import socket
import subprocess
from collections import Counter
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import mnist
from mnist.config.settings import PROJECT_FOLDER
from mnist.launch.hardware import device_name

COMPILED = "inductor, loss and gradients in one graph"  # what --compile gives, as opposed to the launcher's compiler


@functools.cache
def describe_code() -> dict[str, str | None]:
    """Versions of what computes the result, and the commit; None where the code lies in no repository of its own."""
    return {
        "torch": str(torch.__version__),  # a string of a kind of its own
        "accelerate": version("accelerate"),
        "version": mnist.__version__,
        "git_commit": _git("rev-parse", "HEAD") if (PROJECT_FOLDER / ".git").exists() else None,
    }


def describe_environment(accelerator: Accelerator, loss_is_compiled: bool) -> dict[str, Any]:
    """Plain values by name, those of `describe_code` among them; all processes must call it."""
    code = describe_code()
    changes = _git("status", "--porcelain") if code["git_commit"] and accelerator.is_main_process else None
    return {
        "device": " + ".join(sorted(set(gather_object([device_name(accelerator.device)])))),
        "num_processes": accelerator.num_processes,
        "processes": describe_processes(accelerator),
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision.replace("no", "float32"),
        "compiler": COMPILED if loss_is_compiled else accelerator.state.dynamo_plugin.backend.value.lower(),
        **code,
        "cuda": torch.version.cuda if accelerator.device.type == "cuda" else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "git_dirty": None if changes is None else changes != "",
    }


def describe_processes(accelerator: Accelerator) -> str:
    """`1 process`, `4 processes`, `4 processes on 2 machines (alpha 2, beta 2)`; all processes must call it."""
    count = accelerator.num_processes
    machines = Counter(gather_object([socket.gethostname()]))
    words = "1 process" if count == 1 else f"{count} processes"
    if len(machines) == 1:
        return words
    return f"{words} on {len(machines)} machines ({', '.join(f'{name} {n}' for name, n in machines.items())})"


def _git(*arguments: str) -> str | None:
    """What Git answers; None where it cannot: it is not installed, or takes the repository for another user's."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(PROJECT_FOLDER), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
