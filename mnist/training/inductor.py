"""Loss and gradients of a batch, compiled by inductor: `--compile` without CUDA.

    graph, values = trace(step, net, batch)                # ConfigError for BatchNorm and dropout
    compute = compile_graph(graph, values, batch)          # seconds
    loss, *gradients = compute(X, y, sample_weight)

torch.compile(net) leaves out the loss, autograd and the checks of each call, which are most of a step of the tutorial's
network. Here one graph covers the forward and backward pass, for the single batch shape that data/loader.py makes.
docs/performance.md has the measurements.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mnist.errors import ConfigError

COMPILED = "inductor, loss and gradients in one graph"


def trace(
    step: Callable[..., list[Tensor]], net: nn.Module, batch: tuple[Tensor, ...]
) -> tuple[GraphModule, list[Tensor]]:
    """The graph of `step`, and its arguments before the batch: trainable parameters and buffers.

    `step` takes a batch, and values of parameters and buffers by name. Raises ConfigError for a network that a
    stateless graph would train differently, or that cannot be traced.
    """
    if any(getattr(module, "track_running_stats", False) for module in net.modules()):
        raise ConfigError("--compile: does not support BatchNorm, whose running statistics change during training.")
    trainable = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    state: dict[str, Tensor] = {**trainable, **dict(net.named_buffers())}
    values = [tensor.detach() for tensor in state.values()]  # share memory with the parameters

    def step_of_all(*arguments: Tensor) -> list[Tensor]:
        return step(arguments[len(state) :], dict(zip(state, arguments, strict=False)))

    try:
        graph = make_fx(step_of_all)(*values, *batch)
    except RuntimeError as error:
        raise ConfigError(
            f"--compile: the network or the loss cannot be traced, e.g. because of a branch on tensor values"
            f" ({str(error).splitlines()[0]}). Omit the flag."
        ) from error
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ConfigError(
                f"--compile: does not support random numbers in the network, e.g. dropout ({node.target})."
            )
    return graph, values


def compile_graph(
    graph: GraphModule, values: list[Tensor], batch: tuple[Tensor, ...]
) -> Callable[..., Sequence[Tensor]]:
    """The compiled graph as a function of the batch alone.

    Raises what inductor raises, e.g. without a C++ compiler and Python's headers.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns about CUDA without a GPU
    import torch._inductor.config  # private: another torch may lack it or have changed it

    with torch._inductor.config.patch(compile_threads=1):  # in this process: a pool of workers would outlive the call
        compiled = torch._inductor.compile(graph, [*values, *batch])
        compiled(*values, *batch)
    return lambda *batch: compiled(*values, *batch)
