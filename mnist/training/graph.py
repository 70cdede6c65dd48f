"""CUDA graphs: `--compile` on NVIDIA's and AMD's GPUs.

    compute = RecordedStep(step, net, batch, record)
    loss, *gradients = compute(X, y, sample_weight)        # overwritten by the next call

A replay launches the kernels of an uncompiled step together, without Python, autograd and a launch for each of them.
BatchNorm's running statistics change in place, and dropout advances the random generator.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs has the rules.
"""

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

RECORDED = "CUDA graph of loss and gradients"
WARM_UP = 3  # calls in which libraries choose kernels and allocate memory

Function = Callable[[], list[Tensor]]
Replay = Callable[[], object]


class Record(Protocol):
    """A function like `record`."""

    def __call__(self, function: Function, warm_up: int = ..., /) -> tuple[Replay, list[Tensor]]: ...


class RecordedStep:
    """`step` as a function that replays it for batches of the shapes of `batch`, whose memory it takes over.

    Each call overwrites the results of the last, and adds the first of them, the loss, to `total`. The buffers of `net`
    and the random generators stay as they were.
    """

    def __init__(
        self, step: Callable[..., list[Tensor]], net: nn.Module, batch: tuple[Tensor, ...], record: Record
    ) -> None:
        device, buffers = batch[0].device, [(buffer, buffer.clone()) for buffer in net.buffers()]
        self.total = torch.zeros((), device=device)
        self.batch = batch
        # a kernel copies all of a dtype; 65,536 values, or it would take long
        kinds = [value.dtype if value.numel() <= 65_536 else place for place, value in enumerate(batch)]
        self.alike = [[place for place, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]

        def step_and_sum() -> list[Tensor]:
            results = step(batch)
            self.total.add_(results[0])
            return results

        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                self.replay, self.results = record(step_and_sum)
            finally:
                for buffer, value in [*buffers, (self.total, torch.zeros_like(self.total))]:
                    buffer.copy_(value)

    def __call__(self, *values: Tensor) -> list[Tensor]:
        for places in self.alike:
            if len(places) == 1:
                self.batch[places[0]].copy_(values[places[0]])
            else:
                torch._foreach_copy_([self.batch[place] for place in places], [values[place] for place in places])
        self.replay()
        return self.results


def record(function: Function, warm_up: int = WARM_UP) -> tuple[Replay, list[Tensor]]:
    """Record what `function` does on the GPU; returns a function that repeats it, and the results, which it overwrites.

    Recording does nothing itself; before it, `function` is called `warm_up` times. Raises RuntimeError if it cannot be
    recorded, e.g. because it waits for the GPU.
    """
    graph, mode = torch.cuda.CUDAGraph(), torch.cuda.get_sync_debug_mode()
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):  # here too, because torch.cuda.graph does not leave its stream after an error
            for call in range(warm_up):
                if call == warm_up - 1:
                    _refuse_to_wait()
                function()
            torch.cuda.set_sync_debug_mode(mode)
            # relaxed: libraries may load kernels, and other threads, e.g. NCCL's watchdog, may call CUDA meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
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


RECORDERS: dict[str, Record] = {"cuda": record}  # by type of device; the others compile with inductor
