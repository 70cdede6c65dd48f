"""The container's entrypoint: train on all visible GPUs, or run another command.

docker run --gpus all IMAGE --recipe cnn --epochs 5     # flags or nothing: train.py, with a launcher if needed
docker run IMAGE mnist predict seven.png                # anything else is a command
docker run -it IMAGE bash

Variables: NUM_PROCESSES, MIXED_PRECISION and WANDB_API_KEY_FILE (a file with the W&B key); for several machines
PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, which torchrun reads and Kubeflow sets. Launchers turn
every exit code into 1, so the container exits with the one in the run's state.json.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mnist.config.command_line import parse_command_line
from mnist.config.recipes import RECIPES
from mnist.config.settings import CHOICES
from mnist.errors import ConfigError
from mnist.files import read_text
from mnist.launch.signals import EXIT_CODES
from mnist.runs.record import read_state

PRECISIONS = CHOICES["mixed_precision"]
DEVICE_FILES = ("nvidia*", "dxg", "kfd")  # of NVIDIA, WSL and AMD GPUs
COUNT_DEVICES = """
import torch
print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)
"""
MAX_KEY = 10_000  # bytes
SECRET = "/run/secrets/wandb_api_key"  # a secret of Compose or Swarm


class UsageError(ValueError):
    """An invalid environment variable. The message gives its name, its value and what to do."""


@dataclass(frozen=True)
class Plan:
    """A command and the variables to add to its environment."""

    command: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    launched: bool = False  # whether the command is a launcher, whose exit code does not count


def trains(arguments: Sequence[str]) -> bool:
    """Whether the container's arguments are flags of train.py."""
    return not arguments or arguments[0].startswith("-")


def plan(arguments: Sequence[str], environment: Mapping[str, str], visible: int) -> Plan:
    """What to run on `visible` GPUs. Raises UsageError for invalid variables."""
    if not trains(arguments):
        return Plan(tuple(arguments))
    script = ("train.py", *arguments)
    asked = environment.get("MIXED_PRECISION", "")
    if asked not in ("", *PRECISIONS):
        raise UsageError(f"MIXED_PRECISION={asked}: unknown. Known: {', '.join(PRECISIONS)}.")
    precision = {"ACCELERATE_MIXED_PRECISION": asked} if asked else {}
    machines = _whole_number("PET_NNODES", environment) or 1
    variable = "NUM_PROCESSES" if environment.get("NUM_PROCESSES") else "PET_NPROC_PER_NODE"
    requested = None if environment.get(variable) in ("auto", "gpu") else _whole_number(variable, environment)
    processes = requested or visible or 1
    if processes > visible > 0:
        raise UsageError(
            f"{variable}={processes}: only {visible} GPU(s) are visible. Use at most {visible}, or hide them to train"
            " on the CPU: CUDA_VISIBLE_DEVICES= (empty)."
        )
    if "--help" in arguments or "-h" in arguments or (machines == 1 and processes == 1):
        return Plan((sys.executable, *script), precision)
    if machines > 1:
        missing = [name for name in ("PET_NODE_RANK", "PET_MASTER_ADDR") if not environment.get(name)]
        if missing:
            raise UsageError(
                f"PET_NNODES={machines}: requires {', '.join(missing)}. Set PET_NODE_RANK (from 0) and PET_MASTER_ADDR"
                " (the address of the machine with rank 0) on each machine."
            )
        # torchrun reads the rest from PET_...
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes))
        return Plan((sys.executable, *launcher, *script), precision, launched=True)
    config = f"accelerate_configs/{'multi_gpu' if visible else 'multi_cpu'}.yaml"
    flags = ("--config_file", config, "--num_processes", str(processes))
    chosen = ("--mixed_precision", asked) if asked else ()
    return Plan(("accelerate", "launch", *flags, *chosen, *script), launched=True)


def _whole_number(variable: str, environment: Mapping[str, str]) -> int | None:
    """The value of a variable; None if unset or empty, as Compose passes unset variables."""
    value = environment.get(variable, "")
    if value and not (value.isdecimal() and len(value) < 10 and int(value) > 0):
        raise UsageError(f"{variable}={value:.50}: must be a whole number above 0.")
    return int(value) if value else None


def visible_devices() -> int:
    """Number of GPUs that torch sees. Imports torch, which takes seconds, only if there is a device file."""
    if not any(any(Path("/dev").glob(name)) for name in DEVICE_FILES):
        return 0
    answer = subprocess.run([sys.executable, "-c", COUNT_DEVICES], stdout=subprocess.PIPE, text=True, check=True)
    count = int(answer.stdout)
    if count == 0:
        causes = "CUDA_VISIBLE_DEVICES hides them, or the driver is older than torch's CUDA"
        print(f"entrypoint: there are GPU device files, but torch sees no GPU: {causes}", file=sys.stderr)
    return count


