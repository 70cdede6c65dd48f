"""Losses, optimizers, schedules and gradient accumulation."""

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from mnist.models.by_name import build_model
from mnist.training.checkpoint import flatten, unflatten
from mnist.training.lean import LeanAccelerator, LeanOptimizer
from mnist.training.losses import LOSSES, smoothed
from mnist.training.optimizers import OPTIMIZERS, build_optimizer, build_schedule
from tests.conftest import RunHere, reset_accelerate


def test_the_losses_are_cross_entropy_and_mean_squared_error_of_the_probabilities() -> None:
    logits, y = torch.randn(20, 10), torch.randint(10, (20,))
    output, mean = logits.log_softmax(dim=1), torch.full((20,), 1 / 20)
    torch.testing.assert_close(LOSSES["nll"](output, y, mean), F.cross_entropy(logits, y))
    one_hot = F.one_hot(y, 10).float()
    torch.testing.assert_close(LOSSES["mse"](output, y, mean), F.mse_loss(logits.softmax(dim=1), one_hot))


def test_label_smoothing_is_torchs() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(9, 5), torch.randint(0, 5, (9,))
    loss = smoothed(LOSSES["nll"], 0.1)(logits.log_softmax(dim=1), y, torch.full((9,), 1 / 9))
    torch.testing.assert_close(loss, F.cross_entropy(logits, y, label_smoothing=0.1))
    for name in ("nll", "mse"):
        assert smoothed(LOSSES[name], 0.0) is LOSSES[name]


