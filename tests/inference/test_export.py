"""ONNX export, checked with onnxruntime, the format's own checker and a program without PyTorch."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from mnist import load
from mnist.cli import main
from mnist.config.settings import PROJECT_FOLDER, TrainConfig
from mnist.data.images import Form, fit_image
from mnist.data.splits import FITS, ImageData
from mnist.errors import UserError
from mnist.inference import export
from mnist.inference.predict import Model, predict
from mnist.inference.raw_pixels import prepend_preparation
from mnist.models.by_name import build_model
from mnist.models.saved import ModelConfig
from tests.conftest import RunHere, train_afresh
from tests.support.photographs import KINDS, fill_folder, take_photograph


@pytest.fixture(scope="module", params=["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with model.onnx."""
    parent = tmp_path_factory.mktemp("runs")
    small: dict[str, Any] = {"limit_train_images": 3000, "limit_test_images": 100, "epochs": 1, "trackers": "none"}
    train_afresh(TrainConfig(model=request.param, output_dir=str(parent), run_name="x", **small))
    assert main(["export", "--format", "onnx", "--model", str(parent / "x")]) == 0
    return parent / "x"


def test_the_exported_model_gives_the_models_predictions_on_the_whole_test_set(
    exported: Path, digits: ImageData
) -> None:
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    found = load(exported).predict(list(digits.test.images[:]))
    probabilities = torch.cat([export.run(session, part) for part in torch.split(digits.test.images[:], 777)])
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    assert {it.label for it in found} <= set(names)
    expected = np.array([[it.probabilities[name] for name in names] for it in found])
    assert np.abs(probabilities.numpy() - expected).max() < 1e-4


