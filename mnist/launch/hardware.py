"""CPU threads, memory, and what a GPU computes with."""

import contextlib
import ctypes
import math
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from mnist.errors import ConfigError

FLOPS_WORTH_SHARING = 25_000_000
COMMON_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # in a container: microseconds of CPU time, per how many microseconds
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def choose_threads(model: nn.Module, batch: Tensor) -> int:
    """Set and return torch's number of CPU threads for `model`: this process's share of the cores.

    A forward pass on `batch` of less than 25 million operations uses one thread, because synchronization costs more
    than it saves (MLP 784-64-64-64-10 on two cores, one thread against two: 580 and 690 us per step with batches of 10,
    870 and 730 with 128). Beside another busy process a step took 4 to 30 ms with two threads, 0.8 ms with one.
    """
    share = max(1, available_cores() // processes_here())
    threads = share if _count_flops(model, batch) >= FLOPS_WORTH_SHARING else 1
    torch.set_num_threads(threads)
    return threads


def _count_flops(model: nn.Module, batch: Tensor) -> int:
    """Floating-point operations of a forward pass, not counting those of elements, such as activations.

    torch's FlopCounterMode imports torch's compiler, over a second, so it counts only what is not of common layers.
    """
    counts = []

    def count(layer: nn.Conv2d | nn.Linear, _: Any, output: Tensor) -> None:
        counts.append(2 * output.numel() * layer.weight.shape[1:].numel())

    owners = [layer for layer in model.modules() if any(True for _ in layer.parameters(recurse=False))]
    counted = [layer for layer in owners if isinstance(layer, (nn.Conv2d, nn.Linear))]
    is_common = bool(counted) and all(isinstance(layer, COMMON_LAYERS) for layer in owners)
    training = model.training
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, training)
        stack.enter_context(torch.no_grad())
        if is_common:
            for layer in counted:
                stack.callback(layer.register_forward_hook(count).remove)
        else:
            from torch.utils.flop_counter import FlopCounterMode

            counter = stack.enter_context(FlopCounterMode(display=False))
        model.eval()(batch)
    return sum(counts) if is_common else counter.get_total_flops()


def available_cores() -> int:
    """The number of cores that this process may use: its CPU affinity, or a container's quota if that is less.

    `docker run --cpus 2` and Kubernetes limits leave all cores visible, and throttle processes that use more.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not QUOTA.is_file():  # not in a container, or cgroups v1
        return cores
    quota, period = QUOTA.read_text(encoding="ascii").split()
    return cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period)))


def processes_here() -> int:
    """Number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step. Returns whether that worked; other C libraries are left alone.

    By default glibc returns large blocks to the system, and the next step pays for their page faults: 1,500 per step of
    the CNN with batches of 64, a tenth of its time on a CPU. 32 MiB is the largest block that glibc can keep.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 32 << 20) and libc.mallopt(M_TRIM_THRESHOLD, 1 << 30))


def choose_kernels() -> None:
    """Let the convolutions of an NVIDIA GPU be as exact as its matrix products, and the same in every run.

    By default torch multiplies matrices in float32 but convolves in TF32 (10 bits of mantissa instead of 23), and cuDNN
    may choose algorithms that add in any order. Here both are float32, or both TF32 if torch is told so by
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, or by Accelerate for a model that the launcher compiles.
    """
    with warnings.catch_warnings():
        # torch 2.9.0 recommends another interface, but 2.6 lacks it, and Accelerate uses this one: mixing them fails
        warnings.simplefilter("ignore", UserWarning)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def has_bf16(device: torch.device) -> bool:
    """Whether it computes in bf16; NVIDIA GPUs before compute capability 8.0 would emulate it, slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def uses_tf32(device: torch.device) -> bool:
    """Whether products of float32 are TF32, after `choose_kernels`."""
    allowed = torch.backends.cuda.matmul.allow_tf32 and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    return device.type == "cuda" and allowed and has_bf16(device)  # the same GPUs have both


def describe_gpus(device: torch.device) -> dict[str, Any]:
    """The GPUs that this process sees, their compute capability, and the libraries; None without an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return dict.fromkeys(("gpus", "capability", "cuda", "cudnn"))
    return {
        "gpus": torch.cuda.device_count(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # 91002: 9.10.2
    }


def check_kernels(name: str, capability: tuple[int, int], architectures: Sequence[str]) -> None:
    """Raise ConfigError if torch has no kernels for a GPU, which would otherwise fail at the first step.

    `capability` is the GPU's, e.g. (7, 0) for a V100. Of torch's `architectures`, sm_75 runs on capabilities from 7.5
    to 7.9; compute_75 is compiled when loaded and runs on all from 7.5.
    """
    names = [name.partition("_") for name in architectures]
    numbers = [(kind, digits.rstrip("af")) for kind, _, digits in names]  # sm_90a: architecture-specific
    known = [(kind, (int(digits[:-1]), int(digits[-1]))) for kind, digits in numbers if digits.isdecimal()]
    fits = [needed <= capability and (kind == "compute" or needed[0] == capability[0]) for kind, needed in known]
    if fits and not any(fits):
        raise ConfigError(
            f"{name} (compute capability {capability[0]}.{capability[1]}): torch {torch.__version__} has no kernels for"
            f" it, only for {', '.join(architectures)}. Install torch for an older CUDA (pip install torch --index-url"
            " https://download.pytorch.org/whl/cu126), or train on the CPU: ACCELERATE_USE_CPU=true"
        )


def device_memory(device: torch.device) -> tuple[int, int]:
    """Free bytes and all bytes of an accelerator; zeros if unknown (Apple GPUs) and for the CPU."""
    memory = None if device.type == "cpu" else getattr(torch.get_device_module(device), "mem_get_info", None)
    return (0, 0) if memory is None else memory(device)


def eval_memory(device: torch.device) -> int:
    """The bytes that a batch in evaluation may take on an accelerator; 0 if unknown and for the CPU.

    As long as a quarter of the memory is free, it depends on the card alone: a resumed run evaluates the same batches.
    """
    free, total = device_memory(device)
    return min(total // 16, free // 4)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: torch's on a CUDA device, otherwise that of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name == "nt":
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM"):  # in KiB; unlike ru_maxrss, it does not start from the parent's peak
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """`cuda (NVIDIA H200)` or `cpu (AMD EPYC)`: the type and, if known, the model."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"cpu ({models[0] if models else platform.machine()})"
    return device.type
