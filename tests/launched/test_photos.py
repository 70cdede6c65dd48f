"""--recipe photos: pretrained weights, exact in several processes and after a kill, better than the plain command."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mnist.config.recipes import RECIPES
from mnist.config.settings import PROJECT_FOLDER
from mnist.errors import UserError
from mnist.launch.processes import enough_memory
from mnist.verify import largest_difference
from tests.conftest import Launch, MainHere, ResumeHere, RunHere, metrics_of
from tests.launched.test_processes import TORCHRUN
from tests.launched.test_resume import kill_and_resume
from tests.support.shapes import make_shapes

Capture = pytest.CaptureFixture[str]
NO_NETWORK = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
ALL_AT_ONCE = ("--augment=strong", "--loss=nll-balanced", "--fit=pad")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 classes of 4 to 15 images."""
    return make_shapes(tmp_path_factory.mktemp("own") / "shapes", sizes=lambda place: 4 + place)


@pytest.fixture(scope="module")
def convnext_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TORCH_HOME with made-up weights where torchvision keeps the pretrained ones."""
    from torchvision.models import convnext_tiny

    folder = tmp_path_factory.mktemp("torch")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(5)
    torch.save(convnext_tiny().state_dict(), folder / "hub" / "checkpoints" / "convnext_tiny-983f1562.pth")
    return folder


def test_training_starts_from_the_weights_and_keeps_their_license_with_the_model(
    shapes: Path,
    convnext_weights: Path,
    tmp_path: Path,
    run_here: RunHere,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(convnext_weights))
    recipe = {name: getattr(RECIPES["photos"], name) for name in ("model", "pretrained", "augment", "mixed_precision")}
    places = {"dataset": str(shapes), "data_dir": str(tmp_path), "image_size": 32}
    run = run_here("x", recipe="photos", **recipe, **places, epochs=None, max_steps=1, learning_rate=1e-9)
    before = torch.load(next(convnext_weights.rglob("*.pth")))
    for name, value in load_file(run / "model" / "model.safetensors").items():
        if name.startswith("net.features"):
            torch.testing.assert_close(value, before[name.removeprefix("net.")], atol=1e-6, rtol=0)
    license = "ConvNeXt_Tiny_Weights.IMAGENET1K_V1 of torchvision; license: none of its own (torchvision: BSD-3-Clause)"
    assert f"  weights     {license}" in capsys.readouterr().out
    assert json.loads((run / "model" / "config.json").read_text())["pretrained_weights"].startswith(license)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_without_weights_nothing_is_decoded_and_the_error_names_file_and_ways_out(
    processes: int, shapes: Path, tmp_path: Path, launch: Launch, main_here: MainHere
) -> None:
    folder = tmp_path / "torch"
    flags = ("--recipe=photos", f"--dataset={shapes}", f"--data-dir={tmp_path}", f"--output-dir={tmp_path / 'runs'}")
    start = main_here if processes == 1 else partial(launch, command=(*TORCHRUN[1:], str(processes), "train.py"))
    done = start(*flags, TORCH_HOME=str(folder), **NO_NETWORK)
    assert done.returncode == (2 if processes == 1 else 1)  # torchrun's own
    assert done.stderr.count("--pretrained: the weights of convnext_tiny are not available") >= 1
    assert str(folder / "hub" / "checkpoints" / "convnext_tiny-983f1562.pth") in done.stderr
    assert "To train without pretrained weights: --pretrained none" in done.stderr
    assert "Traceback (most recent call last)" not in done.stderr or processes > 1  # torchrun shows its own
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ((), "--image-size 224: for a folder of images only, not for mnist. Name a folder: --dataset FOLDER"),
        (("--dataset=./missing/pets",), "missing/pets: no such folder."),
    ],
)
def test_a_missing_folder_is_an_error_before_weights_are_fetched(
    flags: tuple[str, ...], error: str, main_here: MainHere, tmp_path: Path
) -> None:
    done = main_here("--recipe=photos", f"--output-dir={tmp_path}", *flags, TORCH_HOME=str(tmp_path), **NO_NETWORK)
    assert done.returncode == 2
    assert error in done.stderr


@pytest.mark.parametrize("recipe", ["tutorial", "photos-scratch"])
def test_the_header_names_the_recipe_for_photographs(
    recipe: str, shapes: Path, tmp_path: Path, run_here: RunHere, capsys: Capture
) -> None:
    run_here("x", recipe=recipe, model="cnn", dataset=str(shapes), data_dir=str(tmp_path), image_size=32, max_steps=1)
    note = "for photographs: --recipe photos, a pretrained network at 224 x 224"
    assert (note in capsys.readouterr().out) == (recipe == "tutorial")


def test_an_open_number_of_epochs_is_shown_up_to_the_last_step_also_after_a_resume(
    shapes: Path, tmp_path: Path, run_here: RunHere, resume_here: ResumeHere, capsys: Capture
) -> None:
    settings: dict[str, Any] = {"dataset": str(shapes), "data_dir": str(tmp_path), "image_size": 16, "batch_size": 60}
    run = run_here("x", **settings, epochs=None, report=True, max_steps=3)
    printed = capsys.readouterr().out
    assert "steps       3 (2 per epoch)" in printed
    assert "epoch 2/2 " in printed
    assert "2 of 2" in (run / "report.html").read_text()
    resume_here(run, max_steps=5)
    assert metrics_of(run)[-1]["step"] == 5
    assert "epoch 3/3 " in capsys.readouterr().out


def test_full_memory_is_an_error_that_names_smaller_batches_with_the_same_gradients() -> None:
    advice = "Out of memory: CUDA out of memory.\\n.*divide --batch-size .* multiply --gradient-accumulation-steps"
    with pytest.raises(UserError, match=advice), enough_memory():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_with_strong_augmentation_a_balanced_loss_and_padding_resumes_identically(
    shapes: Path, tmp_path: Path, processes: int
) -> None:
    flags = ("--model=cnn-deep", "--validation-size=10", "--checkpoint-every=2", "--image-size=32", "--epochs=6")
    places = (f"--dataset={shapes}", f"--data-dir={tmp_path}")
    kill_and_resume(processes, 1, tmp_path, *places, *ALL_AT_ONCE, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cnn-deep", "convnext_tiny"])
def test_two_processes_equal_one_with_strong_augmentation_a_balanced_loss_and_padding(
    model: str, shapes: Path, convnext_weights: Path, tmp_path: Path, launch: Launch
) -> None:
    flags = ("--recipe=photos", f"--model={model}", "--image-size=32", "--global-batch-size=30", "--max-steps=4")
    places = (f"--dataset={shapes}", f"--data-dir={tmp_path}", "--trackers=none", f"--output-dir={tmp_path / 'runs'}")
    weights = () if model == "convnext_tiny" else ("--pretrained=none",)
    for processes in (1, 2):
        command = (*TORCHRUN[1:], str(processes), "--module", "mnist.runs.launched", "train.py")  # in float64
        name = f"--run-name={processes}"
        done = launch(*flags, *ALL_AT_ONCE, *places, *weights, name, command=command, TORCH_HOME=str(convnext_weights))
        assert done.returncode == 0, done.stderr
    assert largest_difference(tmp_path / "runs" / "1", tmp_path / "runs" / "2") < 1e-10


@pytest.mark.slow
def test_the_recipe_beats_the_plain_command_on_unequal_classes_of_shapes(tmp_path: Path) -> None:
    """40 to 600 images per class; docs/your-data.md has the figures."""
    folder = make_shapes(tmp_path / "shapes")
    places = (f"--dataset={folder}", f"--data-dir={tmp_path}", "--trackers=none", f"--output-dir={tmp_path / 'runs'}")
    plain = "--model cnn --batch-size 64 --epochs 10 --learning-rate 2e-3 --schedule one-cycle --augment"
    accuracy: dict[str, float] = {}
    for name, flags in {"plain": plain, "photos": "--recipe photos --pretrained none --image-size 64"}.items():
        command = [sys.executable, "train.py", *flags.split(), *places, f"--run-name={name}"]
        subprocess.run(command, cwd=PROJECT_FOLDER, check=True)
        accuracy[name] = metrics_of(tmp_path / "runs" / name)[-1]["test/accuracy"]
    assert accuracy["photos"] > accuracy["plain"] + 0.05, accuracy
