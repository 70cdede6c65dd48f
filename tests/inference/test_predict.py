"""Predicting with a trained model: with the `mnist` command, from Python and from the Hugging Face Hub."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mnist import load
from mnist.cli import main
from mnist.config.settings import PROJECT_FOLDER, TrainConfig
from mnist.data.splits import ImageData
from mnist.errors import ConfigError, ImageError, UserError
from mnist.inference.predict import Model
from mnist.models.hub import HubModel, load_from_hub
from mnist.models.saved import save_model
from tests.conftest import Launch, metrics_of, train_afresh
from tests.data.test_images import png_claiming

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that knows most digits."""
    parent = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {"limit_train_images": 20_000, "batch_size": 50, "learning_rate": 3e-3}
    settings |= {"epochs": 2, "trackers": "none"}
    train_afresh(TrainConfig(output_dir=str(parent), run_name="x", **settings))
    return parent / "x"


def assert_figures(images: str, line: dict[str, float], printed: str) -> None:
    """`mnist evaluate` prints the loss and accuracy of a line of metrics.jsonl, up to the order of summation."""
    found = re.search(rf"^{images}: loss ([\d.]+), accuracy ([\d.]+) %", printed, re.MULTILINE)
    assert found, printed
    assert float(found[1]) == pytest.approx(line["test/loss"], abs=2e-4)
    assert float(found[2]) == pytest.approx(100 * line["test/accuracy"], abs=0.02)


def write_digits(folder: Path, digits: ImageData, indices: Sequence[int]) -> list[str]:
    """Test digits in files, dark on light and large."""
    names = []
    for index in indices:
        picture = ImageOps.invert(Image.fromarray(digits.test.images[index].numpy())).resize((280, 280))
        names.append(str(folder / f"{index}.png"))
        picture.save(names[-1])
    return names


def test_predict_prints_a_row_per_image_and_exits_with_1_for_unreadable_ones(
    run: Path, digits: ImageData, tmp_path: Path, capsys: Capture
) -> None:
    names = write_digits(tmp_path, digits, (0, 1, 2))
    (tmp_path / "broken.png").write_text("no image")
    Image.new("L", (100, 100), 255).save(tmp_path / "empty.png")
    assert main(["predict", str(tmp_path), "--model", str(run)]) == 1
    printed = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in printed.out.splitlines()}
    assert [rows[name][0] for name in names] == [str(int(digits.test.labels[index])) for index in (0, 1, 2)]
    assert rows[str(tmp_path / "empty.png")] == ["no", "digit", "found"]
    assert f"{tmp_path}/broken.png: not an image" in printed.err
    assert main(["predict", *names, "--model", str(run)]) == 0


def write_number(folder: Path, digits: ImageData, indices: Sequence[int]) -> tuple[str, str]:
    """The file name of test digits side by side in two rows, dark on light, and their text."""
    images, labels = digits.test.take(torch.tensor(indices))
    rows = [torch.cat(list(row), dim=1) for row in images[:].split(2)]
    picture = ImageOps.invert(Image.fromarray(torch.cat(rows).numpy())).resize((280, 280))
    picture.save(folder / "number.png")
    one, two, three, four = labels.tolist()
    return str(folder / "number.png"), f"{one}{two}\n{three}{four}"


