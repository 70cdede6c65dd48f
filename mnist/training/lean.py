"""Accelerate's wrappers without work that has no effect here (a third of the default job's time on a CPU).

accelerator = LeanAccelerator(...)
model, optimizer = accelerator.prepare(model, optimizer)
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mnist.training.graph import RECORDERS, Replay

PRIVATE = {torch.optim.Adam: "_fused_adam_", torch.optim.AdamW: "_fused_adamw_"}
FUSED_UPDATES: dict[type[Optimizer], Callable[..., None]] = {  # without them torch's own step is taken
    kind: getattr(torch, name) for kind, name in PRIVATE.items() if hasattr(torch, name)
}

SETTINGS = ("lr", "betas", "weight_decay", "eps", "maximize")  # of an update


class Captured(Protocol):
    """A loss whose gradients are computed with it (training/capture.py)."""

    compiler: str  # what computes it
    keeps_gradients: bool  # whether every step has the same gradient tensors
    loss: Tensor | None  # the last one
    total: Tensor | None  # the sum of all, if it is computed too

    def __call__(self, X: Tensor, y: Tensor, sample_weight: Tensor, /) -> Tensor: ...
    def backward(self) -> None: ...


class LeanAccelerator(Accelerator):
    """An Accelerator with shortcuts that give the same result to the bit.

    docs/performance.md lists what each of them saves, measured by benchmarks/lean.py.
    """

    captured: Captured | None = None  # the loss that --compile made
    why_not_captured = ""  # the reason why there is none, although --compile asks for it

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Like Accelerate's, but the others wait over gloo: in a barrier of GPUs, NCCL aborts them at the timeout."""
        if not self.is_local_main_process:
            gather_object([None])
        yield
        if self.is_local_main_process:
            gather_object([None])

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        if not keep_fp32_wrapper or "torch._dynamo" in sys.modules:
            return super().unwrap_model(model, keep_fp32_wrapper, keep_torch_compile)  # type: ignore[no-any-return]
        # nothing is compiled; Accelerate 1.15 imports torch's compiler, over a second, to find that out
        while isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        return model

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
        # Accelerate 1.15 looks for sharded tensors, which are not used here; importing their class takes a second
        self.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[Any]:
        if self.gradient_accumulation_steps > 1:
            return super().accumulate(*models)  # type: ignore[no-any-return]
        self.sync_gradients = True  # every batch is an optimizer step
        return nullcontext()

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        if self.captured is not None and loss is self.captured.loss:
            self.captured.backward()
        elif self.gradient_accumulation_steps == 1 and self.scaler is None:
            # Accelerate 1.15 divides the loss by one, and autograd does so again in the backward pass
            loss.backward(**kwargs)  # type: ignore[no-untyped-call]
        else:
            super().backward(loss, **kwargs)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        if self.device.type == "cuda" and self.mixed_precision != "no":
            # for tensor cores: a ResNet-50 in bf16 then takes 0.56 of the time (H100)
            model = model.to(memory_format=torch.channels_last)
        if device_placement is None:
            # Accelerate 1.15 looks for sharded tensors here, too
            device_placement = self.device_placement
        return super().prepare_model(model, device_placement, evaluation_mode)  # type: ignore[no-any-return]

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        return super().prepare_optimizer(LeanOptimizer(optimizer, self), device_placement)

    def prepare_data_loader(
        self, data_loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> Any:
        # batches are made on the device (data/loader.py): Accelerate need not search them for tensors to move
        prepared = super().prepare_data_loader(data_loader, bool(device_placement), slice_fn_for_dispatch)
        prepared.base_dataloader.__class__ = type(data_loader)  # Accelerate makes a plain DataLoader of it
        return prepared


class AdamState(NamedTuple):
    """A fused Adam's state for one parameter group; `step` are views of `steps`."""

    steps: Tensor  # [parameters]; one addition instead of one per parameter
    step: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


class SkippedSteps:
    """Counts the steps that an optimizer skips in fp16, because the gradients overflowed; does not wait for the GPU.

    A fused optimizer is called each time, and its kernel skips the update; torch does not call the others.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.count: Tensor | int = 0
        self.was_called = False
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.was_called = True
        self.count = self.count + getattr(optimizer, "found_inf", 0)
        if isinstance(optimizer, torch.optim.SGD) and not optimizer.state:
            # torch 2.14 does not initialize the momentum of a fused SGD whose first update is skipped
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for parameter in (parameter for parameter in parameters if parameter.grad is not None):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def after_step(self, optimizer: Optimizer) -> None:
        if not self.was_called:
            self.count += 1
            optimizer.zero_grad()
            optimizer.step()  # does nothing, but otherwise torch warns that the schedule moves before the optimizer
        self.was_called = False

    def state_dict(self) -> dict[str, int]:
        return {"count": int(self.count)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class LeanOptimizer(AcceleratedOptimizer):
    """Accelerate's optimizer wrapper without work that it and torch repeat in every call; the same result to the bit.

    Accelerate 1.15 searches the disk for a package in every `step` and inspects a signature in every `zero_grad`. torch
    2.14 gathers the tensors of a fused Adam in every `step`, which takes longer than the update itself, and its
    `zero_grad` takes 8 us instead of 0.5. As in Accelerate, both have no effect inside an accumulation window.

    In fp16 the schedule counts skipped steps too, like Progress: `step_was_skipped` is always False. Accelerate's is
    True for optimizers that are not fused, and for the others that would take waiting for the GPU.
    """

    _is_accelerate_prepared = True  # so Accelerate keeps it, instead of wrapping it once more

    def __init__(self, optimizer: Optimizer, accelerator: LeanAccelerator) -> None:
        super().__init__(optimizer, scaler=accelerator.scaler)
        self.accelerator = accelerator
        self.skipped = None if self.scaler is None else SkippedSteps(optimizer)
        # one per group; empty: use torch's own step; None: not known yet
        self.states: list[AdamState] | None = None
        # gradients and settings of the last step, if the gradients are kept
        self.last: tuple[list[Tensor | None], list[Any]] | None = None
        self.replay: Replay | None = None  # repeats the last update

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.states = self.last = self.replay = None  # the optimizer has other tensors now
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():  # fused updates need them in the layout of the parameter
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

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
        if closure is not None:
            super().step(closure)
        elif self.skipped is not None:  # fp16 on a GPU: the gradients are scaled
            if self.gradient_state.sync_gradients:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.skipped.after_step(self.optimizer)
        elif self.gradient_state.sync_gradients and not self._step_of_adam():
            self.optimizer.step()

    def _states_of_adam(self) -> list[AdamState]:
        """The state of each group, new if there is none; empty unless it is a fused Adam on one CPU or CUDA device."""
        groups, state, kind = self.optimizer.param_groups, self.optimizer.state, type(self.optimizer)
        parameters = [parameter for group in groups for parameter in group["params"]]
        alike = len({(one.device, one.dtype) for one in parameters}) == 1  # torch updates each kind by itself
        on_device = alike and parameters[0].device.type in ("cpu", "cuda")
        is_new = not state and all(one.grad is not None for one in parameters)
        if kind not in FUSED_UPDATES or not on_device or not (is_new or all(one in state for one in parameters)):
            return []
        decoupled = kind is torch.optim.AdamW  # Adam(decoupled_weight_decay=True) is AdamW
        for group in groups:
            if not group["fused"] or group["amsgrad"] or group.get("decoupled_weight_decay", decoupled) != decoupled:
                return []
        for parameter in parameters if is_new else ():  # as torch's first step does, which imports torch's compiler
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state[parameter] = {"step": step} | {name: torch.zeros_like(parameter) for name in AdamState._fields[2:]}
        self.optimizer._opt_called = True  # else torch's schedulers warn that `step` was not called
        states = []
        for group in groups:
            kept = [state[parameter] for parameter in group["params"]]
            steps = torch.stack([values["step"] for values in kept])
            for values, step in zip(kept, steps.unbind(), strict=True):
                values["step"] = step
            states.append(AdamState(steps, *([values[name] for values in kept] for name in AdamState._fields[1:])))
        return states

    def _step_of_adam(self) -> bool:
        """Update with the cached tensors; False if torch's own step must do it."""
        if self.states is None:
            self.states = self._states_of_adam()
        if not self.states:
            return False
        groups, captured = self.optimizer.param_groups, self.accelerator.captured
        gradients = [parameter.grad for group in groups for parameter in group["params"]]
        repeated = captured is not None and captured.keeps_gradients and self._is_repeated(gradients)
        if repeated and self.replay is None:
            self.replay, _ = RECORDERS[gradients[0].device.type](partial(self._update, gradients), 0)
        if repeated and self.replay is not None:
            self.replay()
            return True
        self.replay = None
        if any(gradient is None for gradient in gradients):
            return False
        self._update(gradients)
        return True

    def _is_repeated(self, gradients: list[Tensor | None]) -> bool:
        """Whether gradient tensors and settings are those of the last step."""
        settings = [group[name] for group in self.optimizer.param_groups for name in SETTINGS]
        last, self.last = self.last, (gradients, settings)
        return last is not None and settings == last[1] and all(map(is_, gradients, last[0]))

    @torch.no_grad()
    def _update(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        update, remaining = FUSED_UPDATES[type(self.optimizer)], iter(gradients)
        for group, state in zip(self.optimizer.param_groups, self.states or [], strict=True):
            state.steps.add_(1)
            parameters, (beta1, beta2) = group["params"], group["betas"]
            tensors = parameters, list(islice(remaining, len(parameters))), state.exp_avg, state.exp_avg_sq
            settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            update(*tensors, [], state.step, beta1=beta1, beta2=beta2, **settings)
        return []