def test_the_file_is_valid_takes_any_batch_size_and_describes_preprocessing(exported: Path) -> None:
    assert [it.name for it in exported.glob("*onnx*")] == ["model.onnx"]  # all in one file
    model = onnx.load(str(exported / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)
    (image,) = model.graph.input
    sides = [it.dim_param or it.dim_value for it in image.type.tensor_type.shape.dim]
    assert isinstance(sides[0], str)  # any number; torch 2.6 calls it s0
    assert (image.name, sides[1:]) == ("images", [1, 28, 28])
    metadata = {it.key: it.value for it in model.metadata_props}
    assert json.loads(metadata["class_names"]) == [str(number) for number in range(10)]
    preprocessing = json.loads(metadata["preprocessing"])
    assert (preprocessing["shape"], preprocessing["scale"]) == ([1, 28, 28], "uint8 / 255")
    assert "center of mass" in preprocessing["image"]


def test_an_exported_model_normalizes_images_as_the_model_does(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    net = build_model("mlp", 3, (3, 16, 16), normalization=((0.9, 0.8, 0.7), (0.05, 0.1, 0.2)))
    model = Model(net, ModelConfig("mlp", ("a", "b", "c"), (16, 16), "pets", 3, "crop", True))
    assert export.export_onnx(model, tmp_path / "m.onnx", images).same_size < 1e-4
    without = predict(net.net, images)  # type: ignore[arg-type]
    assert (export.run(onnxruntime.InferenceSession(tmp_path / "m.onnx"), images) - without).abs().max() > 0.01


def test_weights_in_a_second_file_are_found_under_its_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)  # bytes
    images = torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8)
    model = Model(build_model("mlp", 10), ModelConfig("mlp", tuple("0123456789"), (28, 28), "mnist"))
    export.export_onnx(model, tmp_path / "m.onnx", images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    found = export.run(onnxruntime.InferenceSession(tmp_path / "m.onnx"), images)
    torch.testing.assert_close(found, predict(model.net, images), atol=1e-4, rtol=0)


def test_a_program_without_torch_can_use_the_file(exported: Path, digits: ImageData, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", digits.test.images[:100].numpy())
    page = (PROJECT_FOLDER / "docs" / "predict.md").read_text()
    program = page.split("<!-- a program without torch -->\n```python\n")[1].split("```")[0]
    script = f"import sys; sys.modules['torch'] = None\n{program}\nprint(json.dumps([labels, sorted(sys.modules)]))"
    command = [sys.executable, "-c", script, str(exported / "model.onnx"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    labels = json.loads(done.stdout)[0]
    assert labels == [it.label for it in load(exported).predict(list(digits.test.images[:100]))]


def test_a_file_with_other_predictions_is_not_written(
    run_here: RunHere, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_here("x")
    (folder / "model.onnx").write_text("the old one")
    monkeypatch.setattr(export, "scale_pixels", lambda images: images.unsqueeze(1) / 250)  # what onnxruntime is given
    with pytest.raises(UserError, match=r"not written. The exported model's probabilities differ by up to \d"):
        export.export_onnx(load(folder), folder / "model.onnx", digits.test.images[:100])
    assert (folder / "model.onnx").read_text() == "the old one"
    assert not list(folder.glob(".*onnx*"))


def test_a_missing_package_is_an_error_with_the_install_command(
    run_here: RunHere, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_here("x")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed. Run: pip install -e '\.\[onnx\]'"):
        export.export_onnx(load(folder), folder / "model.onnx", digits.test.images[:100])


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["> {}", "| cat > {}"])
def test_a_model_can_be_exported_to_standard_output(redirection: str, run_here: RunHere, tmp_path: Path) -> None:
    run, file = run_here("x"), tmp_path / "m.onnx"
    device = Path("/dev/stdout").readlink()
    command = f"{sys.executable} -m mnist export --model {run} --output /dev/stdout {redirection.format(file)}"
    done = subprocess.run(["sh", "-c", command], cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert re.search(r"checked against the model .*\n +probabilities differ by at most \d", done.stderr)
    onnx.checker.check_model(onnx.load(str(file)))
    assert Path("/dev/stdout").readlink() == device  # root may replace it


def test_unwritable_outputs_are_errors(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("x")
    for command, *others in (["export", "--model", str(run)], ["report", str(run)]):
        assert main([command, *others, "--output", str(tmp_path)]) == 2
        assert f"--output {tmp_path}: is a folder, not a file." in capsys.readouterr().err
        assert main([command, *others, "--output", "/dev/full"]) == 1
        assert "--output /dev/full: cannot be written: No space left on device." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["runs {}", "predict --model {}/x - <&-"])
def test_closed_streams_cause_no_traceback(arguments: str, run_here: RunHere) -> None:
    folder = run_here("x").parent
    command = f"{sys.executable} -m mnist {arguments.format(folder)} >&-"
    done = subprocess.run(["sh", "-c", command], cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "<&-" in command else 0)


@pytest.fixture(scope="module", params=[pytest.param("crop", marks=pytest.mark.slow), "pad"])
def photographs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on photographs of three things, and the photographs beside it."""
    parent = tmp_path_factory.mktemp("photographs")
    fill_folder(parent / "things", 60)
    settings: dict[str, Any] = {"dataset": str(parent / "things"), "data_dir": str(parent), "output_dir": str(parent)}
    settings |= {"model": "cnn", "epochs": 4, "batch_size": 16, "learning_rate": 2e-3, "schedule": "one-cycle"}
    train_afresh(TrainConfig(run_name="x", trackers="none", fit=request.param, **settings))
    return parent / "x"


def test_a_program_feeds_raw_pixels_of_files_of_any_size(photographs: Path) -> None:
    assert main(["export", "--model", str(photographs)]) == 0
    onnx.checker.check_model(onnx.load(str(photographs / "model.onnx")), full_check=True)
    session, model = onnxruntime.InferenceSession(photographs / "model.onnx"), load(photographs)
    rng, differences, same = np.random.default_rng(1), [], []
    for number in range(100):
        picture = take_photograph(KINDS[number % 3], rng)
        if number % 4 == 0:
            picture = picture.resize((picture.width * 13, picture.height * 13))
        (probabilities,) = session.run(["probabilities"], {"images": np.asarray(picture)[None]})[0]
        expected = model.predict(picture).probabilities
        differences.append(max(abs(expected[name] - probabilities[place]) for place, name in enumerate(KINDS)))
        same.append(KINDS[int(probabilities.argmax())] == next(iter(expected)))
    assert max(differences) < 0.03
    assert sum(same) >= 99


@pytest.mark.parametrize("fit", FITS)
def test_raw_pixels_are_prepared_as_by_pillow(fit: str, tmp_path: Path) -> None:
    """Noise, in which each pixel counts, but not so much that values are cut to 0 to 255 between the two products.

    Pillow 13 begins with the columns of some images. Larger ones are reduced in two steps.
    """

    class Unchanged(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0

    program = torch.onnx.export(
        Unchanged().eval(),
        (torch.zeros(2, 3, 64, 64),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    prepend_preparation(program.model, 64, fit, color=True)
    program.save(str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for width, height in ((101, 90), (90, 61), (30, 200), (64, 64), (40, 41), (200, 17), (1, 1), (240, 247)):
        pixels = np.random.default_rng(0).integers(90, 166, (height, width, 3), np.uint8)
        (prepared,) = session.run(None, {"images": pixels[None]})
        expected = fit_image(Image.fromarray(pixels), Form(64, True, fit))
        assert np.abs(prepared[0].transpose(1, 2, 0) * 255 - expected).max() < 2.01, (width, height)


def test_images_of_one_size_may_be_a_batch(photographs: Path) -> None:
    model, images = load(photographs), torch.randint(0, 256, (5, 90, 70, 3), dtype=torch.uint8)
    export.export_onnx(model, photographs / "batch.onnx", torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    session = onnxruntime.InferenceSession(photographs / "batch.onnx")
    together = export.run(session, images)
    torch.testing.assert_close(together, torch.cat([export.run(session, image[None]) for image in images]))


def test_gray_models_take_gray_pixels(tmp_path: Path) -> None:
    config = ModelConfig("mlp", ("a", "b"), (20, 20), "sketches", preparation="pad")
    model = Model(build_model("mlp", 2, (1, 20, 20)), config)
    images = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    assert export.export_onnx(model, tmp_path / "m.onnx", images).same_size < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    raw = torch.randint(0, 256, (1, 33, 57), dtype=torch.uint8)
    expected = predict(model.net, model.prepare(raw[0]).rows[0][0].pixels[None])
    torch.testing.assert_close(export.run(session, raw), expected, atol=1e-3, rtol=0)


def test_a_difference_that_is_not_a_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "differences_of_sizes", lambda *_: [0.0, float("nan"), 0.0])
    model = Model(build_model("mlp", 2, (1, 20, 20)), ModelConfig("mlp", ("a", "b"), (20, 20), "x", preparation="crop"))
    with pytest.raises(UserError, match=r"differ by up to nan.*Try --prepared"):
        export.export_onnx(model, tmp_path / "m.onnx", torch.zeros(2, 20, 20, dtype=torch.uint8))
    assert not (tmp_path / "m.onnx").exists()


def test_the_file_says_how_to_scale_more_than_8_bits(tmp_path: Path) -> None:
    config = ModelConfig("mlp", ("a", "b"), (20, 20), "scans", preparation="crop", scale=(0.0, 4095.0))
    model = Model(build_model("mlp", 2, (1, 20, 20)), config)
    export.export_onnx(model, tmp_path / "m.onnx", torch.zeros(2, 20, 20, dtype=torch.uint8))
    metadata = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["preprocessing"])["more_than_8_bits"] == {"to_0": 0, "to_255": 4095}


def test_a_model_of_photographs_can_take_prepared_images_instead(photographs: Path) -> None:
    output = photographs / "prepared.onnx"
    assert main(["export", "--model", str(photographs), "--prepared", "--output", str(output)]) == 0
    (image,) = onnxruntime.InferenceSession(output).get_inputs()
    assert (image.type, image.shape[1:]) == ("tensor(float)", [3, 64, 64])
