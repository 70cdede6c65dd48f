"""The loss of a batch, and with `--compile` its gradients too, as one compiled graph.

    compute_loss = build_loss(config, model, accelerator, images)      # with --compile it takes seconds
    loss = compute_loss(X, y, sample_weight)
    accelerator.backward(loss)

torch.compile(net) leaves the loss, autograd and the checks of each call outside: for the tutorial's network that is
most of a step. Here forward and backward pass are one graph of operations on tensors, for batches of one shape: there
is no other (data/loader.py). docs/performance.md has what each way gave.
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

from mnist.config.settings import TrainConfig
from mnist.data.splits import Split
from mnist.data.transforms import scale_pixels
from mnist.errors import ConfigError
from mnist.launch.hardware import choose_threads
from mnist.training.lean import LeanAccelerator
from mnist.training.losses import LOSSES, Loss

Batch = tuple[Tensor, Tensor, Tensor]


class CompiledLoss:
    """The loss of `net` for (X, y, sample_weight); its gradients are computed with it, and `backward` hands them out.

    They are divided by the batches of a window and added to those of earlier ones, as accelerator.backward does, and at
    the end of a window averaged over the processes, as DistributedDataParallel does.
    """

    def __init__(self, net: nn.Module, forward: Callable[..., Sequence[Tensor]], accelerator: Accelerator) -> None:
        """`forward` takes the parameters of `net` that learn, its buffers and a batch; returns loss and gradients."""
        self.forward = forward
        self.accelerator = accelerator
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        # the same memory, so they change with the parameters
        self.state = [tensor.detach() for tensor in (*self.parameters, *net.buffers())]
        self.loss: Tensor | None = None
        self.gradients: list[Tensor] = []

    def __call__(self, X: Tensor, y: Tensor, sample_weight: Tensor) -> Tensor:
        self.loss, *self.gradients = self.forward(*self.state, X, y, sample_weight)
        return self.loss

    def backward(self) -> None:
        gradients, self.gradients = self.gradients, []
        if (steps := self.accelerator.gradient_accumulation_steps) > 1:
            torch._foreach_div_(gradients, steps)
            if earlier := [parameter.grad for parameter in self.parameters if parameter.grad is not None]:
                torch._foreach_add_(gradients, earlier)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(self.accelerator.num_processes)
            torch.distributed.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            gradients = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def build_loss(
    config: TrainConfig, model: nn.Module, accelerator: LeanAccelerator, images: Split
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What computes the loss of a batch (X, y, sample_weight): loss_function(model(X), y, sample_weight).

    `model` is what `accelerator` has prepared, `images` are those to train on. It also sets the number of CPU threads
    that suits them, which goes into compiled code. All processes must call it. Errors as in compile_loss.
    """
    loss_function, net = LOSSES[config.loss], accelerator.unwrap_model(model, keep_torch_compile=False)
    # [B, channels, height, width]: the shape of all batches of a process
    X = scale_pixels(images.images[: config.batch_sizes(accelerator.num_processes).batch_size]).to(accelerator.device)
    choose_threads(net, X)
    if config.compile:
        accelerator.print("Compiling: some seconds, the first time up to half a minute ...", flush=True)
        accelerator.captured, accelerator.why_not_captured = compile_loss(net, loss_function, accelerator, X)
    if accelerator.captured is not None:
        return accelerator.captured
    return lambda X, y, sample_weight: loss_function(model(X), y, sample_weight)


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
    batch = X, X.new_zeros(len(X), dtype=torch.long), X.new_ones(len(X))
    graph, arguments = trace(net, loss_function, batch)
    with accelerator.local_main_process_first():  # the others find the code in inductor's cache
        forward, reason = compile_graph(graph, arguments)
    reasons = [reason for reason in gather_object([reason]) if reason]
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
