"""The loss of a batch; with `--compile`, loss and gradients are one compiled graph.

    compute_loss = build_loss(config, model, accelerator, images)      # takes seconds with --compile
    loss = compute_loss(X, y, sample_weight)
    accelerator.backward(loss)

torch.compile(net) leaves out the loss, autograd and the checks of each call, which are most of a step of the tutorial's
network. Here one graph covers the forward and backward pass, for the single batch shape that data/loader.py makes.
docs/performance.md has the measurements.
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
    """The loss of `net` for (X, y, sample_weight); computes the gradients too, and `backward` assigns them.

    Gradients are accumulated like accelerator.backward does and averaged over processes like DistributedDataParallel.
    """

    def __init__(self, net: nn.Module, forward: Callable[..., Sequence[Tensor]], accelerator: Accelerator) -> None:
        """`forward` takes the trainable parameters of `net`, its buffers and a batch; returns loss and gradients."""
        self.forward = forward
        self.accelerator = accelerator
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        # share memory with the parameters
        self.state = [tensor.detach() for tensor in (*self.parameters, *net.buffers())]
        self.loss: Tensor | None = None
        self.gradients: list[Tensor] = []

    def __call__(self, X: Tensor, y: Tensor, sample_weight: Tensor) -> Tensor:
        self.loss, *self.gradients = self.forward(*self.state, X, y, sample_weight)
        return self.loss

    def backward(self) -> None:
        gradients, self.gradients = self.gradients, []
        if (steps := self.accelerator.gradient_accumulation_steps) > 1:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                gradient.div_(steps)
                if parameter.grad is not None:
                    gradient.add_(parameter.grad)
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
    """A function of (X, y, sample_weight) that computes loss_function(model(X), y, sample_weight).

    `model` is prepared by `accelerator`; `images` are the training images. Also sets the number of CPU threads, which
    is compiled into the code. All processes must call it. Raises ConfigError like compile_loss.
    """
    loss_function, net = LOSSES[config.loss], accelerator.unwrap_model(model, keep_torch_compile=False)
    # [B, channels, height, width]: the shape of every batch of a process
    X = scale_pixels(images.images[: config.batch_sizes(accelerator.num_processes).batch_size]).to(accelerator.device)
    choose_threads(net, X)
    if config.compile:
        accelerator.print("Compiling (seconds; up to half a minute the first time) ...", flush=True)
        accelerator.captured, accelerator.why_not_captured = compile_loss(net, loss_function, accelerator, X)
    if accelerator.captured is not None:
        return accelerator.captured
    return lambda X, y, sample_weight: loss_function(model(X), y, sample_weight)


def compile_loss(
    net: nn.Module, loss_function: Loss, accelerator: Accelerator, X: Tensor
) -> tuple[CompiledLoss | None, str]:
    """The compiled loss for batches shaped like `X`; all processes must call it.

    `net` is the model prepared by Accelerate, without its DistributedDataParallel wrapper. Returns None and the reason
    on all processes if one of them cannot compile, e.g. without a C++ compiler. Raises ConfigError for a model or
    settings that would train differently when compiled.
    """
    check(net, accelerator)
    forward: Callable[..., Sequence[Tensor]] | None
    batch = X, X.new_zeros(len(X), dtype=torch.long), X.new_ones(len(X))
    graph, arguments = trace(net, loss_function, batch)
    with accelerator.local_main_process_first():  # the others use inductor's cache
        forward, reason = compile_graph(graph, arguments)
    reasons = [reason for reason in gather_object([reason]) if reason]
    if forward is None or reasons:
        return None, reasons[0]
    return CompiledLoss(net, forward, accelerator), ""


def check(net: nn.Module, accelerator: Accelerator) -> None:
    """Raise ConfigError for what a stateless graph of tensors cannot do, or would do differently."""
    if accelerator.scaler is not None:
        raise ConfigError("--compile: does not support --mixed-precision fp16 (scaled gradients). Use bf16.")
    if accelerator.state.dynamo_plugin.backend.value.lower() != "no":
        raise ConfigError("--compile: the launcher already compiles the model (dynamo_backend). Drop one of the two.")
    if any(getattr(module, "track_running_stats", False) for module in net.modules()):
        raise ConfigError("--compile: does not support BatchNorm, whose running statistics change during training.")
    if not all(parameter.is_contiguous() for parameter in net.parameters()):
        raise ConfigError("--compile: does not support non-contiguous parameters, e.g. from .to(memory_format=...).")


def trace(net: nn.Module, loss_function: Loss, batch: Batch) -> tuple[GraphModule, list[Tensor]]:
    """The graph of loss and gradients, and its arguments: trainable parameters, buffers, X, y and sample_weight.

    Raises ConfigError for a network that draws random numbers, which would differ from those of the uncompiled one, or
    that cannot be traced.
    """
    trainable = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    frozen = {name: parameter for name, parameter in net.named_parameters() if not parameter.requires_grad}
    names = [*trainable, *dict(net.named_buffers())]

    def loss_and_gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
        state, (X, y, sample_weight) = dict(zip(names, arguments, strict=False)), arguments[len(names) :]
        leaves = {name: state[name].detach().requires_grad_() for name in trainable}
        with torch.enable_grad():
            loss = loss_function(functional_call(net, frozen | state | leaves, (X,)), y, sample_weight)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
        # fused optimizers need the parameters' memory layout, which autograd would ensure
        return loss.detach(), *(gradient.contiguous() for gradient in gradients)

    arguments = [tensor.detach() for tensor in (*trainable.values(), *net.buffers(), *batch)]
    try:
        graph = make_fx(loss_and_gradients)(*arguments)
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
    return graph, arguments


def compile_graph(graph: GraphModule, arguments: list[Tensor]) -> tuple[Callable[..., Sequence[Tensor]] | None, str]:
    """The compiled graph, or None and the reason.

    inductor needs a C++ compiler and Python's headers on a CPU, Triton and a C compiler on a GPU. Without them training
    gives the same result uncompiled, so none of its errors ends the run.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns about CUDA without a GPU
    try:
        import torch._inductor.config  # private: another torch may lack it or have changed it

        # in this process: a pool of workers would outlive the call
        with torch._inductor.config.patch(compile_threads=1):
            compiled = torch._inductor.compile(graph, [*arguments])
            compiled(*arguments)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        missing = type(cause).__name__ == "InvalidCxxCompiler"
        return None, "no C++ compiler found (CXX, g++)" if missing else compiler_error(cause)
    return compiled, ""


def compiler_error(error: BaseException) -> str:
    """The type of an error, and the first line of its message with "error:" in it, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {next((line for line in lines if 'error:' in line), lines[0])}"
