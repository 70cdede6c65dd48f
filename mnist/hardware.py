"""What this process runs on: its share of the cores, and the device's name."""

import os
import platform
from pathlib import Path

import torch


def use_fair_share_of_cores() -> None:
    """Let torch use the cores of this machine divided by the job's processes on it, at least one.

    Decided here because launchers set OMP_NUM_THREADS to 1 where plain `python` takes every core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


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