def wandb_key(environment: Mapping[str, str]) -> dict[str, str]:
    """WANDB_API_KEY from its file, unless it is in the environment."""
    path = Path(environment.get("WANDB_API_KEY_FILE") or SECRET)
    if environment.get("WANDB_API_KEY") or not (path.exists() or environment.get("WANDB_API_KEY_FILE")):
        return {}
    try:
        if path.exists() and not path.is_file():  # a device or a pipe might never end
            raise UsageError(f"WANDB_API_KEY_FILE={path}: not a file.")
        key = read_text(path, MAX_KEY).strip()
    except OSError as error:
        raise UsageError(f"WANDB_API_KEY_FILE={path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"WANDB_API_KEY_FILE={path}: not a text file.") from error
    if not key.isprintable():  # a zero byte cannot be in a variable
        raise UsageError(f"WANDB_API_KEY_FILE={path}: must contain only the key, on one line.")
    return {"WANDB_API_KEY": key}


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of a flag of train.py, from `--run-name x`, `--run-name=x` or `--run_name x`."""
    value = None
    for index, word in enumerate(arguments):
        name, equals, rest = word.partition("=")
        if name.replace("_", "-") == flag:
            value = rest if equals else next(iter(arguments[index + 1 :]), None)
    return value


def state_files(arguments: Sequence[str]) -> list[Path]:
    """state.json of the run that the flags name, or of all runs if they name none."""
    resumed, name = flag_value(arguments, "--resume"), flag_value(arguments, "--run-name")
    parent, pattern = Path(flag_value(arguments, "--output-dir") or "runs"), f"{name or '*'}/state.json"
    if resumed not in (None, "auto"):
        parent, pattern = Path(str(resumed)), "state.json"
    return [path for path in parent.glob(pattern) if path.is_file()]


def launch(plan: Plan, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a launcher, forward signals to its training processes, and return the exit code of their run."""
    before = {path: changed_at(path) for path in state_files(arguments)}
    launcher = subprocess.Popen(plan.command, env=environment)
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        # SIGUSR1 kills launchers, and their processes are in other sessions, which group signals do not reach
        received.append(number)
        for pid in children_of(launcher.pid) or [launcher.pid]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)

    for number in EXIT_CODES:
        signal.signal(number, forward)
    code = launcher.wait()
    return exit_code(trained_state(arguments, before), code, received)


def trained_state(arguments: Sequence[str], before: Mapping[Path, int]) -> dict[str, object]:
    """The state of the run trained since `before` (modification times); empty if there is none.

    If the flags do not name the run, only those of this host count: other containers may write to the same folder.
    """
    is_named = flag_value(arguments, "--run-name") or flag_value(arguments, "--resume")
    written: list[tuple[int, dict[str, object]]] = []
    for path in state_files(arguments):
        changed, state = changed_at(path), read_state(path)
        here = is_named or str(state.get("process")).endswith(f" on {socket.gethostname()}")
        if before.get(path) != changed and here:
            written.append((changed, state))
    return max(written, key=lambda entry: entry[0])[1] if written else {}


def changed_at(path: Path) -> int:
    """Modification time of a file in nanoseconds; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def children_of(pid: int) -> list[int]:
    """The child processes of a process."""
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:  # it has just ended
        return []


def exit_code(state: Mapping[str, object], launcher: int, received: Sequence[int]) -> int:
    """The run's exit code if it has ended; otherwise that of the first signal received, or the launcher's.

    A run has not ended if its main process was killed or is still running on the first machine.
    """
    code = state.get("exit_code")
    if state.get("status") in ("finished", "interrupted", "failed") and type(code) is int and 0 <= code < 256:
        return code
    if received:
        return EXIT_CODES[signal.Signals(received[0])]
    return 128 - launcher if launcher < 0 else launcher


def main() -> int:
    """Exec the command, or launch it and return its exit code. 2: wrong usage; 127: no such command."""
    arguments = sys.argv[1:]
    try:
        visible = visible_devices() if trains(arguments) else 0
        chosen = plan(arguments, os.environ, visible)
        environment = os.environ | chosen.variables | wandb_key(os.environ)
        if chosen.launched:
            parse_command_line(RECIPES, arguments)  # exits with 2 for wrong flags; the launcher would with 1
    except (UsageError, ConfigError) as error:
        print(f"entrypoint: {error}", file=sys.stderr)
        return 2
    if trains(arguments):
        gpus = "1 GPU is" if visible == 1 else f"{visible} GPUs are"
        print(f"entrypoint: {gpus} visible: {shlex.join(chosen.command)}", file=sys.stderr, flush=True)
    if chosen.launched:
        return launch(chosen, arguments, environment)
    try:
        os.execvpe(chosen.command[0], chosen.command, environment)
    except OSError as error:
        print(f"entrypoint: {chosen.command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
