"""Losses, optimizers and learning-rate schedules by name.

optimizer = build_optimizer("adam", model.parameters(), learning_rate=1e-3)
scheduler = build_schedule("cosine", optimizer, warmup_steps=100, total_steps=18_000)
loss = LOSSES["nll"](model(X), y, weight)
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def nll_loss(output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Negative log-likelihood: cross-entropy, as `output` holds log-probabilities.

    output [batch, classes], y [batch] class numbers, weight [batch] what each image counts -> scalar
    """
    return torch.dot(F.nll_loss(output, y, reduction="none"), weight)


def mse_loss(output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of the probabilities to one-hot targets, averaged over the classes; shapes as in nll_loss."""
    one_hot = torch.zeros_like(output).scatter(1, y[:, None], 1)  # F.one_hot looks at y, and so waits for a GPU
    return torch.dot((output.exp() - one_hot).square().mean(dim=1), weight)


LOSSES: dict[str, Loss] = {"nll": nll_loss, "mse": mse_loss}

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    # fused: one kernel for all parameters instead of a Python loop; on the CPU too
    "adam": lambda parameters, **settings: torch.optim.Adam(parameters, fused=True, **settings),
    "radam": torch.optim.RAdam,
    "adamw": lambda parameters, **settings: torch.optim.AdamW(parameters, fused=True, **settings),
    "sgd": lambda parameters, **settings: torch.optim.SGD(parameters, momentum=0.9, fused=True, **settings),
}

FUSED_UPDATES: dict[type[Optimizer], Callable[..., None]] = {
    torch.optim.Adam: torch._fused_adam_,
    torch.optim.AdamW: torch._fused_adamw_,
}


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float = 0.0
) -> Optimizer:
    """The torch optimizer called `name`; radam is the tutorial's "rectified Adam" (Liu et al., 2019)."""
    return OPTIMIZERS[name](parameters, lr=learning_rate, weight_decay=weight_decay)


class LeanAccelerator(Accelerator):
    """An Accelerator that does nothing for accumulated batches where there are none; otherwise as Accelerate's own.

    Accelerate 1.15 divides the loss by one, which its backward pass does again, and enters three contexts for nothing:
    together 6 to 7 % of a step with batches of 10.
    """

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[Any]:
        if self.gradient_accumulation_steps > 1:
            return super().accumulate(*models)  # type: ignore[no-any-return]
        self.sync_gradients = True
        return nullcontext()

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        has_its_own = "backward" in vars(loss)  # training/capture.py's
        if has_its_own or (self.gradient_accumulation_steps == 1 and self.scaler is None):
            loss.backward(**kwargs)  # type: ignore[no-untyped-call]
        else:
            super().backward(loss, **kwargs)


class AdamState(NamedTuple):
    """What a fused Adam keeps of a group of parameters, each in a tensor of its own; of their steps also one of all."""

    steps: Tensor  # [parameters], which `step` are views of: counted up at once, they take a fifth less of the update
    step: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


class LeanOptimizer(AcceleratedOptimizer):
    """Accelerate's wrapper of an optimizer, without the work that it and torch do anew at every call.

    Accelerate 1.15 searches the disk for a package in every `step` and reads a signature in every `zero_grad`: with
    batches of 10 on a CPU that added a fifth of a plain step. torch 2.14 gathers the tensors of a fused Adam anew in
    every `step`, which takes as long as the update itself (the MLP: 93 us together, 41 without), and its `zero_grad`
    takes 8 us for half a microsecond's work. The behaviour is the same, to the bit: both calls do nothing inside a
    window of accumulated batches.
    """

    _is_accelerate_prepared = True  # so accelerator.prepare() keeps it, instead of wrapping it once more

    def __init__(self, optimizer: Optimizer, scaler: Any = None) -> None:
        super().__init__(optimizer, scaler=scaler)
        # of each group; empty where torch's own step is the one to take, None before it is known
        self.states: list[AdamState] | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.states = None  # the optimizer has other tensors now

    def zero_grad(self, set_to_none: bool | None = True) -> None:
        if not self.gradient_state.sync_gradients:
            return
        if set_to_none is False:
            self.optimizer.zero_grad(set_to_none=False)
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self, closure: Callable[[], float] | None = None) -> None:
        if self.scaler is not None or closure is not None:  # fp16 on a GPU: the gradients are scaled
            super().step(closure)
        elif self.gradient_state.sync_gradients and not self._step_of_adam():
            self.optimizer.step()
            if self.states is None:
                self.states = self._states_of_adam()

    def _states_of_adam(self) -> list[AdamState]:
        """What a fused Adam keeps of its parameters on the CPU, once it has stepped; nothing of others."""
        groups, state, kind = self.optimizer.param_groups, self.optimizer.state, type(self.optimizer)
        parameters = [parameter for group in groups for parameter in group["params"]]
        on_cpu = all(it.device.type == "cpu" and it.dtype == parameters[0].dtype for it in parameters)
        if kind not in FUSED_UPDATES or not on_cpu or not all(it in state for it in parameters):
            return []
        decoupled = kind is torch.optim.AdamW  # torch's Adam can be it by a setting, and would need the other update
        for group in groups:
            if not group["fused"] or group["amsgrad"] or group.get("decoupled_weight_decay", decoupled) != decoupled:
                return []
        states = []
        for group in groups:
            kept = [state[parameter] for parameter in group["params"]]
            steps = torch.stack([it["step"] for it in kept])
            for it, step in zip(kept, steps.unbind(), strict=True):
                it["step"] = step
            states.append(AdamState(steps, *([it[name] for it in kept] for name in AdamState._fields[1:])))
        return states

    @torch.no_grad()
    def _step_of_adam(self) -> bool:
        """The update as torch.optim makes it, from the tensors that are known; whether it could be made so."""
        if not self.states:
            return False
        groups = self.optimizer.param_groups
        gradients = [[parameter.grad for parameter in group["params"]] for group in groups]
        if any(gradient is None for of_group in gradients for gradient in of_group):
            return False
        update = FUSED_UPDATES[type(self.optimizer)]
        for group, of_group, state in zip(groups, gradients, self.states, strict=True):
            state.steps.add_(1)
            settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            beta1, beta2 = group["betas"]
            moments = state.exp_avg, state.exp_avg_sq
            update(group["params"], of_group, *moments, [], state.step, beta1=beta1, beta2=beta2, **settings)
        return True


