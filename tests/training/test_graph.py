"""--compile on a GPU: a CUDA graph of loss and gradients trains to the bit like uncompiled code.

`pytest -m gpu` runs all of these tests with CUDA graphs, otherwise a stand-in records them on the CPU.
"""

import json
import shutil
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist.models import networks
from mnist.models.by_name import build_model
from mnist.session import Session
from mnist.training.capture import capture_loss
from mnist.training.graph import RECORDED, RECORDERS
from mnist.training.lean import LeanAccelerator
from mnist.training.losses import LOSSES
from tests.conftest import Launch, ResumeHere, RunHere
from tests.support.recorder import record
from tests.training.test_checkpoint import checkpoints_of, end_of


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device to train on."""
    if request.param == "cpu":
        monkeypatch.setitem(RECORDERS, "cpu", record)
    else:
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # so uncompiled runs are bit-identical
    return str(request.param)


# a hundred steps per epoch; on the CPU few, of batches whose memory starts at multiples of 64 bytes, because the last
# digit of torch.dot depends on it
SIZES = {"cuda": {"limit_train_images": 1007}, "cpu": {"limit_train_images": 207, "batch_size": 16}}
CASES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "cnn": {"model": "cnn"},
    "cnn-quick": {"model": "cnn-quick"},
    "windows, the last one shorter": {"gradient_accumulation_steps": 4, "max_grad_norm": 0.5, "schedule": "cosine"},
    "a learning rate that stops changing": {"warmup_steps": 5},
    "clipping": {"max_grad_norm": 0.5, "optimizer": "sgd", "augment": "light"},
    "bf16": {"model": "cnn", "mixed_precision": "bf16"},
    "another loss": {"optimizer": "radam", "loss": "mse", "weight_decay": 0.01},
    "BatchNorm": {"model": "resnet18", "limit_train_images": 57, "limit_test_images": 10, "epochs": 1},
    "dropout": {"model": "squeezenet1_1", "limit_train_images": 57, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_bit_identical_to_an_uncompiled_one(
    case: str, device: str, run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"epochs": 2, "log_every": 3} | SIZES[device] | CASES[case]
    plain, recorded = (run_here(name, compile=name == "recorded", **settings) for name in ("plain", "recorded"))
    assert f"compiler    {RECORDED}" in capsys.readouterr().out
    assert json.loads((recorded / "environment.json").read_text())["compiler"] == RECORDED
    assert end_of(recorded) == end_of(plain)


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ({}, True),
        ({"model": "cnn-deep"}, True),
        ({"compile": False}, False),
        ({"model": "mobilenet_v3_small", "batch_size": 20}, False),
    ],
)
def test_without_a_flag_only_networks_of_this_project_are_recorded(
    settings: dict[str, Any], recorded: bool, device: str, run_here: RunHere
) -> None:
    environment = json.loads((run_here("x", epochs=1, **settings) / "environment.json").read_text())
    assert environment["compiler"] == (RECORDED if recorded else "no")
    assert environment["not_compiled"] == ""


class Random(networks.Net):
    """With BatchNorm and dropout."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(self.norm(x), 0.1, self.training))


class Waiting(Random):
    """Waits for the device in every step, which a graph cannot do."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output if output.mean() < 0 else -output


def test_from_a_checkpoint_in_mid_epoch_a_recorded_run_ends_bit_identical(
    device: str, run_here: RunHere, resume_here: ResumeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(networks.MODELS, "mlp", Random)
    settings: dict[str, Any] = {"checkpoint_every": 2, "gradient_accumulation_steps": 2, "epochs": 1} | SIZES[device]
    whole = run_here("whole", compile=True, **settings)
    for compiled in (True, False):  # it also continues to the bit without --compile
        folder = whole.with_name(f"cut-{compiled}")
        shutil.copytree(whole, folder)
        for path in checkpoints_of(folder)[1:]:
            shutil.rmtree(path)
        resume_here(folder, compile=compiled)
        assert end_of(folder) == end_of(whole)


def test_what_cannot_be_recorded_trains_uncompiled_and_shows_the_reason(
    device: str, run_here: RunHere, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(networks.MODELS, "mlp", Waiting)
    plain, asked = (run_here(name, compile=name == "asked") for name in ("plain", "asked"))
    reason = "called a synchronizing CUDA operation" if device == "cuda" else "not permitted while recording"
    assert f"compiler    none, no graph can be made: RuntimeError: {reason}" in capsys.readouterr().out
    assert end_of(asked) == end_of(plain)


class Sum(nn.Module):
    """Two parameters with the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(784, 10)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(x.flatten(1) @ (self.a + self.b), dim=1)


