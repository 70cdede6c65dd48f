"""The loss of a batch and its gradients as one compiled graph: `--compile`.

    compiled, reason = compile_loss(net, loss_function, accelerator, X)      # takes seconds
    loss = compiled(X, y, weight)     # the gradients are found with it
    accelerator.backward(loss)        # hands them out to the parameters

torch.compile(net) leaves the loss, autograd and the checks of each call outside: of the tutorial's network that is most
of a step. Here forward and backward pass are one graph of operations on tensors, which holds for batches of one shape:
there is no other (data/loader.py). docs/performance.md has what each way gave.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mnist.errors import ConfigError
from mnist.training.losses import Loss

Batch = tuple[Tensor, Tensor, Tensor]


class CompiledLoss:
    """The loss of `net` for (X, y, weight), a scalar whose `backward` hands out gradients that are there already.

    They are divided by the batches of a window and added to those of earlier ones, as accelerator.backward does, and at
    the end of a window averaged over the processes, as DistributedDataParallel does.
    """

    def __init__(self, net: nn.Module, forward: Callable[..., Sequence[Tensor]], accelerator: Accelerator) -> None:
        """`forward` takes the parameters of `net` that learn, its buffers and a batch; returns loss and gradients."""
        self.forward = forward
        self.accelerator = accelerator
        self.parameters = [it for it in net.parameters() if it.requires_grad]
        self.state = [it.detach() for it in (*self.parameters, *net.buffers())]  # the same memory: they change with it
        self.gradients: list[Tensor] = []

    def __call__(self, X: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        loss, *self.gradients = self.forward(*self.state, X, y, weight)
        loss.backward = self._backward  # type: ignore[assignment, method-assign]
        return loss

    def _backward(self) -> None:
        gradients, self.gradients = self.gradients, []
        if (steps := self.accelerator.gradient_accumulation_steps) > 1:
            torch._foreach_div_(gradients, steps)
            if earlier := [it.grad for it in self.parameters if it.grad is not None]:
                torch._foreach_add_(gradients, earlier)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            flat = torch.cat([it.flatten() for it in gradients]).div_(self.accelerator.num_processes)
            torch.distributed.all_reduce(flat)
            parts = torch.split(flat, [it.numel() for it in gradients])
            gradients = [part.view_as(it) for part, it in zip(parts, gradients, strict=True)]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def compile_loss(
    net: nn.Module, loss_function: Loss, accelerator: Accelerator, X: Tensor
) -> tuple[CompiledLoss | None, str]:
    """The compiled loss of batches of the shape of `X`; all processes must call it.

    `net` is the model as Accelerate has prepared it, in its precision, without DistributedDataParallel around it.
    None, on all, and the reason why where the code cannot be compiled on the machine of one of them: there is no C++
    compiler, say. Raises ConfigError for what would not train as it does uncompiled.
    """
    check(net, accelerator)
    forward: Callable[..., Sequence[Tensor]] | None
    y, weight = X.new_zeros(len(X), dtype=torch.long), X.new_ones(len(X))
    batch = X.to(accelerator.device), y.to(accelerator.device), weight.to(accelerator.device)
    graph, arguments = trace(net, loss_function, batch)
    with accelerator.local_main_process_first():  # the others find the code in inductor's cache
        forward, reason = compile_graph(graph, arguments)
    reasons = [it for it in gather_object([reason]) if it]
    if forward is None or reasons:
        return None, reasons[0]
    return CompiledLoss(net, forward, accelerator), ""


def check(net: nn.Module, accelerator: Accelerator) -> None:
    """Raise ConfigError for what a graph of tensors without a memory cannot do, or would do otherwise."""
    if accelerator.scaler is not None:
        raise ConfigError("--compile: not with --mixed-precision fp16, whose gradients are scaled; bf16 can be.")
    if accelerator.state.dynamo_plugin.backend.value.lower() != "no":
        raise ConfigError(
            "--compile: the launcher compiles the model already (dynamo_backend). Leave one of them away."
        )
    if any(getattr(module, "track_running_stats", False) for module in net.modules()):
        raise ConfigError("--compile: not for a network with BatchNorm, whose running statistics change as it trains.")
    if not all(it.is_contiguous() for it in net.parameters()):
        raise ConfigError(
            "--compile: not for parameters that are not contiguous, as .to(memory_format=...) makes them."
        )


def trace(net: nn.Module, loss_function: Loss, batch: Batch) -> tuple[GraphModule, list[Tensor]]:
    """The graph of loss and gradients, and arguments for it: parameters that learn, buffers, X, y and weight.

    Raises ConfigError for a network that draws random numbers, which would not be those of the uncompiled one, and for
    what is no such graph.
    """
    learning = {name: it for name, it in net.named_parameters() if it.requires_grad}
    constant = {name: it for name, it in net.named_parameters() if not it.requires_grad}
    names, count = [*learning, *dict(net.named_buffers())], len(learning)

    def loss_and_gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
        state, (X, y, weight) = dict(zip(names, arguments, strict=False)), arguments[len(names) :]
        leaves = [it.detach().requires_grad_() for it in arguments[:count]]
        state = constant | state | dict(zip(learning, leaves, strict=True))
        with torch.enable_grad():
            loss = loss_function(functional_call(net, state, (X,)), y, weight)
            gradients = torch.autograd.grad(loss, leaves)
        # laid out as the parameters are, which autograd would see to: the fused optimizers read both in one order
        return loss.detach(), *(it.contiguous() for it in gradients)

    arguments = [it.detach() for it in (*learning.values(), *net.buffers(), *batch)]
    try:
        graph = make_fx(loss_and_gradients)(*arguments)
    except RuntimeError as error:
        raise ConfigError(
            f"--compile: what the network or the loss computes depends on the values of its tensors, or is otherwise no"
            f" graph of operations ({str(error).splitlines()[0]}). Leave the flag away."
        ) from error
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ConfigError(
                f"--compile: not for a network that draws random numbers, as dropout does ({node.target})."
            )
    return graph, arguments


def compile_graph(graph: GraphModule, arguments: list[Tensor]) -> tuple[Callable[..., Sequence[Tensor]] | None, str]:
    """The graph compiled, or None and why it could not be.

    What inductor needs is not everywhere: a C++ compiler and Python's headers on a CPU, Triton and a C compiler on a
    GPU. A run goes on without it and comes to the same end, so all of its errors are reasons and no failures.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # which warns where CUDA is and no GPU
    import torch._inductor.config
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        # by this process itself: a pool of others would outlive the moment
        with torch._inductor.config.patch(compile_threads=1):
            compiled = torch._inductor.compile(graph, [*arguments])
            compiled(*arguments)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        return None, "no C++ compiler was found (CXX, g++)" if isinstance(cause, InvalidCxxCompiler) else first_line(
            cause
        )
    return compiled, ""


def first_line(error: BaseException) -> str:
    """Of a compiler's error the line that says what is wrong, where one does; else the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    told = next((line for line in lines if "error:" in line), lines[0])
    return f"{type(error).__name__}: {told}"