def clip_gradients(
    model: nn.Module, accelerator: Accelerator, max_norm: float | None, measure: bool = False
) -> Tensor | None:
    """Scale the gradient of an optimizer step down to the length `max_norm`; returns the length that it had.

    None inside a window of accumulated batches, and where there is no `max_norm` unless it is to be measured.
    """
    if accelerator.sync_gradients and (max_norm is not None or measure):
        return accelerator.clip_grad_norm_(model.parameters(), max_norm or math.inf)  # type: ignore[no-any-return]
    return None


def schedule_factor(name: str, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate is multiplied by at optimizer step `step`, counted from 0.

    The warm-up is linear and reaches 1 at `step == warmup_steps`; linear and cosine then fall towards 0, which they
    would reach at `step == total_steps`. one-cycle (Smith and Topin, 2017) starts at 1/25, takes 30 % of all steps to
    rise unless told otherwise, and falls towards 1/250,000, both along a cosine.
    """
    one_cycle = name == "one-cycle"
    if one_cycle and warmup_steps == 0:
        warmup_steps = math.ceil(0.3 * total_steps)
    if step < warmup_steps:
        return _along_cosine(1 / 25, 1.0, step / warmup_steps) if one_cycle else (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    match name:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return _along_cosine(1.0, 0.0, progress)
        case "one-cycle":
            return _along_cosine(1.0, 1 / 250_000, progress)
    raise ValueError(f"unknown schedule {name}")


def _along_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def build_schedule(name: str, optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """A scheduler to be stepped once after each optimizer step of the whole job."""
    settings: dict[str, Any] = {"warmup_steps": warmup_steps, "total_steps": total_steps}
    return LambdaLR(optimizer, lambda step: schedule_factor(name, step, **settings))
