"""--compile: one graph of forward and backward pass trains like uncompiled code, or refuses with a reason."""

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mnist.config.settings import CHOICES
from mnist.errors import ConfigError
from mnist.models.by_name import build_model
from mnist.models.networks import Net
from mnist.training.capture import compiler_error, loss_and_gradients, refusal
from mnist.training.inductor import COMPILED, trace
from mnist.training.lean import LeanAccelerator
from mnist.training.losses import LOSSES
from mnist.verify import largest_difference
from tests.conftest import Launch, ResumeHere, RunHere, metrics_of
from tests.launched.test_processes import TOLERANCE
from tests.launched.test_resume import kill_and_resume
from tests.training.test_checkpoint import end_of

COMPILER = f"compiler    {COMPILED}"
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler, g++ or the one that CXX names"
)
HUNDRED_STEPS = {"limit_train_images": 1000, "log_every": 10}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for Inductor's code, compiled without its test whether g++ supports the CPU's vectors (7 s)."""
    import torch._inductor.config

    with pytest.MonkeyPatch.context() as monkeypatch, torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def is_compiled(folder: Path) -> bool:
    """Whether the run did not fall back to uncompiled code, which gives the right weights too."""
    return bool(json.loads((folder / "environment.json").read_text())["compiler"] == COMPILED)


def compare(run_here: RunHere, tolerance: float, name: str = "run", **settings: Any) -> None:
    """Train with and without --compile, and compare the weights and what was logged."""
    names = (f"{name}-plain", f"{name}-compiled")
    plain, compiled = (run_here(it, compile=it == names[1], **(HUNDRED_STEPS | settings)) for it in names)
    assert (is_compiled(plain), is_compiled(compiled)) == (False, True)
    folder = plain.parent.parent
    assert largest_difference(folder / "runs" / names[0], folder / "runs" / names[1]) < tolerance
    exact = tolerance == TOLERANCE["float64"]
    for there, here in zip(metrics_of(plain), metrics_of(compiled), strict=True):
        assert there.keys() == here.keys()
        for key in (key for key in there if not key.startswith("perf/")):
            if exact or "accuracy" not in key:  # in float32 a prediction near a tie may change
                assert here[key] == pytest.approx(there[key], rel=1e-6 if exact else 1e-2, abs=1e-6), key


@NEEDS_COMPILER
@pytest.mark.slow
def test_a_hundred_compiled_steps_give_the_same_weights(run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    compare(run_here, TOLERANCE["float32"])
    assert COMPILER in capsys.readouterr().out


@NEEDS_COMPILER
@pytest.mark.slow
def test_accumulated_and_clipped_compiled_gradients_give_the_same_weights(run_here: RunHere) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "schedule": "cosine"}
    compare(run_here, TOLERANCE["float32"], epochs=3, **settings)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
def test_every_optimizer_works_with_compiled_gradients(optimizer: str, run_here: RunHere) -> None:
    compare(run_here, TOLERANCE["float32"], optimizer=optimizer, weight_decay=0.01, loss="mse")


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "dtype"), [("mlp", "float64"), ("cnn", "float32"), ("cnn", "float64"), ("cnn-quick", "float64")]
)
def test_compiled_networks_give_the_same_weights(model: str, dtype: str, run_here: RunHere) -> None:
    torch.set_default_dtype(getattr(torch, dtype))
    compare(run_here, 1e-3 if model == "cnn" and dtype == "float32" else TOLERANCE[dtype], model=model, augment="light")


@NEEDS_COMPILER
@pytest.mark.slow
def test_bf16_learns_the_same_when_compiled(run_here: RunHere) -> None:
    settings: dict[str, Any] = {"limit_train_images": 6000, "mixed_precision": "bf16"}
    own: dict[str, dict[str, Any]] = {"compiled": {"compile": True}, "plain": {}, "exact": {"mixed_precision": "no"}}
    folders = [run_here(name, **(settings | it)) for name, it in own.items()]
    assert [is_compiled(it) for it in folders] == [True, False, False]
    compiled, plain, exact = (metrics_of(it)[-1] for it in folders)
    for key in ("train/loss", "test/loss"):
        assert compiled[key] == pytest.approx(plain[key], rel=0.05)
        assert compiled[key] != pytest.approx(exact[key], rel=1e-4)  # bf16 was used


@NEEDS_COMPILER
@pytest.mark.slow
def test_two_compiled_processes_train_like_one_uncompiled(launch: Launch, tmp_path: Path) -> None:
    small = ("--limit-train-images=1007", "--limit-test-images=100", "--epochs=2", "--trackers=none")
    settings = (
        *small,
        "--global-batch-size=20",
        "--gradient-accumulation-steps=2",
        f"--output-dir={tmp_path / 'runs'}",
    )
    for count, flag in ((1, ()), (2, ("--compile",))):
        command = ("-m", "torch.distributed.run", f"--nproc-per-node={count}", "train.py")
        done = launch(*settings, f"--run-name={count}", *flag, command=command)
        assert done.returncode == 0, done.stderr
        assert (COMPILER in done.stdout) == bool(flag)
    assert largest_difference(tmp_path / "runs" / "1", tmp_path / "runs" / "2") < TOLERANCE["float32"]


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_and_resumed_compiled_run_ends_bit_identical(processes: int, tmp_path: Path) -> None:
    kill_and_resume(processes, 2, tmp_path, "--compile", "--model=cnn", "--augment")
    assert all(is_compiled(tmp_path / "runs" / name) for name in ("whole", "killed"))


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_compiled_run_resumes_uncompiled_with_a_note(
    run_here: RunHere, resume_here: ResumeHere, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_here("both", compile=True)
    resume_here(folder, compile=False, epochs=2)
    assert f"no longer bit-identical: compiler was {COMPILED}, is no" in capsys.readouterr().out
    assert metrics_of(folder)[-1]["epoch"] == 2


@pytest.mark.slow
def test_without_a_compiler_the_run_is_uncompiled_and_shows_the_reason(launch: Launch, tmp_path: Path) -> None:
    small = ("--limit-train-images=1000", "--limit-test-images=100", "--trackers=none", f"--output-dir={tmp_path}")
    assert launch(*small, "--run-name=plain", command=("train.py",)).returncode == 0
    nothing = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    done = launch(*small, "--run-name=asked", "--compile", command=("train.py",), **nothing)
    assert done.returncode == 0, done.stderr
    assert "compiler    none, no graph can be made: no C++ compiler found (CXX, g++)" in done.stdout
    assert "Traceback" not in done.stderr
    assert end_of(tmp_path / "asked") == end_of(tmp_path / "plain")


def test_without_inductor_the_run_is_uncompiled(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_here("plain")
    monkeypatch.delattr("torch._inductor.compile")  # private, so it may go
    asked = run_here("asked", compile=True)
    assert json.loads((asked / "environment.json").read_text())["not_compiled"].startswith("AttributeError: ")
    assert end_of(asked) == end_of(plain)


def test_a_compilers_error_is_reduced_to_the_line_with_the_cause() -> None:
    output = (
        "C++ compile error\n\nCommand:\ng++ main.cpp\n\nOutput:\nmain.cpp:3:10: fatal error: Python.h: No such file"
    )
    assert compiler_error(RuntimeError(output)) == "RuntimeError: main.cpp:3:10: fatal error: Python.h: No such file"
    assert compiler_error(RuntimeError("no triton\nsee there")) == "RuntimeError: no triton"
    assert compiler_error(RuntimeError()) == "RuntimeError: "


class WithDropout(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


class WithBranch(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.mean() > 0.5 else 1 - x)


def test_models_that_would_train_differently_when_compiled_are_refused(
    run_here: RunHere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--compile: does not support BatchNorm"):
        run_here("resnet", model="resnet18", compile=True)
    channels_last = build_model("cnn", 10).to(memory_format=torch.channels_last)
    assert refusal(channels_last, LeanAccelerator(cpu=True)).startswith("does not support non-contiguous parameters")
    batch = torch.rand(2, 1, 28, 28), torch.zeros(2, dtype=torch.long), torch.ones(2)
    for net, message in (
        (WithDropout(), "does not support random numbers in the"),
        (WithBranch(), "the network or the"),
    ):
        with pytest.raises(ConfigError, match=f"--compile: {message}"):
            trace(partial(loss_and_gradients, net, LOSSES["nll"], 1), net, batch)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")  # like accelerate launch --dynamo_backend=inductor
    with pytest.raises(ConfigError, match=r"--compile: the launcher already compiles the model \(dynamo_backend\)"):
        run_here("twice", compile=True)
    assert not list(tmp_path.rglob("state.json"))