def test_each_recorded_gradient_has_memory_of_its_own(device: str, fresh_accelerate: None) -> None:
    accelerator = LeanAccelerator(cpu=device == "cpu")
    net = accelerator.prepare(Sum())
    X = torch.rand(4, 1, 28, 28, device=accelerator.device)
    captured, _ = capture_loss(net, LOSSES["nll"], accelerator, X)
    assert captured is not None
    captured(X, torch.arange(4, device=X.device), torch.ones(4, device=X.device))
    captured.backward()
    assert torch.equal(net.a.grad, net.b.grad)
    assert net.a.grad.data_ptr() != net.b.grad.data_ptr()  # or clipping would scale them twice


def test_an_update_is_replayed_only_while_gradients_and_settings_stay_the_same(
    device: str, fresh_accelerate: None
) -> None:
    accelerator = LeanAccelerator(cpu=device == "cpu")
    torch.manual_seed(0)
    nets = [networks.Net().to(device) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    wrapped, plain = (torch.optim.Adam(net.parameters(), fused=True) for net in nets)
    net, optimizer = accelerator.prepare(nets[0], wrapped)
    X, y = torch.rand(16, 1, 28, 28, device=device), torch.arange(16, device=device) % 10
    accelerator.captured, _ = capture_loss(net, LOSSES["nll"], accelerator, X.clone())
    assert accelerator.captured is not None
    replayed = []
    for step in range(20):
        for either in (optimizer, plain):
            either.zero_grad()
            either.param_groups[0]["lr"] = 0.001 if step < 6 else 0.002
        accelerator.backward(accelerator.captured(X, y, torch.full((16,), 1 / 16, device=device)))
        for ours, theirs in zip(net.parameters(), nets[1].parameters(), strict=True):
            if step == 12:
                ours.grad = ours.grad * 2  # other memory
            theirs.grad = ours.grad.clone()
        if step == 16:
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        plain.step()
        replayed.append(optimizer.replay is not None)
    assert [step for step in range(20) if not replayed[step]] == [0, 6, 12, 13, 16]
    for ours, theirs in zip(net.parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_two_recording_processes_train_to_the_bit_like_two_uncompiled_ones(launch: Launch, tmp_path: Any) -> None:
    torchrun = "-m", "torch.distributed.run", "--nproc-per-node=2", "tests/support/recorder.py"
    settings = (
        *("--limit-train-images=107", "--limit-test-images=100", "--epochs=2", "--trackers=none", "--log-every=3"),
        *("--model=mobilenet_v3_small", "--batch-size=16", "--gradient-accumulation-steps=2"),
    )
    for name, *flag in (("plain",), ("recorded", "--compile")):
        done = launch(*settings, f"--output-dir={tmp_path}", f"--run-name={name}", *flag, command=torchrun)
        assert done.returncode == 0, done.stderr
        assert (RECORDED in done.stdout) == bool(flag)
    assert end_of(tmp_path / "recorded") == end_of(tmp_path / "plain")


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["mlp", "cnn-quick", "resnet18"])
def test_recording_takes_less_than_a_second(model: str, fresh_accelerate: None) -> None:
    accelerator = LeanAccelerator()
    net = accelerator.prepare(build_model(model, 10))
    for _ in range(2):  # the first time loads libraries, as uncompiled training does
        started = time.perf_counter()
        captured, reason = capture_loss(net, LOSSES["nll"], accelerator, torch.rand(10, 1, 28, 28).cuda())
        torch.cuda.synchronize()
    assert captured is not None, reason
    assert time.perf_counter() - started < 1


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("resident", [True, False])
def test_no_step_between_two_logs_waits_for_the_gpu(
    compiled: bool, resident: bool, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, steps = Session.batches, 0

    def watched(self: Session, train_loader: Any) -> Any:
        nonlocal steps
        try:
            for batch in batches(self, train_loader):
                if steps == 3:
                    torch.cuda.set_sync_debug_mode("error")
                steps += 1
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Session, "batches", watched)
    if not resident:  # in GPU memory
        monkeypatch.setattr("mnist.data.loader.device_memory", lambda device: (0, 0))
    settings: dict[str, Any] = {"limit_train_images": 3007, "log_every": 1000, "augment": "light", "max_grad_norm": 1.0}
    run_here("run", compile=compiled, gradient_accumulation_steps=2, schedule="cosine", **settings)
    assert steps == 301
