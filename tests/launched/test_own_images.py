"""Training on a folder of images: in one process and in two, killed and resumed, evaluated."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mnist import load
from mnist.cli import main
from mnist.config.settings import PROJECT_FOLDER, DataOptions
from mnist.data.datasets import load_dataset
from mnist.data.splits import ImageData
from mnist.data.transforms import scale_pixels
from mnist.errors import ConfigError
from mnist.inference.predict import predict
from mnist.verify import largest_difference
from tests.conftest import Launch, ResumeHere, RunHere, hear_ctrl_c, metrics_of
from tests.inference.test_predict import assert_figures
from tests.launched.test_processes import TORCHRUN
from tests.launched.test_resume import kill_and_resume
from tests.support.photographs import KINDS, fill_folder, take_photograph
from tests.training.test_checkpoint import checkpoints_of, end_of

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
RECIPE = ("--epochs=8", "--global-batch-size=32", "--learning-rate=2e-3", "--schedule=one-cycle", "--trackers=none")


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 color images per class, of mixed sizes, and a few invalid files."""
    return fill_folder(tmp_path_factory.mktemp("own") / "things", 200)


def train(things: Path, folder: Path, *flags: str, processes: int = 1) -> Path:
    """A run on the things, in `folder`, with its data in there too."""
    command = (sys.executable,) if processes == 1 else (*TORCHRUN, str(processes))
    places = (f"--dataset={things}", f"--data-dir={folder / 'data'}", f"--output-dir={folder}", "--run-name=x")
    command = (*command, "train.py", *RECIPE, *places, *flags)
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Decoding 602 images of things at 64 x 64 in color") == 1
    assert "data        things at 64 x 64 in color, 480 training and 120 test images" in done.stdout
    assert "ball 200, box 200, tent 200" in done.stdout
    return folder / "x"


