"""The loss of a batch; with `--compile`, loss and gradients are one graph: a CUDA graph, or compiled by inductor.

compute_loss = build_loss(config, model, accelerator, images)
loss = compute_loss(X, y, sample_weight)
accelerator.backward(loss)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, gather_object
from torch import Tensor, nn
from torch.func import functional_call

from mnist.config.settings import TrainConfig
from mnist.data.splits import Split
from mnist.data.transforms import scale_pixels
from mnist.errors import ConfigError
from mnist.launch.hardware import choose_threads
from mnist.models.networks import MODELS
from mnist.training.graph import RECORDED, RECORDERS, RecordedStep
from mnist.training.inductor import COMPILED, compile_graph, trace
from mnist.training.lean import LeanAccelerator
from mnist.training.losses import LOSSES, Loss, smoothed


class CapturedLoss:
    """The loss for (X, y, sample_weight); computes the gradients too, and `backward` assigns them.

    Gradients are accumulated like accelerator.backward does and averaged over processes like DistributedDataParallel.
    """

    def __init__(
        self, model: Any, forward: Callable[..., Sequence[Tensor]], compiler: str, accelerator: Accelerator
    ) -> None:
        """`forward` returns loss and gradients of a batch, whose memory its next call may overwrite."""
        self.model = model
        self.forward = forward
        self.compiler = compiler
        self.accelerator = accelerator
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.loss: Tensor | None = None
        self.total: Tensor | None = getattr(forward, "total", None)
        self.gradients: list[Tensor] = []
        self.keeps_gradients = compiler == RECORDED and accelerator.gradient_accumulation_steps == 1
        self.averages: list[Tensor] = []  # of the gradients of several processes, in `memory`

    def __call__(self, X: Tensor, y: Tensor, sample_weight: Tensor) -> Tensor:
        self.loss, *self.gradients = self.forward(X, y, sample_weight)
        return self.loss

    def backward(self) -> None:
        gradients, self.gradients = self.gradients, []
        if self.accelerator.gradient_accumulation_steps > 1:
            gradients = [
                gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
                for parameter, gradient in zip(self.parameters, gradients, strict=True)
            ]
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            gradients = self._average(gradients)
            # like its own forward pass: DistributedDataParallel then broadcasts the buffers before an evaluation
            self.model.require_forward_param_sync = True
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def _average(self, gradients: list[Tensor]) -> list[Tensor]:
        """Their means over the processes, in the same memory at every step."""
        if not self.averages:
            sizes = [gradient.numel() for gradient in gradients]
            self.memory = gradients[0].new_empty(sum(sizes))
            pairs = zip(torch.split(self.memory, sizes), gradients, strict=True)
            self.averages = [part.as_strided(one.shape, one.stride(), part.storage_offset()) for part, one in pairs]
        torch._foreach_copy_(self.averages, gradients)
        torch.distributed.all_reduce(self.memory.div_(self.accelerator.num_processes))
        return self.averages


def build_loss(
    config: TrainConfig, model: nn.Module, accelerator: LeanAccelerator, images: Split
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of (X, y, sample_weight) that computes loss_function(model(X), y, sample_weight).

    `model` is prepared by `accelerator`; `images` are the training images. Also sets the number of CPU threads, which
    is compiled into the code. All processes must call it. Raises ConfigError like capture_loss.
    """
    loss_function = smoothed(LOSSES[config.loss], config.label_smoothing)
    net = accelerator.unwrap_model(model, keep_torch_compile=False)
    # [B, channels, height, width]: the shape of every batch of a process
    X = scale_pixels(images.images[: config.batch_sizes(accelerator.num_processes).batch_size]).to(accelerator.device)
    choose_threads(net, X)
    wanted = config.compile
    if wanted is None:  # where it computes the same, and starts at once
        wanted = accelerator.device.type in RECORDERS and config.model in MODELS and not refusal(net, accelerator)
    if wanted:
        accelerator.captured, accelerator.why_not_captured = capture_loss(model, loss_function, accelerator, X)
    if accelerator.captured is not None:
        return accelerator.captured
    return lambda X, y, sample_weight: loss_function(model(X), y, sample_weight)