def test_several_digits_are_read_row_by_row_with_their_boxes(
    run: Path, digits: ImageData, tmp_path: Path, capsys: Capture
) -> None:
    name, text = write_number(tmp_path, digits, (0, 1, 2, 3))
    flags = ["--show-input", str(tmp_path / "seen"), "--save", str(tmp_path / "figure.png")]
    assert main(["predict", name, "--json", "--model", str(run), *flags]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["label"], row["top"], row["text"]) == (None, [], text)
    assert "".join(digit["label"] for digit in row["digits"]) == text.replace("\n", "")
    assert row["probability"] == min(digit["probability"] for digit in row["digits"])
    for number, digit in enumerate(row["digits"]):  # each in its quarter
        left, top, right, bottom = digit["box"]
        assert 140 * (number % 2) <= left < right <= 140 * (number % 2 + 1)
        assert 140 * (number // 2) <= top < bottom <= 140 * (number // 2 + 1)
    inputs = sorted((tmp_path / "seen").iterdir())
    assert [path.name for path in inputs] == [f"001-0{number}-number.png" for number in range(1, 5)]
    assert load(run).predict(name).text == text
    assert main(["predict", name, "--model", str(run)]) == 0
    words = capsys.readouterr().out.split("  ")
    assert words[1:2] + words[3:4] == [text.replace("\n", " / "), "(the lowest of 4)\n"]


def test_a_prediction_below_the_models_threshold_is_not_confident(
    run: Path, digits: ImageData, tmp_path: Path, capsys: Capture
) -> None:
    model, (name,) = load(run), write_digits(tmp_path, digits, (0,))
    likely = model.predict(name).probability
    for temperature, threshold, confident in ((1.0, likely - 0.01, True), (4.0, likely - 0.01, False)):
        config = dataclasses.replace(model.config, temperature=temperature, threshold=threshold)
        save_model(model.net, tmp_path / "model", config)
        assert main(["predict", name, "--json", "--model", str(tmp_path / "model")]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["label"], row["confident"]) == ("7", confident)
        assert main(["predict", name, "--model", str(tmp_path / "model")]) == 0
        assert capsys.readouterr().out.endswith("  (not sure)\n") is not confident


def test_what_is_less_than_half_as_probable_as_digits_are_is_none(run: Path, digits: ImageData, tmp_path: Path) -> None:
    model, (name,) = load(run), write_digits(tmp_path, digits, (0,))
    likely = model.predict(name).probability
    for threshold, label in ((2.1 * likely, "7"), (2.4 * likely, None)):
        found = Model(model.net, dataclasses.replace(model.config, threshold=threshold)).predict(name)
        assert (found.label, found.confident, found.reason) == (label, False, "" if label else "no digit found")


def test_without_a_run_the_included_model_is_used_and_named(
    run: Path, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (name,) = write_digits(tmp_path, digits, (0,))
    monkeypatch.chdir(tmp_path)
    assert main(["predict", name]) == 0
    printed = capsys.readouterr()
    assert printed.out.split()[1] == "7"
    assert printed.err == "No model in runs/latest: using the included one (--model digits).\n"
    (tmp_path / "digits").mkdir()  # of images: not a model
    assert main(["predict", name]) == main(["predict", name, "--model", "digits"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["7", "7"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(run)
    assert main(["predict", name]) == 0
    assert capsys.readouterr().err == "Using the model of runs/latest; --model digits is the included one.\n"


def write_awkward_images(folder: Path, seven: Image.Image) -> dict[str, str | None]:
    """Odd or malicious images, and the outcome of each: a class, None if no digit is found, or a part of the error."""
    noise = np.random.default_rng(0).integers(0, 256, (280, 280), dtype=np.uint8)
    white = Image.new("RGBA", seven.size, (255, 255, 255, 0))
    white.putalpha(ImageOps.invert(seven))
    pictures: dict[str, tuple[Image.Image, str | None]] = {
        "one-pixel.png": (Image.new("L", (1, 1), 200), None),
        "line.png": (Image.new("RGB", (10_000, 10), "white"), None),
        "black.png": (Image.new("L", (300, 300), 0), None),
        "white.png": (Image.new("RGB", (300, 300), "white"), None),
        "noise.png": (Image.fromarray(noise), None),
        "cmyk.jpg": (seven.convert("CMYK"), "7"),
        "16-bit.png": (Image.fromarray(np.asarray(seven).astype(np.uint16) * 257), "7"),
        "palette.png": (white.quantize(16), "7"),  # white on nothing
    }
    for name, (picture, _) in pictures.items():
        picture.save(folder / name)
    said: dict[str, str | None] = {name: label for name, (_, label) in pictures.items()}
    content = (folder / "noise.png").read_bytes()
    (folder / "truncated.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "bomb.png").write_bytes(png_claiming(50_000, 50_000))
    reasons = {"truncated": "broken or cut off", "text": "not an image", "circle": "symbolic link", "bomb": "too large"}
    return said | {f"{name}.png": reason for name, reason in reasons.items()}


def test_awkward_images_have_the_documented_outcome(
    run: Path, digits: ImageData, tmp_path: Path, capsys: Capture
) -> None:
    seven = ImageOps.invert(Image.fromarray(digits.test.images[0].numpy())).resize((280, 280))
    said = write_awkward_images(tmp_path, seven)
    assert main(["predict", str(tmp_path), "--json", "--model", str(run)]) == 1
    printed = capsys.readouterr()
    found = {Path(row["file"]).name: row["label"] for row in json.loads(printed.out)}
    assert found == {name: label for name, label in said.items() if label in (None, "7")}
    lines = dict(line.removeprefix(f"mnist predict: {tmp_path}/").split(": ", 1) for line in printed.err.splitlines())
    refused = {name: reason for name, reason in said.items() if name not in found}
    assert lines.keys() == refused.keys()
    for name, reason in refused.items():
        assert str(reason) in lines[name].lower()


def test_a_closed_pipe_is_no_error(run: Path, digits: ImageData, tmp_path: Path) -> None:
    write_digits(tmp_path, digits, range(3))
    command = f"{sys.executable} -m mnist predict {tmp_path} --model {run} | true"
    done = subprocess.run(["bash", "-c", command], cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


def test_predicting_imports_no_slow_packages(run: Path, digits: ImageData, tmp_path: Path, launch: Launch) -> None:
    (name,) = write_digits(tmp_path, digits, (0,))
    script = (
        "import sys; from mnist.cli import main;"
        f" assert main(['predict', {name!r}, '--model', {str(run)!r}]) == 0; print(*sys.modules)"
    )
    done = launch("-c", script, command=())
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"torchvision", "accelerate", "wandb", "matplotlib", "huggingface_hub", "onnx", "jinja2"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--top=0",), "--top 0: must be at least 1."),
        (("--save=answers.docx",), "--save answers.docx: unknown image type. Use one of .png"),
        (("--model=nowhere",), "--model nowhere: no model found."),
    ],
)
def test_invalid_flags_are_refused_first(
    flags: tuple[str, ...], message: str, run: Path, digits: ImageData, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["predict", *write_digits(tmp_path, digits, (0,)), f"--model={run}", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"mnist predict: {message}")


def test_json_output_equals_the_python_api(run: Path, digits: ImageData, tmp_path: Path, capsys: Capture) -> None:
    names = write_digits(tmp_path, digits, (0, 1))
    assert main(["predict", *names, "--json", "--top", "2", "--model", str(run / "model")]) == 0
    rows = json.loads(capsys.readouterr().out)
    # the command predicts one image at a time: kernels for batches of one may round otherwise
    for row, found in zip(rows, load(run).predict(names), strict=True):
        assert (row["label"], row["probability"]) == (found.label, pytest.approx(found.probability, rel=1e-4))
        assert {it["label"]: it["probability"] for it in row["top"]} == pytest.approx(
            dict(list(found.probabilities.items())[:2]), rel=1e-4
        )
        assert sum(found.probabilities.values()) == pytest.approx(1)


def test_standard_input_is_predicted_and_the_networks_input_is_saved(
    run: Path, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (name,) = write_digits(tmp_path, digits, (0,))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(name).read_bytes())))
    flags = ["--show-input", str(tmp_path / "seen"), "--save", str(tmp_path / "figure.png")]
    assert main(["predict", "-", "--model", str(run), *flags]) == 0
    assert capsys.readouterr().out.split()[:2] == ["-", "7"]
    with Image.open(tmp_path / "seen" / "001-stdin.png") as seen:
        assert seen.size == (28, 28)
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > 900


def test_arrays_tensors_and_pil_images_are_predicted_alone_or_together(run: Path, digits: ImageData) -> None:
    model, image = load(run), digits.test.images[0]
    alone = [model.predict(it) for it in (image, image.numpy(), image.float() / 255, Image.fromarray(image.numpy()))]
    assert {it.label for it in alone} == {"7"}
    assert len({it.probability for it in alone}) == 1
    assert torch.equal(alone[0].network_input, image)  # as it is
    many = model.predict(digits.test.images[:3])
    assert [it.label for it in many] == [it.label for it in model.predict(list(digits.test.images[:3]))]
    for wrong in (np.zeros((2, 3, 4, 5, 6)), np.full((28, 28), 300), np.zeros((0, 28))):
        with pytest.raises(ValueError, match="an image of"):
            model.predict(wrong)


def test_mnists_images_are_predicted_with_the_runs_accuracy(run: Path, digits: ImageData) -> None:
    found = load(run).predict(list(digits.test.images[:1000]))
    right = sum(it.label == str(int(label)) for it, label in zip(found, digits.test.labels[:1000], strict=True))
    assert right / 1000 == pytest.approx(metrics_of(run)[-1]["test/accuracy"], abs=0.05)
    assert all(torch.equal(it.network_input, image) for it, image in zip(found, digits.test.images[:], strict=False))


def test_evaluate_prints_the_metrics_of_the_run(run: Path, fresh_accelerate: None, capsys: Capture) -> None:
    assert main(["evaluate", f"--model={run}"]) == 0
    printed, last = capsys.readouterr().out, metrics_of(run)[-1]
    assert_figures("mnist, 10,000 test images", last, printed)
    for digit in range(10):
        (percent,) = re.findall(rf"^{digit} +([\d.]+) %", printed, re.MULTILINE)
        assert float(percent) == pytest.approx(100 * last[f"test/class_accuracy/{digit}"], abs=0.11)


def test_evaluate_prints_all_figures_of_the_run_as_json(run: Path, fresh_accelerate: None, capsys: Capture) -> None:
    assert main(["evaluate", "--json", f"--model={run}"]) == 0
    printed, last = json.loads(capsys.readouterr().out), metrics_of(run)[-1]
    assert (printed["dataset"], printed["images"]) == ("mnist", 10_000)
    for name in ("loss", "accuracy", "macro_f1", "balanced_accuracy", "top5_accuracy", "calibration_error"):
        assert printed[name] == pytest.approx(last[f"test/{name}"], abs=3e-4), name
    for row in printed["classes"]:
        assert row["recall"] == pytest.approx(last[f"test/class_accuracy/{row['name']}"], abs=2e-3)
        predicted = sum(counts[int(row["name"])] for counts in printed["confusion"])
        assert row["precision"] == printed["confusion"][int(row["name"])][int(row["name"])] / predicted


def test_models_of_other_data_sets_take_only_images_of_their_size(run: Path, digits: ImageData, tmp_path: Path) -> None:
    model = load(run)
    shoes = Model(model.net, dataclasses.replace(model.config, dataset="fashion-mnist", preparation="none"))
    shifted = digits.test.images[0].roll(5, dims=1)  # which a digit's preparation would move back
    assert torch.equal(shoes.predict(shifted).network_input, shifted)
    assert not torch.equal(model.predict(shifted).network_input, shifted)
    with pytest.raises(ImageError, match=r"280 x 280 pixels, but this fashion-mnist model needs 28 x 28"):
        shoes.predict(write_digits(tmp_path, digits, (0,))[0])


def test_a_model_that_takes_no_drawings_serves_no_drawing_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(run)
    save_model(model.net, tmp_path / "shoes", dataclasses.replace(model.config, preparation="none"))
    assert main(["draw", "--model", str(tmp_path / "shoes")]) == 2
    assert f"--model {tmp_path / 'shoes'}: a mnist model takes only" in capsys.readouterr().err


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model /nowhere: no model found"):
        load("/nowhere")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="this run has no model yet"):
        load(tmp_path / "begun")


def test_a_model_saved_by_the_hubs_mixin_is_loaded_by_it(run: Path, tmp_path: Path) -> None:
    model = load(run)
    HubModel(model.net, model.config).save_pretrained(tmp_path / "hub")
    assert HubModel.from_pretrained(str(tmp_path / "hub")).model_config == model.config


def test_a_model_on_the_hub_is_an_error_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"nobody/nothing: no such folder, and http://127.0.0.1:9 cannot be reached"):
        load("nobody/nothing")


def test_a_hub_endpoint_without_a_scheme_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "hub.example")
    with pytest.raises(ConfigError, match=r"HF_ENDPOINT=hub\.example: not a URL. It must begin with https://"):
        load_from_hub("nobody/nothing")


def test_the_networks_input_is_saved_for_long_file_names(run: Path, digits: ImageData, tmp_path: Path) -> None:
    name = "ü" * 125  # 250 bytes
    Image.fromarray(digits.test.images[0].numpy()).save(tmp_path / f"{name}.png")
    assert main(["predict", str(tmp_path), "--model", str(run), "--show-input", str(tmp_path / "seen")]) == 0
    (path,) = (tmp_path / "seen").iterdir()
    assert path.name.startswith("001-üüü")
