"""What this process runs on: its share of the cores, and the device's name."""

import os
import platform
from pathlib import Path

import torch
from torch import Tensor, nn

FLOPS_WORTH_SHARING = 10_000_000


def choose_threads(model: nn.Module, batch: Tensor) -> int:
    """Set, and return, the number of threads that torch uses for `model` on the CPU; `batch` is one of its inputs.

    It is the number of cores divided by the job's processes on this machine, where launchers would have it 1 and plain
    `python` all. A forward pass of less than ten million operations stays on one thread: waiting for another costs
    more than it saves (an MLP 784-64-64-64-10 on two cores: 580 us a step against 690 with batches of 10, 870 against
    730 with 128), and beside another busy process two threads took 4 to 30 ms for a step that takes one 0.8 ms.
    """
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(batch)
    model.train(training)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    threads = share if counter.get_total_flops() >= FLOPS_WORTH_SHARING else 1
    torch.set_num_threads(threads)
    return threads


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