def check_answers(run: Path, folder: Path) -> None:
    """`mnist predict` names the classes of new images."""
    rng, folder = np.random.default_rng(99), folder / "later"
    folder.mkdir()
    for number in range(30):
        take_photograph(KINDS[number % 3], rng).save(folder / f"{number:02}.png")
    command = [sys.executable, "-m", "mnist", "predict", str(folder), "--json", "--model", str(run)]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=True)
    answers = [row["label"] for row in json.loads(done.stdout)]
    assert sum(answer == KINDS[number % 3] for number, answer in enumerate(answers)) >= 25, answers
    with Image.open(folder / "00.png") as picture:
        network_input = load(run).predict(picture).network_input
    assert network_input.shape == (64, 64, 3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_model_is_trained_on_a_folder_and_names_its_classes(things: Path, tmp_path: Path, processes: int) -> None:
    run = train(things, tmp_path, "--model=cnn", "--augment", processes=processes)
    assert metrics_of(run)[-1]["test/accuracy"] > 0.9
    assert [line.split(" (")[0] for line in (run / "skipped.txt").read_text().splitlines()] == [
        "ball/666.jpg: an empty file",
        "ball/Thumbs.db: system file",
        "box/11702.jpg: the image is broken or cut off",
        "box/Thumbs.db: system file",
        "tent/Thumbs.db: system file",
    ]
    assert json.loads((run / "model" / "config.json").read_text())["class_names"] == list(KINDS)
    page = (run / "report.html").read_text()
    assert all(f">{kind}<" in page for kind in KINDS)
    check_answers(run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_torchvision_model_is_trained_on_a_folder(things: Path, tmp_path: Path, processes: int) -> None:
    run = train(things, tmp_path, "--model=resnet18", "--augment", processes=processes)
    assert metrics_of(run)[-1]["test/accuracy"] > 0.9
    check_answers(run, tmp_path)
    assert main(["export", "--model", str(run)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_on_a_folder_with_augmentation_resumes_identically(
    things: Path, tmp_path: Path, processes: int
) -> None:
    flags = ("--augment", "--model=cnn", "--limit-train-images=307", "--validation-size=50", "--checkpoint-every=5")
    kill_and_resume(processes, 1, tmp_path, f"--dataset={things}", f"--data-dir={tmp_path}", *flags)


def test_a_run_from_the_cache_is_identical_and_can_be_evaluated(
    things: Path, tmp_path: Path, run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"dataset": str(things), "data_dir": str(tmp_path / "data"), "model": "cnn"}
    settings |= {"limit_train_images": 100, "limit_test_images": None}
    first = run_here("first", **settings)
    assert "Decoding 602 images" in capsys.readouterr().out
    second = run_here("second", **settings)
    assert "Decoding" not in capsys.readouterr().out
    assert end_of(first) == end_of(second)
    assert main(["evaluate", "--model", str(second)]) == 0
    printed = capsys.readouterr().out
    last = metrics_of(second)[-1]
    assert_figures("things, 120 test images", last, printed)
    assert main(["evaluate", "--model", str(second), "--dataset", "mnist"]) == 2
    printed = capsys.readouterr().err
    assert "has 10 classes and images of 28 x 28 pixels in gray; the model has 3, for images of 64 x 64" in printed
    assert main(["export", "--model", str(second)]) == 0


def copy_few(things: Path, folder: Path) -> Path:
    """Ten images per class."""
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for number in range(10):
            shutil.copy2(things / kind / f"{number}.jpg", folder / kind)
    return folder


@pytest.mark.parametrize("change", ["add", "swap", "rename", "another class"])
def test_a_run_does_not_resume_with_other_images(
    change: str, things: Path, tmp_path: Path, run_here: RunHere, resume_here: ResumeHere
) -> None:
    few = copy_few(things, tmp_path / "few")
    run = run_here("x", dataset=str(few), data_dir=str(tmp_path / "data"), limit_train_images=None, image_size=16)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    if change == "add":
        shutil.copy(things / "box" / "100.jpg", few / "ball")
    elif change == "swap":
        (few / "ball").rename(few / "other")
        (few / "box").rename(few / "ball")
        (few / "other").rename(few / "box")
    elif change == "rename":
        (few / "ball").rename(few / "sphere")
    else:
        shutil.copytree(few / "ball", few / "zebra")
    with pytest.raises(ConfigError, match=r"the images of .*few have changed since the run began"):
        resume_here(run, epochs=2)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_can_be_resumed_and_evaluated_after_its_folder_moved(
    things: Path,
    tmp_path: Path,
    run_here: RunHere,
    resume_here: ResumeHere,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = copy_few(things, tmp_path / "here" / "few")
    monkeypatch.chdir(tmp_path / "here")
    settings = {"data_dir": str(tmp_path / "data"), "limit_train_images": None, "image_size": 16}
    run = run_here("x", dataset="few/", **settings)
    monkeypatch.chdir(tmp_path)
    copy_few(things, tmp_path / "few")  # another of that name
    capsys.readouterr()
    assert main(["evaluate", "--model", str(run)]) == 0
    assert "few, 6 test images" in capsys.readouterr().out
    few.rename(tmp_path / "moved")
    assert main(["evaluate", "--model", str(run)]) == 2
    assert f"--dataset {few}: no such folder. If it has moved, pass its new path" in capsys.readouterr().err
    resume_here(run, dataset=str(tmp_path / "moved"), epochs=2)
    assert metrics_of(run)[-1]["epoch"] == 2
    assert main(["evaluate", "--model", str(run), "--dataset", str(things)]) == 0
    assert "things, 600 test images" in capsys.readouterr().out  # all of what it was not made from
    (tmp_path / "moved" / "tent").rename(tmp_path / "moved" / "zebra")  # which would shift the numbers of others
    assert main(["evaluate", "--model", str(run)]) == 2
    assert "it has classes the model does not know: zebra" in capsys.readouterr().err
    (tmp_path / "moved" / "zebra").rename(tmp_path / "moved" / "tent")
    other = copy_few(things, tmp_path / "other")
    shutil.rmtree(other / "tent")
    assert main(["evaluate", "--model", str(run), "--dataset", str(other)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"other, \d+ test images", printed)
    assert f"into {tmp_path / 'data' / 'cache' / 'other'}" in printed  # beside the run's own
    assert re.search(r"^tent +- ", printed, re.MULTILINE)
    shutil.rmtree(tmp_path / "moved" / "tent")
    assert main(["evaluate", "--model", str(run), "--dataset", str(tmp_path / "moved" / ".." / "few" / "..")]) == 2


def test_a_model_includes_the_normalization_of_its_training_images(
    things: Path, tmp_path: Path, run_here: RunHere, resume_here: ResumeHere
) -> None:
    few = copy_few(things, tmp_path / "few")
    settings = {"dataset": str(few), "data_dir": str(tmp_path / "data"), "limit_train_images": None, "image_size": 16}
    run = run_here("x", epochs=1, max_steps=1, **settings)
    data = load_dataset(str(few), tmp_path / "data", DataOptions(image_size=16))
    pixels = data.train.images[:].double().flatten(0, 2) / 255  # [pixels, channels]
    weights = load_file(run / "model" / "model.safetensors")
    torch.testing.assert_close(weights["mean"].flatten().double(), pixels.mean(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights["std"].flatten().double(), pixels.std(dim=0, correction=0), atol=1e-6, rtol=0)
    model = load(run)
    X = (scale_pixels(data.test.images[:]) - weights["mean"]) / weights["std"]
    torch.testing.assert_close(predict(model.net, data.test.images[:]), model.net.net(X).exp())
    resume_here(run, max_steps=2)
    assert torch.equal(load_file(run / "model" / "model.safetensors")["mean"], weights["mean"])
    environment = json.loads((run / "environment.json").read_text())
    environment["dataset_md5"] = "of an earlier version"
    del environment["version"]
    (run / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(ConfigError, match="was started by a version of this project"):
        resume_here(run, max_steps=3)


def test_a_model_of_wide_images_applies_the_scale_of_its_data_set(tmp_path: Path, run_here: RunHere) -> None:
    rng = np.random.default_rng(0)
    for name, most in (("dim", 1000), ("bright", 60_000)):
        (tmp_path / "wide" / name).mkdir(parents=True)
        for number in range(5):
            values = rng.integers(0, most, (28, 28), dtype=np.uint16)
            Image.fromarray(values).save(tmp_path / "wide" / name / f"{number}.png")
    run = run_here("x", dataset=str(tmp_path / "wide"), data_dir=str(tmp_path), limit_train_images=None, batch_size=2)
    model, data = load(run), load_dataset(str(tmp_path / "wide"), tmp_path)
    known = [it.numpy().tobytes() for split in (data.train, data.test) for it in split.images[:]]
    for path in sorted((tmp_path / "wide").rglob("*.png")):
        with Image.open(path) as picture:
            for source in (path, picture):
                assert model.prepare(source).rows[0][0].pixels.numpy().tobytes() in known
    for name in ("dim", "bright"):  # others, with a range of their own: the model's scale is what counts
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.fromarray(np.full((28, 28), 3000, np.uint16)).save(tmp_path / "other" / name / "0.png")
    options = DataOptions(image_size=28, test_fraction=1)
    other = load_dataset(str(tmp_path / "other"), tmp_path, options, model.class_names, model.config.scale)
    assert torch.equal(other.test.images[0], model.prepare(tmp_path / "other" / "dim" / "0.png").rows[0][0].pixels)


@pytest.mark.parametrize("trained_in", ["RGB", "L"])
def test_a_model_can_be_tested_on_images_in_color_and_in_gray(
    trained_in: str, tmp_path: Path, run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for mode in ("RGB", "L"):
        for number in range(24):
            path = tmp_path / mode / KINDS[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            take_photograph(KINDS[number % 3], rng).convert(mode).save(path)
    run = run_here("x", dataset=str(tmp_path / trained_in), data_dir=str(tmp_path), image_size=28, epochs=3)
    model = load(run)
    for mode in ("RGB", "L"):
        folder = tmp_path / mode
        shutil.copytree(folder, tmp_path / f"other {mode}")
        load_dataset(str(tmp_path / f"other {mode}"), tmp_path, DataOptions(image_size=28))
        capsys.readouterr()
        assert main(["evaluate", "--model", str(run), "--dataset", str(tmp_path / f"other {mode}"), "--json"]) == 0
        printed = capsys.readouterr()
        assert ("Decoding 24 images" in printed.err) == (mode != trained_in)  # not if there is such a cache
        figures = json.loads(printed.out)
        right = [model.predict(path).label == path.parent.name for path in folder.rglob("*.png")]
        assert figures["accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(("loss", "shown"), [("nll", True), ("nll-balanced", False)])
def test_the_header_names_very_unequal_classes_and_the_loss_that_balances_them(
    loss: str, shown: bool, tmp_path: Path, run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill_folder(tmp_path / "things", 40)
    for number in range(4, 40):
        (folder / "tent" / f"{number}.jpg").unlink()
    run_here("x", dataset=str(folder), data_dir=str(tmp_path), loss=loss, image_size=28)
    note = "classes of 3 to 32 training images: --loss nll-balanced gives each the same weight"
    assert (note in capsys.readouterr().out) == shown


@pytest.mark.slow
def test_ctrl_c_while_decoding_exits_at_once_and_leaves_nothing(things: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    shutil.copytree(things, large)
    for kind in KINDS:
        for number in range(20_000, 24_000):
            os.link(large / kind / "1.jpg", large / kind / f"{number}.jpg")
    command = [sys.executable, "train.py", f"--dataset={large}", f"--data-dir={tmp_path}", "--trackers=none"]
    job = subprocess.Popen(
        command,
        cwd=PROJECT_FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_ctrl_c,
        start_new_session=True,
    )
    try:
        assert job.stdout is not None
        assert job.stdout.readline().startswith("Decoding")
        time.sleep(0.5)
        os.killpg(job.pid, signal.SIGINT)
        assert "Traceback" not in job.communicate(timeout=10)[0]
        assert job.returncode == 130
    finally:
        job.kill()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.slow
def test_names_that_a_terminal_cannot_show_are_escaped(things: Path, tmp_path: Path, launch: Launch) -> None:
    few = copy_few(things, tmp_path / "few")
    (few / "ball").rename(few / "b\u00e4ll \U0001f642 <b>$x$")
    flags = f"--dataset={few}", f"--data-dir={tmp_path}", f"--output-dir={tmp_path}", "--run-name=x"
    done = launch("train.py", *flags, "--trackers=none", "--epochs=1", command=(), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"b\xe4ll \U0001f642 <b>$x$ 10, tent 10" in done.stdout
    odd = few / "box" / os.fsdecode(b"\xff\n.jpg")
    odd.hardlink_to(few / "box" / "1.jpg")
    for command in ("predict", "evaluate"):
        paths = (str(odd), f"--save={tmp_path / 'answers.png'}") if command == "predict" else ()
        done = launch(command, *paths, f"--model={tmp_path / 'x'}", command=("-m", "mnist"), PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr.splitlines()[1:]) == (0, []), done.stderr
    page = (tmp_path / "x" / "report.html").read_text()
    assert "b\u00e4ll \U0001f642 &lt;b&gt;$x$" in page


def test_evaluate_names_the_weights_and_uses_the_runs_precision(
    things: Path, tmp_path: Path, run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    few = copy_few(things, tmp_path / "few")
    settings = {"dataset": str(few), "data_dir": str(tmp_path / "data"), "model": "cnn", "limit_train_images": None}
    run = run_here("x", validation_size=6, epochs=2, mixed_precision="bf16", **settings)
    capsys.readouterr()
    assert main(["evaluate", "--model", str(run)]) == 0
    assert f"(weights with the lowest validation loss; for the last: --model {run}/model)" in capsys.readouterr().out
    assert main(["evaluate", "--model", str(run / "model")]) == 0
    last = metrics_of(run)[-1]
    assert_figures("few, 6 test images", last, capsys.readouterr().out)


@pytest.mark.slow
def test_decoding_may_exceed_the_timeout_between_processes(things: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    for kind in ("a", "b"):
        (large / kind).mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (4000, 5000, 3), dtype=np.uint8)
        Image.fromarray(noise).save(large / kind / "0.jpg")
        for number in range(1, 30):
            os.link(large / kind / "0.jpg", large / kind / f"{number}.jpg")
    flags = (f"--dataset={large}", f"--data-dir={tmp_path}", f"--output-dir={tmp_path}", "--timeout-seconds=3")
    started = time.monotonic()
    command = [*TORCHRUN, "2", "train.py", *flags, "--trackers=none", "--epochs=1", "--model=cnn"]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started > 3
    assert "test images are duplicates of training images" in done.stdout


def write_as_folders(data: ImageData, folder: Path) -> None:
    """Every image as a PNG, in train/ and test/ with one folder per class."""
    for part, split in (("train", data.train), ("test", data.test)):
        for label in range(len(data.class_names)):
            (folder / part / str(label)).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(split.images[:].numpy(), split.labels.tolist(), strict=True)):
            Image.fromarray(image).save(folder / part / str(label) / f"{number:05}.png", compress_level=1)


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="apt install dataset-fashion-mnist")
def test_fashion_mnist_in_folders_equals_fashion_mnist_by_name(tmp_path: Path, run_here: RunHere) -> None:
    shutil.copytree(FASHION_MNIST, tmp_path / "data" / "FashionMNIST" / "raw")
    by_name = load_dataset("fashion-mnist", tmp_path / "data")
    write_as_folders(by_name, tmp_path / "fashion")
    in_folders = load_dataset(str(tmp_path / "fashion"), tmp_path / "data")
    for one, other in ((by_name.train, in_folders.train), (by_name.test, in_folders.test)):
        found = sorted(zip((it.tobytes() for it in other.images[:].numpy()), other.labels.tolist(), strict=True))
        assert found == sorted(zip((it.tobytes() for it in one.images[:].numpy()), one.labels.tolist(), strict=True))
    whole = {"data_dir": str(tmp_path / "data"), "limit_train_images": None, "limit_test_images": None}
    runs = [
        run_here(name.rpartition("/")[2], dataset=name, batch_size=50, epochs=3, **whole)
        for name in ("fashion-mnist", str(tmp_path / "fashion"))
    ]
    accuracies = [metrics_of(run)[-1]["test/accuracy"] for run in runs]
    print(accuracies)
    assert accuracies[0] > 0.84
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.015)  # the images come in another order
    net = load(runs[0]).net  # and the same network finds the same in both
    right = [int((predict(net, it.test.images[:]).argmax(1) == it.test.labels).sum()) for it in (by_name, in_folders)]
    assert right[0] == right[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "fashion"}, "--dataset fashion: unknown. Did you mean fashion-mnist?"),
        ({"dataset": "/nowhere/pets"}, "--dataset /nowhere/pets: no such folder."),
        ({"dataset": ""}, "--dataset : unknown."),
        ({"dataset": "mnist", "image_size": 64}, "--image-size 64: for a folder of images only"),
        ({"dataset": "mnist", "test_fraction": 0.5}, "--test-fraction 0.5: for a folder of images only"),
        ({"image_size": 4}, "--image-size 4: must be from 8 to 1024"),
        ({"test_fraction": 1.0}, "--test-fraction 1.0: must be between 0 and 1"),
    ],
)
def test_invalid_settings_of_folders_are_refused_first(
    settings: dict[str, object], message: str, run_here: RunHere, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_here("x", **settings)
    assert message in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_the_test_split_does_not_depend_on_the_seed(things: Path, tmp_path: Path, run_here: RunHere) -> None:
    runs = [
        run_here(f"seed-{seed}", dataset=str(things), data_dir=str(tmp_path / "data"), seed=seed, image_size=16)
        for seed in (0, 1)
    ]
    assert not torch.equal(*(load(run).net.state_dict()["net.fc1.weight"] for run in runs))
    shown = [json.loads((run / "evaluation.json").read_text())["examples"] for run in runs]
    assert [it["image"] for it in shown[0]] == [it["image"] for it in shown[1]]


@pytest.fixture
def resnet18_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up weights where torchvision keeps the pretrained ones."""
    from torchvision.models import resnet18

    weights = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    weights.parent.mkdir(parents=True)
    torch.save(resnet18().state_dict(), weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return weights


@pytest.mark.slow
def test_a_pretrained_run_resumes_without_the_pretrained_weights(
    resnet18_weights: Path, run_here: RunHere, resume_here: ResumeHere
) -> None:
    folder = run_here("x", model="resnet18", pretrained="all", limit_train_images=20, limit_test_images=10)
    resnet18_weights.unlink()
    resume_here(folder, epochs=2)
    assert metrics_of(folder)[-1]["epoch"] == 2


def test_only_the_last_layer_is_trained_and_a_resumed_run_ends_bit_identical(
    resnet18_weights: Path, run_here: RunHere, resume_here: ResumeHere
) -> None:
    settings: dict[str, Any] = {"limit_train_images": 50, "limit_test_images": 10, "optimizer": "adamw"}
    settings |= {"model": "resnet18", "pretrained": "head", "weight_decay": 0.1, "checkpoint_every": 2, "batch_size": 7}
    whole = run_here("whole", **settings)
    before = torch.load(resnet18_weights)
    before["conv1.weight"] = before["conv1.weight"].sum(dim=1, keepdim=True)  # for gray images
    for name, value in load_file(whole / "model" / "model.safetensors").items():
        if name.startswith("net.fc."):
            assert value.shape[0] == 10
        elif name.startswith("net."):
            assert torch.equal(value, before[name.removeprefix("net.")]), name  # statistics of BatchNorm, too
    assert json.loads((whole / "environment.json").read_text())["parameters"] == 10 * 513
    folder = whole.with_name("cut")
    shutil.copytree(whole, folder)
    for path in checkpoints_of(folder)[1:]:
        shutil.rmtree(path)
    resnet18_weights.unlink()
    resume_here(folder)
    assert end_of(folder) == end_of(whole)


@pytest.mark.slow
def test_two_processes_train_the_last_layer_like_one_although_the_network_has_batchnorm(
    resnet18_weights: Path, tmp_path: Path, launch: Launch
) -> None:
    flags = ("--model=resnet18", "--pretrained=head", "--limit-train-images=50", "--limit-test-images=10")
    more = ("--epochs=2", "--global-batch-size=8", "--trackers=none", f"--output-dir={tmp_path}", "--optimizer=sgd")
    for processes in (1, 2):
        command = (*TORCHRUN[1:], str(processes), "--module", "mnist.runs.launched", "train.py")  # in float64
        done = launch(*flags, *more, f"--run-name={processes}", command=command)
        assert done.returncode == 0, done.stderr
    assert largest_difference(tmp_path / "1", tmp_path / "2") < 1e-10
