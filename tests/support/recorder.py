"""A stand-in for CUDA graphs on the CPU, for mnist/training/graph.py; also train.py with it:

    python tests/support/recorder.py --compile             # and train.py's other flags

What a CUDA graph does that an ordinary function does not: recording runs Python but computes nothing, a replay computes
but runs no Python, and every tensor keeps its memory. A replay first fills that memory with NaN, so whoever still needs
results of the last one fails.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mnist.training.graph import WARM_UP, Function, Replay


def tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Records torch's operations with the tensors they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: dict[int, Tensor] = {}  # by address
        self.outside: dict[int, tuple[Tensor, Tensor]] = {}  # tensors made before, and copies of them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # .item()
            raise RuntimeError("not permitted while recording")
        read = {address(tensor): tensor for tensor in tensors((args, kwargs))}
        for place in read.keys() - self.made.keys() - self.outside.keys():
            self.outside[place] = read[place], read[place].clone()
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors(results)))
        self.made |= {address(tensor): tensor for tensor in tensors(results) if address(tensor) not in read}
        return results

    def undo(self) -> None:
        for tensor, copy in self.outside.values():
            tensor.copy_(copy)
        self.spoil()

    def spoil(self) -> None:
        for tensor in self.made.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)

    def replay(self) -> None:
        self.spoil()
        for func, args, kwargs, results in self.calls:
            for kept, result in zip(results, tensors(func(*args, **kwargs)), strict=True):
                if kept.data_ptr() != result.data_ptr():  # else it is a view, or was written in place
                    kept.copy_(result)


def record(function: Function, warm_up: int = WARM_UP) -> tuple[Replay, list[Tensor]]:
    """Like mnist.training.graph.record."""
    for _ in range(warm_up):
        function()
    with torch.random.fork_rng([]):
        try:
            with Tape() as tape:
                results = function()
        finally:
            torch.no_grad()(tape.undo)()
    return torch.no_grad()(tape.replay), results


if __name__ == "__main__":
    import train
    from mnist.launch.main import end_process
    from mnist.training import graph

    graph.RECORDERS["cpu"] = record
    end_process(train.main())
