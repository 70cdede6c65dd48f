"""On a GPU: results are exact and repeatable, a run resumes to the bit, and fp16 counts what it skips."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mnist.config.settings import PROJECT_FOLDER
from mnist.launch.hardware import choose_kernels, uses_tf32
from mnist.training.checkpoint import Checkpoints
from tests.conftest import ResumeHere, RunHere, metrics_of, user_environment
from tests.training.test_checkpoint import checkpoints_of, end_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def error_of(layer: nn.Module, X: torch.Tensor) -> float:
    """The largest error of a layer in float32 on the GPU, relative to the largest output in float64 on the CPU."""
    exact = layer.double().cpu()(X)
    return float((layer.float().to(CUDA)(X.float().to(CUDA)).cpu() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(64, 64, 3, bias=False), (64, 64, 14, 14)), (nn.Linear(1024, 1024), (256, 1024))]
)
def test_float32_has_the_error_of_float32(layer: nn.Module, shape: tuple[int, ...]) -> None:
    choose_kernels()
    torch.manual_seed(0)
    assert not uses_tf32(CUDA)
    with torch.no_grad():
        assert error_of(layer, torch.randn(shape, dtype=torch.float64)) < 1e-5  # TF32: about 5e-4


@pytest.mark.parametrize("model", ["mlp", "cnn", "cnn-quick", "cnn-deep"])
def test_the_same_seed_gives_the_same_bits(model: str, run_here: RunHere) -> None:
    settings: dict[str, Any] = {"model": model, "batch_size": 50, "limit_train_images": 2000, "augment": "light"}
    assert end_of(run_here("first", **settings)) == end_of(run_here("second", **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "cnn", "optimizer": "sgd", "gradient_accumulation_steps": 3},
        {"model": "cnn-deep", "optimizer": "radam", "schedule": "cosine", "mixed_precision": "bf16"},
        {"model": "cnn", "optimizer": "adamw", "max_grad_norm": 1.0, "mixed_precision": "fp16"},
        {"model": "mobilenet_v3_small", "batch_size": 20},  # BatchNorm and dropout
    ],
)
def test_a_resumed_run_ends_bit_identical(
    settings: dict[str, Any], run_here: RunHere, resume_here: ResumeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "KEPT", 100)
    whole = run_here("whole", epochs=2, limit_train_images=207, checkpoint_every=4, log_every=3, **settings)
    folder = whole.with_name("cut")
    shutil.copytree(whole, folder)
    for path in checkpoints_of(folder)[2:]:  # as if killed before they were written
        shutil.rmtree(path)
    resume_here(folder)
    assert end_of(folder) == end_of(whole)


def test_images_on_the_gpu_and_in_pinned_memory_give_the_same_bits(
    run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"model": "cnn", "augment": "light", "limit_train_images": 5000, "batch_size": 50}
    on_gpu = run_here("on-gpu", **settings)
    monkeypatch.setattr("mnist.data.loader.device_memory", lambda device: (0, 0))
    assert end_of(run_here("pinned", **settings)) == end_of(on_gpu)


def test_fp16_counts_the_steps_that_an_overflow_skips(run_here: RunHere) -> None:
    lines = metrics_of(run_here("x", mixed_precision="fp16", learning_rate=1e-4, log_every=5))
    counts = [line["optim/skipped_steps"] for line in lines if "optim/skipped_steps" in line]
    assert counts == sorted(counts)
    assert len(counts) == 4


def test_training_on_the_cpu_leaves_the_gpu_alone(tmp_path: Path) -> None:
    flags = ["--max-steps=5", "--limit-train-images=100", "--limit-test-images=50", "--trackers=none"]
    script = f"import sys, torch, train; sys.argv = {['train.py', *flags, f'--output-dir={tmp_path}']}; train.main()"
    script += "; print('used' if torch.cuda.is_initialized() else 'unused')"
    environment = user_environment(tmp_path, ACCELERATE_USE_CPU="true")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, env=environment, capture_output=True, text=True, check=True)
    assert "device      cpu (" in done.stdout
    assert done.stdout.endswith("unused\n")


def test_the_header_and_environment_json_name_the_gpu(tmp_path: Path) -> None:
    flags = ("--limit-train-images=100", "--limit-test-images=50", "--epochs=1", "--trackers=none", "--run-name=x")
    command = [sys.executable, "train.py", *flags, f"--output-dir={tmp_path}"]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=True)
    environment = json.loads((tmp_path / "x" / "environment.json").read_text())
    assert environment["precision"] == "float32"
    assert environment["cudnn"] == torch.backends.cudnn.version()
    assert (
        f"device      {environment['device']}, {torch.cuda.device_count()} visible, compute capability"
        f" {environment['capability']}, CUDA {torch.version.cuda}, cuDNN {environment['cudnn']}\n"
    ) in done.stdout