@pytest.mark.parametrize("name", LOSSES)
def test_an_image_of_weight_zero_changes_neither_loss_nor_gradient(name: str) -> None:
    logits, y = torch.randn(4, 10, dtype=torch.float64), torch.randint(10, (4,))

    def loss_and_gradient(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        leaf = rows.clone().requires_grad_()
        loss = LOSSES[name](leaf.log_softmax(dim=1), y[: len(rows)], weight)
        loss.backward()
        assert leaf.grad is not None
        return loss, leaf.grad

    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    alone = loss_and_gradient(logits[:3], third)
    padded = loss_and_gradient(logits, torch.cat([third, torch.zeros(1, dtype=torch.float64)]))
    torch.testing.assert_close(padded[0], alone[0])
    torch.testing.assert_close(padded[1][:3], alone[1])
    assert not padded[1][3].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name: str) -> None:
    torch.manual_seed(0)
    model, X, y = nn.Linear(5, 2), torch.randn(64, 5), torch.randint(2, (64,))
    optimizer = build_optimizer(name, model.parameters(), 0.01, 0.001)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def learning_rates(name: str, warmup_steps: int, total_steps: int) -> list[float]:
    """The learning rate at each optimizer step, with a peak of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_schedule(name, optimizer, warmup_steps, total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_follow_their_formulas() -> None:
    assert learning_rates("constant", 0, 5) == [1.0] * 5
    assert learning_rates("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 10) for step in range(10)]
    assert learning_rates("cosine", 0, 10) == pytest.approx(cosine)
    one_cycle = learning_rates("one-cycle", 0, 100)
    assert one_cycle[0] == pytest.approx(1 / 25)
    assert max(one_cycle) == one_cycle[30] == 1.0
    assert one_cycle[-1] < 1e-3


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "one-cycle"])
def test_warmup_reaches_the_peak_at_the_requested_step(name: str) -> None:
    rates = learning_rates(name, 4, 20)
    assert rates[:5] == sorted(rates[:5])
    assert 0 < rates[0] < rates[3] < rates[4] == 1.0
    assert all(later <= rates[4] for later in rates[5:])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("images", [100, 120, 127])
def test_five_accumulated_batches_of_10_equal_one_of_50_in_every_window(
    images: int, optimizer: str, run_here: RunHere
) -> None:
    torch.set_default_dtype(torch.float64)
    settings = {"limit_train_images": images, "optimizer": optimizer, "epochs": 2, "learning_rate": 0.01}
    accumulated = run_here("accumulated", batch_size=10, gradient_accumulation_steps=5, **settings)
    whole = run_here("whole", batch_size=50, **settings)
    weights = [load_file(run / "model" / "model.safetensors") for run in (accumulated, whole)]
    for name, value in weights[0].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-12)


OTHERS: dict[str, Callable[..., torch.optim.Optimizer]] = {  # variants without a shortcut
    "amsgrad": functools.partial(torch.optim.Adam, fused=True, amsgrad=True),
    "not fused": functools.partial(torch.optim.AdamW, foreach=False),
}
if "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters:  # not in torch 2.6
    OTHERS["decoupled"] = functools.partial(torch.optim.Adam, fused=True, decoupled_weight_decay=True)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OTHERS, "another torch"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_lean_accelerator_is_bit_identical_to_accelerates(
    name: str, frozen: bool, fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "another torch":  # without the private functions
        name = "adam"
        monkeypatch.setattr("mnist.training.lean.FUSED_UPDATES", {})
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))]
    models[0][0].bias.requires_grad_(not frozen)
    models.append(copy.deepcopy(models[0]))
    batches = [(torch.randn(8, 5), torch.randint(2, (8,))) for _ in range(14)]
    for window in (3, 1):
        states = []
        for model, lean in zip(models, (True, False), strict=True):
            reset_accelerate()
            accelerator = (LeanAccelerator if lean else Accelerator)(cpu=True, gradient_accumulation_steps=window)
            torch_optimizer = (OPTIMIZERS | OTHERS)[name](model.parameters(), lr=0.01, weight_decay=0.001)
            scheduler = build_schedule("cosine", torch_optimizer, 2, 14)
            optimizer = accelerator.prepare(torch_optimizer)
            assert isinstance(optimizer, LeanOptimizer) is lean
            for number, (X, y) in enumerate(batches):
                if number == 9:  # as if resumed
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                optimizer.zero_grad()
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(X), y))
                    optimizer.step()
                    if accelerator.sync_gradients:
                        scheduler.step()
            states.append(optimizer.state_dict()["state"])
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_on_a_gpu_too_a_fused_adam_is_bit_identical_to_torchs(name: str, fresh_accelerate: None) -> None:
    accelerator = LeanAccelerator()
    models = [accelerator.prepare(build_model("cnn", 10))]
    models.append(copy.deepcopy(models[0]))
    theirs, ours = (build_optimizer(name, model.parameters(), 0.01, 0.001) for model in models)
    ours = accelerator.prepare(ours)
    for number in range(50):
        if number == 25:  # as if resumed
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn_like(parameters[0])
            for parameter in parameters:
                parameter.grad = gradient.clone()
        theirs.step()
        ours.step()
        assert bool(ours.states)  # the shortcut was taken
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(ours.state_dict()["state"], theirs.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("skipped", [(), (0, 3)])
def test_fp16_skips_the_updates_of_overflows_counts_them_and_moves_the_schedule(
    name: str, skipped: tuple[int, ...], fresh_accelerate: None, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    models = [nn.Linear(5, 3)]
    models.append(copy.deepcopy(models[0]))
    accelerator = LeanAccelerator(cpu=True)
    optimizers = [build_optimizer(name, model.parameters(), 0.1) for model in models]
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # that of fp16, which a CPU lacks
    optimizer, schedule = accelerator.prepare(optimizers[0], build_schedule("linear", optimizers[0], 0, 8))
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            X = torch.randn(4, 5)
            optimizer.zero_grad()
            accelerator.backward(models[0](X).square().sum() * (math.inf if step in skipped else 1.0))
            optimizer.step()
            schedule.step()
            if step not in skipped:
                optimizers[1].zero_grad()
                models[1](X).square().sum().backward()
                optimizers[1].step()
            optimizers[1].param_groups[0]["lr"] = optimizers[0].param_groups[0]["lr"]
            assert schedule.get_last_lr() == [pytest.approx(0.1 * (1 - (step + 1) / 8))]
    assert int(optimizer.skipped.count) == len(skipped)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_a_larger_gradient_is_clipped_to_max_grad_norm(run_here: RunHere) -> None:
    settings = {"optimizer": "sgd", "learning_rate": 1.0, "max_steps": 1, "batch_size": 200}
    once, twice, free = (
        load_file(run_here(name, max_grad_norm=limit, **settings) / "model" / "model.safetensors")
        for name, limit in (("once", 0.01), ("twice", 0.02), ("free", None))
    )

    def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(one[name] - other[name]).flatten() for name in one]).norm())

    assert distance(once, twice) == pytest.approx(
        0.01, rel=1e-3
    )  # with SGD at learning rate 1, the step is the gradient
    assert distance(once, free) > 0.02


def test_torchs_schedulers_do_not_warn_about_the_order_of_steps(fresh_accelerate: None) -> None:
    net = torch.nn.Linear(2, 1)
    adam = torch.optim.Adam(net.parameters(), fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 10)
    optimizer, scheduler = LeanAccelerator(cpu=True).prepare(adam, scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            net(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_loaded_state_has_the_memory_layout_of_its_parameters(name: str, fresh_accelerate: None) -> None:
    accelerator = LeanAccelerator(cpu=True)
    net = build_model("resnet18", 10).to(memory_format=torch.channels_last)
    optimizer = accelerator.prepare(build_optimizer(name, net.parameters(), 1e-3))
    net(torch.rand(2, 1, 28, 28)).sum().backward()
    optimizer.step()
    tensors, rest = flatten(optimizer.state_dict())
    optimizer.load_state_dict(unflatten(tensors, rest))
    for parameter, values in optimizer.optimizer.state.items():
        for value in values.values():
            if value is not None and value.shape == parameter.shape:
                assert value.stride() == parameter.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_on_a_gpu_lower_precision_has_weights_channels_last(precision: str, fresh_accelerate: None) -> None:
    net = LeanAccelerator(mixed_precision=precision).prepare(build_model("resnet18", 10))
    assert net.net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) == (precision != "no")
