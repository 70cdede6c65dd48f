"""The included model, `digits`: what it reads of other people's hands, and what it does not take for a digit."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from mnist.cli import main
from mnist.data.splits import ImageData
from mnist.inference.predict import DIGITS, Model
from mnist.models.saved import load_model
from tests.support.pages import EMPTY_KINDS, GROUNDS, KINDS, make_empty_page, make_non_digit, make_page

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(*load_model(DIGITS))


@pytest.fixture(scope="module")
def held_out(digits: ImageData) -> tuple[NDArray[np.uint8], list[int]]:
    """The last 5,000 training images, which the model's training held out, and their digits."""
    return digits.train.images[:][-5000:].numpy(), digits.train.labels[-5000:].tolist()


# --- one digit, as people cut it out


def crops(digit: NDArray[np.uint8]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """An image of MNIST whole, and cut out ever tighter."""
    rows, columns = np.nonzero(digit.any(1))[0], np.nonzero(digit.any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side, padded = max(bottom - top, right - left), np.pad(digit, 28)
    y, x = 28 + (top + bottom) // 2 - side // 2, 28 + (left + right) // 2 - side // 2
    yield "whole", digit
    yield "cut below", digit[:bottom]
    yield "cut above and below", digit[top:bottom]
    yield "square", padded[y : y + side, x : x + side]
    yield "box", digit[top:bottom, left:right]


@pytest.mark.parametrize("count", [34, pytest.param(300, marks=pytest.mark.slow)])
def test_tightly_cut_digits_on_black_and_on_white_are_read(
    count: int, model: Model, held_out: tuple[NDArray[np.uint8], list[int]]
) -> None:
    images, labels = held_out
    right: dict[tuple[str, int], list[bool]] = {}
    for image, label in zip(images[:count], labels[:count], strict=True):
        for name, pixels in crops(image):
            size = pixels.shape[1] * 6, pixels.shape[0] * 6
            large = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
            for ground in (0, 255):
                found = model.predict(255 - large if ground else large)
                right.setdefault((name, ground), []).append(found.label == str(label))
    shares = {case: float(np.mean(hits)) for case, hits in right.items()}
    print(shares)
    assert min(shares.values()) >= 0.97, shares


@pytest.mark.parametrize("height", [8, 12, 20])
def test_small_digits_in_28_pixels_are_read(
    height: int, model: Model, held_out: tuple[NDArray[np.uint8], list[int]]
) -> None:
    right = []
    for image, label in zip(held_out[0][:100], held_out[1], strict=False):
        small = Image.fromarray(image).resize((round(28 * height / 20),) * 2, Image.Resampling.BOX)
        page = Image.new("L", (28, 28))
        page.paste(small, ((28 - small.width) // 3, (28 - small.height) // 2))
        right.append(model.predict(page).label == str(label))
    assert np.mean(right) >= 0.93


def test_ink_in_28_pixels_is_read_even_if_it_looks_like_no_digit(model: Model) -> None:
    page = Image.new("L", (28, 28), 255)
    ImageDraw.Draw(page).line([(7, 18), (16, 10), (16, 9), (17, 19)], 0)  # a steep 1 without its lower half
    found = model.predict(page)
    assert found.label is not None
    assert not found.confident


def test_a_digit_on_ruled_paper_is_read_in_any_darkness_of_the_lines(model: Model) -> None:
    random = np.random.default_rng(0)
    for label, stroke in (("0", "ellipse"), ("7", "line")):
        for gray in (50, 120, 180):
            for lines in ([215], [178], [25, 215]):  # below the digit, touching it, above and below
                page = Image.new("L", (200, 240), 225)
                draw = ImageDraw.Draw(page)
                if stroke == "ellipse":
                    draw.ellipse([55, 50, 145, 175], outline=50, width=11)
                else:
                    draw.line([(55, 55), (145, 55)], fill=50, width=11)
                    draw.line([(145, 55), (85, 175)], fill=50, width=11)
                for y in lines:
                    draw.line([(0, y), (200, y)], fill=gray, width=3)
                noisy = np.clip(np.asarray(page) + random.normal(0, 3, (240, 200)), 0, 255).astype(np.uint8)
                assert model.predict(noisy).label == label, (gray, lines)


@pytest.mark.parametrize("place", ["across", "beside", "above", "corner"])
def test_a_shadow_is_no_digit_and_hides_none_whatever_its_edge(place: str, model: Model) -> None:
    y, x = np.mgrid[0:900, 0:700]
    edges = {"across": 0.9 * x + 0.45 * y - 450, "beside": x - 300, "above": y - 450}
    distance = edges.get(place, np.minimum(x - 350, y - 400))  # pixels from the edge
    for depth in (40, 100):  # of 200 gray levels
        for width in (1, 10, 20):
            light = 200 - depth / (1 + np.exp(-distance / width))
            noisy = np.clip(light + np.random.default_rng(0).normal(0, 3, light.shape), 0, 255).astype(np.uint8)
            page = Image.fromarray(noisy)
            assert model.predict(page).text == "", (depth, width)
            ImageDraw.Draw(page).line([(230, 260), (430, 260), (300, 560)], 40, 24, joint="curve")
            assert model.predict(page.filter(ImageFilter.GaussianBlur(1.5))).text == "7", (depth, width)


@pytest.mark.parametrize("beside", ["shiny table", "paper's edge"])
def test_what_lies_beside_the_paper_hides_no_digit(beside: str, model: Model) -> None:
    random = np.random.default_rng(0)
    pixels = 200 + random.normal(0, 2, (320, 240))
    if beside == "shiny table":
        pixels[-32:-18] = 100
        pixels[-18:, :80] = 100
    else:
        pixels[40:44, :215] = 110 + random.uniform(0, 60, (4, 215))
    page = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    ImageDraw.Draw(page).line([(100, 130), (130, 130), (110, 175)], 60, 4, joint="curve")
    assert model.predict(page).text == "7"


def test_a_bright_frame_around_a_black_canvas_hides_no_digit(model: Model) -> None:
    page = Image.new("L", (289, 281), 255)
    draw = ImageDraw.Draw(page)
    draw.rectangle([5, 4, 283, 276], fill=0)
    draw.line([(70, 28), (212, 28), (180, 235)], 255, 16, joint="curve")
    draw.line([(80, 120), (245, 114)], 255, 16)
    assert model.predict(page).text == "7"


# --- several digits


def read_right(true: str, read: str) -> int:
    """How many digits of a text are read right: the longest common subsequence."""
    row = [0] * (len(read) + 1)
    for digit in true:
        previous, row = row, [0]
        for column, other in enumerate(read, 1):
            row.append(previous[column - 1] + 1 if digit == other else max(previous[column], row[-1]))
    return row[-1]


def shares_read(
    model: Model, images: NDArray[np.uint8], labels: list[int], count: int, seed: int
) -> dict[str, tuple[int, int]]:
    """Digits read right, and all digits, by ground: `count` pages of each kind, half of them in generated hands."""
    totals: dict[str, tuple[int, int]] = {}
    for ground in GROUNDS:
        right = total = 0
        for kind in KINDS:
            for number in range(count):
                random = np.random.default_rng([seed, GROUNDS.index(ground), KINDS.index(kind), number])
                digits_of = (torch.from_numpy(images), torch.tensor(labels)) if number % 2 else None
                page = make_page(random, digits_of, kind, ground)
                true = page.text.replace("\n", "")
                right += read_right(true, model.predict(page.image).text.replace("\n", ""))
                total += len(true)
        totals[ground] = right, total
    return totals


@pytest.mark.slow
def test_generated_pages_of_digits_are_read(model: Model, held_out: tuple[NDArray[np.uint8], list[int]]) -> None:
    totals = shares_read(model, *held_out, count=20, seed=1)
    for ground, (right, total) in totals.items():
        print(f"{ground:18} {right / total:.2%} of {total}")
    assert sum(right for right, _ in totals.values()) / sum(total for _, total in totals.values()) >= 0.95
    assert min(right / total for right, total in totals.values()) >= 0.88


def test_numbers_and_columns_on_plain_and_ruled_paper_are_read(
    model: Model, held_out: tuple[NDArray[np.uint8], list[int]]
) -> None:
    images, labels = held_out
    for ground in ("black", "plain", "ruled"):
        right = total = 0
        for number in range(8):
            random = np.random.default_rng([2, number])
            digits_of = (torch.from_numpy(images), torch.tensor(labels)) if number % 2 else None
            page = make_page(random, digits_of, KINDS[number % 2], ground)
            right += read_right(page.text, model.predict(page.image).text)
            total += len(page.text)
        assert right / total >= 0.93, ground


@pytest.mark.parametrize("is_upright", [False, True])
def test_a_long_line_is_no_digit_and_hides_none(
    is_upright: bool, model: Model, held_out: tuple[NDArray[np.uint8], list[int]]
) -> None:
    page = Image.new("L", (600, 600))
    chosen = [0, 1, 2, 4, 5, 6, 7, 8]
    for place, number in enumerate(chosen):
        digit = Image.fromarray(held_out[0][number]).resize((84, 84), Image.Resampling.BICUBIC)
        page.paste(digit, (40 + 130 * (place % 4), 60 + 200 * (place // 4)))
    ends = [(570, 100), (570, 540)] if is_upright else [(60, 500), (540, 500)]
    ImageDraw.Draw(page).line(ends, 255, 5)
    read = model.predict(page).text
    assert read.replace("\n", "") == "".join(str(held_out[1][number]) for number in chosen)


def test_a_faint_band_of_a_scanner_is_no_digit_and_hides_none(
    model: Model, held_out: tuple[NDArray[np.uint8], list[int]]
) -> None:
    pixels = np.zeros((600, 400), np.uint8)
    for place in range(70):
        left, top = 30 + 40 * (place % 7), 30 + 45 * (place // 7)
        pixels[top : top + 28, left : left + 28] = held_out[0][place]
    pixels[250:590, 300:345] = 80
    pixels[400:430, 315:317] = 150
    text, truth = model.predict(pixels).text.replace("\n", ""), "".join(map(str, held_out[1][:70]))
    assert len(text) == 70
    assert read_right(truth, text) >= 67


def test_a_large_page_is_read_at_the_resolution_that_separates_its_digits_from_lines(
    model: Model, held_out: tuple[NDArray[np.uint8], list[int]]
) -> None:
    digits_of = torch.from_numpy(held_out[0]), torch.tensor(held_out[1])
    page = make_page(np.random.default_rng([1, 7, 2, 19]), digits_of, "page", "photo of squared")
    assert read_right(page.text, model.predict(page.image).text) >= 0.9 * len(page.text)


def test_hardly_anything_is_found_on_empty_pages(model: Model) -> None:
    found = []
    for kind in EMPTY_KINDS:
        pages = [make_empty_page(np.random.default_rng([3, number]), kind) for number in range(12)]
        found += [(kind, text) for text in (model.predict(page).text for page in pages) if text]
    assert len(found) <= 0.03 * 12 * len(EMPTY_KINDS), found


# --- what is not a digit


def rejected(model: Model, images: list[Image.Image]) -> float:
    """The share of images in which no digit is found, or one that is not confident."""
    return float(np.mean([not found.confident for found in model.predict(images)]))


@pytest.mark.parametrize(("kind", "least"), [("letter", 0.9), ("scribble", 0.9)])
def test_letters_and_scribbles_are_not_confident(kind: str, least: float, model: Model) -> None:
    images = [make_non_digit(np.random.default_rng([4, number]), kind) for number in range(100)]
    assert rejected(model, images) >= least


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="apt install dataset-fashion-mnist")
def test_clothes_are_not_confident(model: Model) -> None:
    content = gzip.decompress((FASHION_MNIST / "t10k-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
    assert rejected(model, [Image.fromarray(image) for image in images[:300]]) >= 0.9


def test_a_dash_is_no_digit_and_digits_drawn_into_one_another_touch(
    model: Model, held_out: tuple[NDArray[np.uint8], list[int]]
) -> None:
    for width in (5, 12, 22):
        page = Image.new("L", (280, 280), 255)
        ImageDraw.Draw(page).line([(50, 120 + width), (230, 120)], 0, width)
        assert model.predict(page).reason == "no digit found", width
    joined = np.hstack([image[:, 4:24] for image in held_out[0][:6]])
    joined[14, 10:-10] = 255
    assert model.predict(joined.repeat(4, 0).repeat(4, 1)).reason == "digits touch each other"


def test_nearly_all_digits_are_confident(model: Model, held_out: tuple[NDArray[np.uint8], list[int]]) -> None:
    found = model.predict(torch.from_numpy(held_out[0][:1000].copy()))
    assert float(np.mean([digit.confident for digit in found])) >= 0.98


# --- the model's card


def test_the_card_of_the_included_model_has_its_test_accuracy(
    fresh_accelerate: None, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (DIGITS / "README.md").read_text(encoding="utf-8")
    assert main(["evaluate", "--model", "digits"]) == 0
    accuracy = capsys.readouterr().out.split("accuracy ")[1].split(" %")[0]
    assert f"{accuracy} %" in card
    assert "CC BY-SA" in card
    config = json.loads((DIGITS / "config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == "cnn-deep"
    assert 0.5 < config["threshold"] < 1
