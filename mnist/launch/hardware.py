"""What this process runs on: its share of the cores, its memory, and the device's name."""

import ctypes
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from mnist.errors import ConfigError

FLOPS_WORTH_SHARING = 10_000_000
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # in a container: its microseconds of processor time, and in how many
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def choose_threads(model: nn.Module, batch: Tensor) -> int:
    """Set, and return, the number of threads that torch uses for `model` on the CPU; `batch` is one of its inputs.

    It is this process's share of the cores, where launchers would give it one and plain `python` all of them.

    A forward pass of less than ten million operations stays on one thread: waiting for another costs more than it saves
    (an MLP 784-64-64-64-10 on two cores: 580 us a step against 690 with batches of 10, 870 against 730 with 128), and
    beside another busy process two threads took 4 to 30 ms for a step that takes one 0.8 ms.
    """
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(batch)
    model.train(training)
    share = max(1, available_cores() // processes_here())
    threads = share if counter.get_total_flops() >= FLOPS_WORTH_SHARING else 1
    torch.set_num_threads(threads)
    return threads


def available_cores() -> int:
    """As many cores as this process may use: those it was started on, or what a container may take of their time.

    `docker run --cpus 2`, or a limit of Kubernetes, leaves all cores in sight, and stops those who use more of them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not QUOTA.is_file():  # no container, or one by version 1 of cgroups
        return cores
    quota, period = QUOTA.read_text(encoding="ascii").split()
    return cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period)))


def processes_here() -> int:
    """How many processes of the job the launcher has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors have freed, for the next step; whether it could be told so.

    glibc gives large blocks back to the system when they are freed, and the next step pays for each of their pages
    again: 1,500 page faults a step of the CNN with batches of 64, a tenth of its time on a CPU. 32 MiB is the largest
    block that it can be told to keep; other C libraries (macOS, Windows, musl) are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 32 << 20) and libc.mallopt(M_TRIM_THRESHOLD, 1 << 30))


def check_kernels(name: str, capability: tuple[int, int], architectures: Sequence[str]) -> None:
    """Raise ConfigError where torch has no code for a card: it would be seen, and fail at the first step.

    `capability` is the card's, (7, 0) for a V100; `architectures` are those of torch's kernels: sm_75 runs on the cards
    of its generation from 7.5 on, and compute_75, compiled when it is loaded, on all later ones.
    """
    names = [name.partition("_") for name in architectures]
    numbers = [(kind, digits.rstrip("af")) for kind, _, digits in names]  # sm_90a: for that very generation
    known = [(kind, (int(digits[:-1]), int(digits[-1]))) for kind, digits in numbers if digits.isdecimal()]
    fits = [it <= capability and (kind == "compute" or it[0] == capability[0]) for kind, it in known]
    if fits and not any(fits):
        raise ConfigError(
            f"{name} (compute capability {capability[0]}.{capability[1]}): torch {torch.__version__} has no kernels for"
            f" it, only for {', '.join(architectures)}. Install one that has (an older CUDA, as pip install torch"
            " --index-url https://download.pytorch.org/whl/cu126), or train on the CPU: ACCELERATE_USE_CPU=true"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on an accelerator; 0 on one that does not say (Apple's), and for the CPU."""
    memory = None if device.type == "cpu" else getattr(torch.get_device_module(device), "mem_get_info", None)
    return 0 if memory is None else int(memory(device)[0])


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has needed at most: of a CUDA device what torch had taken, otherwise of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name == "nt":
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """`cuda (NVIDIA H200)`, `cpu (AMD EPYC)`: the type and the maker's name for it, where one is known."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"cpu ({models[0] if models else platform.machine()})"
    return device.type