def capture_loss(
    model: nn.Module, loss_function: Loss, accelerator: Accelerator, X: Tensor
) -> tuple[CapturedLoss | None, str]:
    """The loss and its gradients as one graph for batches shaped like `X`; all processes must call it.

    `model` is prepared by Accelerate. Returns None and the reason on all processes if one of them fails, e.g. without a
    C++ compiler: training gives the same result without. Raises ConfigError for a model or settings that would train
    differently.
    """
    net = accelerator.unwrap_model(model, keep_torch_compile=False)
    if problem := refusal(net, accelerator):
        raise ConfigError(f"--compile: {problem}")
    batch = X, X.new_zeros(len(X), dtype=torch.long), X.new_ones(len(X))
    step = partial(loss_and_gradients, net, loss_function, accelerator.gradient_accumulation_steps)
    make: Callable[[], Callable[..., Sequence[Tensor]]]
    if recorder := RECORDERS.get(accelerator.device.type):
        compiler, make = RECORDED, partial(RecordedStep, step, net, batch, recorder)
    else:
        accelerator.print("Compiling (seconds; up to half a minute the first time) ...", flush=True)
        compiler, make = COMPILED, partial(compile_graph, *trace(step, net, batch), batch)
    reason = ""
    with accelerator.local_main_process_first():  # the others use inductor's cache
        try:
            captured = CapturedLoss(model, make(), compiler, accelerator)
        except Exception as error:
            reason = compiler_error(error)
    reasons = [reason for reason in gather_object([reason]) if reason]
    return (None, reasons[0]) if reasons else (captured, "")


def refusal(net: nn.Module, accelerator: Accelerator) -> str:
    """What a graph cannot do, or would do differently; empty if nothing."""
    if accelerator.scaler is not None:
        return "does not support --mixed-precision fp16 (scaled gradients). Use bf16."
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        return "the launcher already compiles the model (dynamo_backend). Drop one of the two."
    fits = is_dense if accelerator.device.type in RECORDERS else Tensor.is_contiguous
    if not all(map(fits, net.parameters())):
        return "does not support non-contiguous parameters, e.g. from .to(memory_format=...)."
    return ""


def loss_and_gradients(
    net: nn.Module,
    loss_function: Loss,
    accumulation_steps: int,
    batch: Sequence[Tensor],
    values: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """The loss of (X, y, sample_weight), and its gradients divided by `accumulation_steps`.

    `values` replace parameters and buffers of `net` by name.
    """
    values, trainable = values or {}, {name: own for name, own in net.named_parameters() if own.requires_grad}
    # leaves of their own, because the parameters' belong to DistributedDataParallel
    leaves = {name: values.get(name, own).detach().requires_grad_() for name, own in trainable.items()}
    X, y, sample_weight = batch
    with torch.enable_grad():
        loss = loss_function(functional_call(net, {**values, **leaves}, (X,)), y, sample_weight)
        scaled = loss / accumulation_steps if accumulation_steps > 1 else loss
        gradients = torch.autograd.grad(scaled, list(leaves.values()))
    # like backward(): each in memory of its own, and in the layout of its parameter, which fused optimizers need
    shared = [sum(gradient is other for other in gradients) > 1 for gradient in gradients]
    copies = (one.clone() if several else one for one, several in zip(gradients, shared, strict=True))
    return [loss.detach(), *map(in_layout_of, leaves.values(), copies)]


def in_layout_of(parameter: Tensor, values: Tensor) -> Tensor:
    """`values` in memory like `parameter`, which must be dense."""
    return values if values.stride() == parameter.stride() else torch.empty_like(parameter).copy_(values)


def is_dense(values: Tensor) -> bool:
    """Whether the values lie in memory one after another, in any order of dimensions, e.g. channels last."""
    return torch.empty_like(values).stride() == values.stride()


def compiler_error(error: BaseException) -> str:
    """The first line of an error's message with "error:" in it, else its first line."""
    cause = getattr(error, "inner_exception", error)  # inductor's
    if type(cause).__name__ == "InvalidCxxCompiler":
        return "no C++ compiler found (CXX, g++)"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
    return f"{type(cause).__name__}: {next((line for line in lines if 'error:' in line), lines[0])}"
