"""The environment of a run: processes, devices, versions and Git commit.

environment = describe_environment(accelerator)
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
from mnist.launch.hardware import describe_gpus, device_name, uses_tf32


@functools.cache
def describe_code() -> dict[str, str | None]:
    """Versions of the libraries and the code; the commit is None outside a Git repository."""
    return {
        "torch": str(torch.__version__),  # a subclass of str
        "accelerate": version("accelerate"),
        "version": mnist.__version__,
        "git_commit": _git("rev-parse", "HEAD") if (PROJECT_FOLDER / ".git").exists() else None,
    }


def describe_environment(accelerator: Accelerator, compiler: str | None = None) -> dict[str, Any]:
    """Plain values by name, including those of `describe_code`. All processes must call this.

    `compiler` is that of --compile; without it, the launcher's is described.
    """
    code = describe_code()
    changes = _git("status", "--porcelain") if code["git_commit"] and accelerator.is_main_process else None
    float32 = "float32 (TF32)" if uses_tf32(accelerator.device) else "float32"
    return {
        "device": " + ".join(sorted(set(gather_object([device_name(accelerator.device)])))),
        "num_processes": accelerator.num_processes,
        "processes": describe_processes(accelerator),
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision.replace("no", float32),
        "compiler": compiler or accelerator.state.dynamo_plugin.backend.value.lower(),
        **code,
        **describe_gpus(accelerator.device),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "git_dirty": None if changes is None else changes != "",
    }


def describe_processes(accelerator: Accelerator) -> str:
    """`1 process`, `4 processes`, `4 processes on 2 machines (alpha 2, beta 2)`. All processes must call this."""
    count = accelerator.num_processes
    machines = Counter(gather_object([socket.gethostname()]))
    words = "1 process" if count == 1 else f"{count} processes"
    if len(machines) == 1:
        return words
    return f"{words} on {len(machines)} machines ({', '.join(f'{name} {n}' for name, n in machines.items())})"


def _git(*arguments: str) -> str | None:
    """Git's output; None if it fails, e.g. because it is not installed or the repository belongs to another user."""
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
