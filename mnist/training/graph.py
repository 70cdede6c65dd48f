"""Loss and gradients of a batch, recorded in a CUDA graph: `--compile` on NVIDIA's and AMD's GPUs.

    compute = record_step(step, net, batch, record)
    loss, *gradients = compute(X, y, sample_weight)        # overwritten by the next call

A replay launches the kernels of an uncompiled step together, without Python, autograd and a launch for each of them.
BatchNorm's running statistics change in place, and dropout advances the random generator.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs has the rules.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

RECORDED = "CUDA graph of loss and gradients"
WARM_UP = 3  # calls in which libraries choose kernels and allocate memory

Function = Callable[[], list[Tensor]]
Record = Callable[[Function], tuple[Callable[[], object], list[Tensor]]]


def record_step(
    step: Callable[..., list[Tensor]], net: nn.Module, batch: tuple[Tensor, ...], record: Record
) -> Callable[..., list[Tensor]]:
    """`step` as a function that replays it for batches of the shapes of `batch`, whose memory it takes over.

    Each call overwrites the results of the last. The buffers of `net` and the random generators stay as they were.
    """
    device, buffers = batch[0].device, [(buffer, buffer.clone()) for buffer in net.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            replay, results = record(lambda: step(batch))
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)

    def compute(*values: Tensor) -> list[Tensor]:
        for kept, value in zip(batch, values, strict=True):
            kept.copy_(value)
        replay()
        return results

    return compute


def record(function: Function) -> tuple[Callable[[], object], list[Tensor]]:
    """Record what `function` does on the GPU; returns a function that repeats it, and the results, which it overwrites.

    Raises RuntimeError if it cannot be recorded, e.g. because it waits for the GPU.
    """
    graph, mode = torch.cuda.CUDAGraph(), torch.cuda.get_sync_debug_mode()
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):  # here too, because torch.cuda.graph does not leave its stream after an error
            for _ in range(WARM_UP - 1):
                function()
            _refuse_to_wait()
            function()
            torch.cuda.set_sync_debug_mode(mode)
            # thread_local: other threads, e.g. NCCL's watchdog, may call CUDA meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                results = function()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(stream)
    return graph.replay, results


def _refuse_to_wait() -> None:
    """Let torch raise an error for what waits for the GPU: with the reason, and before anything is recorded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch does not notice every wait
        torch.cuda.set_sync_debug_mode("error")
