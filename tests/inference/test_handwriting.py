"""Finding digits in images, and preparing them like MNIST's."""

import io
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from torch import Tensor

from mnist.config.settings import PROJECT_FOLDER
from mnist.data.images import read_image
from mnist.data.splits import ImageData
from mnist.inference.handwriting import FITTED, NOTHING, find_digits, is_prepared
from tests.conftest import metrics_of
from tests.data.test_images import png, saved, seven
from tests.support.handwriting import HANDS, draw_digit, paste_digit

MEASURED = 1000  # digits of each kind
SEED = 20240  # of the test digits; the preparation was tuned on training images


def read_as_seven(image: Image.Image) -> bool:
    """Whether it is prepared like `seven`."""
    return difference(prepared_of(image), prepared_of(seven())) < 3


def prepared_of(image: Image.Image) -> Tensor:
    """The network's input of the one digit in an image."""
    ((digit,),) = find_digits(image).rows
    return digit.pixels


def difference(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference in 0..255, up to a shift by one pixel: a center of mass may be rounded either way."""
    moved = [other.roll((row, column), (0, 1)).float() for row in (-1, 0, 1) for column in (-1, 0, 1)]
    return min(float((one.float() - it).abs().mean()) for it in moved)


def check_form(prepared: Tensor) -> None:
    """Check MNIST's form: fits 20 x 20, center of mass in the middle, full range of brightness."""
    assert prepared.dtype == torch.uint8
    assert prepared.shape == (28, 28)
    rows, columns = prepared.any(dim=1).nonzero(), prepared.any(dim=0).nonzero()
    sides = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
    assert FITTED - 1 <= max(sides) <= FITTED
    mass = prepared.double()
    for axis in (0, 1):
        center = float(mass.sum(dim=1 - axis) @ torch.arange(28.0, dtype=torch.double) / mass.sum())
        assert abs(center - 14) <= 1
    assert prepared.max() == 255


def test_mnists_images_are_unchanged(digits: ImageData) -> None:
    for split in (digits.train, digits.test):
        assert all(is_prepared(pixels) for pixels in split.images[:].numpy())
    for image in (*digits.train.images[:200], *digits.test.images[:200]):
        picture = Image.fromarray(image.numpy())
        for same in (picture, picture.convert("RGB"), ImageOps.invert(picture), read_image(png(picture))):
            assert torch.equal(prepared_of(same), image)


def test_an_off_center_image_of_28_pixels_is_centered(digits: ImageData) -> None:
    differences = []
    for image in digits.train.images[:100]:
        prepared = prepared_of(Image.fromarray(image.roll((2, -2), (0, 1)).numpy()))
        check_form(prepared)
        differences.append(difference(prepared, image))
    assert sorted(differences)[90] < 10  # MNIST kept some specks that are removed here


def test_prepared_digits_have_mnists_form_and_are_prepared_to_themselves(digits: ImageData) -> None:
    rng = np.random.default_rng(5)
    pictures = [paste_digit(image, rng) for image in digits.train.images[:10]]
    pictures += [draw_digit(number % 10, rng) for number in range(10)]
    for picture in pictures:
        prepared = prepared_of(picture)
        check_form(prepared)
        assert torch.equal(prepared_of(Image.fromarray(prepared.numpy())), prepared)


def test_dark_on_light_and_light_on_dark_are_prepared_alike() -> None:
    rng = np.random.default_rng(6)
    for number in range(10):
        picture = draw_digit(number % 10, rng).convert("L")
        assert difference(prepared_of(picture), prepared_of(ImageOps.invert(picture))) < 6


@pytest.mark.parametrize("place", [(0, 0), (220, 40), (400, 380)])
@pytest.mark.parametrize("size", [60, 150, 400])
def test_position_and_size_do_not_matter(place: tuple[int, int], size: int) -> None:
    page = Image.new("L", (900, 800), 255)
    page.paste(seven(800).resize((size, size), Image.Resampling.BOX), place)
    assert difference(prepared_of(page), prepared_of(seven(800))) < 5


@pytest.mark.parametrize("ink", [0, 255])
def test_a_digit_on_transparent_ground_is_found(ink: int) -> None:
    image = Image.new("RGBA", (280, 280), (ink, ink, ink, 0))
    image.putalpha(ImageOps.invert(seven()))
    assert read_as_seven(read_image(png(image)))


@pytest.mark.parametrize("direction", [0, 90, 180, 270])
def test_a_shadow_does_not_matter(direction: int) -> None:
    light = np.linspace(0.5, 1, 280)[:, None] * np.ones(280)
    shaded = np.asarray(seven(paper=230, ink=40)) * np.rot90(light, direction // 90)
    assert read_as_seven(Image.fromarray(shaded.astype(np.uint8)))


@pytest.mark.parametrize("spacing", [12, 16, 20])
@pytest.mark.parametrize("darkness", [40, 150])
def test_grid_lines_that_digits_interrupt_are_removed(spacing: int, darkness: int) -> None:
    page = Image.new("L", (320, 300), 235)
    draw = ImageDraw.Draw(page)
    for place in range(5, 320, spacing):
        draw.line([(place, 0), (place, 300)], fill=darkness, width=2)
        draw.line([(0, place), (320, place)], fill=darkness, width=2)
    for row in range(3):
        for column in range(4):
            x, y = 30 + 66 * column, 25 + 83 * row
            draw.line([(x, y), (x + 40, y), (x + 20, y + 60)], fill=40, width=8)
    assert [len(row) for row in find_digits(page).rows] == [4, 4, 4]


def test_dust_a_frame_and_a_table_next_to_the_paper_are_ignored() -> None:
    dust, frame, table = seven(), seven(), seven()
    for x, y in ((20, 30), (250, 40), (60, 250), (200, 260)):
        ImageDraw.Draw(dust).ellipse((x, y, x + 4, y + 4), fill=0)
    ImageDraw.Draw(frame).rectangle((8, 8, 271, 271), outline=0, width=3)
    ImageDraw.Draw(table).rectangle((0, 0, 30, 280), fill=60)
    assert [read_as_seven(page) for page in (dust, frame, table)] == [True] * 3


@pytest.mark.parametrize("background", [0, 255])
@pytest.mark.parametrize("height", [24, 160, 900])
def test_a_straight_1_that_is_cut_out_tightly_is_prepared_like_a_whole_one(height: int, background: int) -> None:
    rng, large = np.random.default_rng(height), 4 * height
    for slant in (-0.1, 0.0, 0.1):
        image, pen = Image.new("L", (large, large), background), large * rng.uniform(0.1, 0.18)
        points = [(large * (0.5 + slant * (0.5 - y)) + rng.normal(0, pen / 10), large * y) for y in (0.1, 0.5, 0.9)]
        ImageDraw.Draw(image).line(points, fill=255 - background, width=round(pen), joint="curve")
        image = image.reduce(4)
        ink = image.point([255 * (abs(value - background) > 60) for value in range(256)])
        tight = image.crop(ink.getbbox())
        ((digit,),) = find_digits(tight).rows
        assert np.abs(np.subtract(digit.box, (0, 0, *tight.size))).max() <= max(2, height / 50)
        assert difference(digit.pixels, prepared_of(image)) < 8


@pytest.mark.parametrize("background", [0, 255])
def test_a_thick_0_of_16_pixels_that_touches_all_edges_is_no_disk(background: int) -> None:
    for width in (2, 3, 4):
        large = Image.new("L", (160, 160), background)
        ImageDraw.Draw(large).rounded_rectangle((0, 0, 159, 159), 60, outline=255 - background, width=10 * width)
        pixels = prepared_of(large.reduce(10))
        assert pixels[12:16, 12:16].max() < 50
        assert pixels[4:24, 13:15].max() > 200


@pytest.mark.parametrize("background", [0, 255])
def test_a_5_of_16_pixels_with_a_gap_between_its_strokes_is_found(background: int) -> None:
    image = Image.new("L", (16, 16), background)
    for stroke in ([(5, 0), (15, 0)], [(3, 4), (10, 9), (9, 13), (5, 15), (2, 15)]):
        ImageDraw.Draw(image).line(stroke, fill=255 - background, width=2, joint="curve")
    assert 60 < np.count_nonzero(prepared_of(image) > 128) < 120  # of 400 pixels: strokes, not the paper


def test_rules_of_a_narrow_strip_belong_to_no_digit() -> None:
    strip = Image.new("L", (100, 330), 235)
    for y in range(12, 330, 24):
        ImageDraw.Draw(strip).line([(0, y), (100, y)], fill=150, width=2)
    for y in (20, 120, 220):
        ImageDraw.Draw(strip).line([(30, y), (70, y), (50, y + 60)], fill=40, width=8)
    assert [[digit.box[2] - digit.box[0] < 60 for digit in row] for row in find_digits(strip).rows] == [[True]] * 3


def test_a_question_mark_keeps_its_dot_and_a_7_gets_none_from_dust() -> None:
    for radius, regions in ((6, 2), (2, 1)):
        page = seven()
        bottom = find_digits(page).rows[0][0].box[3]
        ImageDraw.Draw(page).ellipse((150 - radius, bottom + 12 - radius, 150 + radius, bottom + 12 + radius), fill=0)
        assert ndimage.label(prepared_of(page).numpy() > 60)[1] == regions


def gray(values: NDArray[np.floating[Any]]) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


RNG = np.random.default_rng(0)
NO_DIGIT = {
    "one pixel": Image.new("L", (1, 1), 200),
    "a line": Image.new("L", (10_000, 10), 255),
    "a thinner line": Image.new("RGB", (1, 10_000), "white"),
    "all black": Image.new("L", (300, 300), 0),
    "all white": Image.new("RGB", (300, 300), "white"),
    "28 black": Image.new("L", (28, 28)),
    "28 white": Image.new("L", (28, 28), 255),
    "noise": gray(RNG.uniform(0, 255, (280, 280))),
    "noise of 28 pixels": gray(RNG.normal(128, 30, (28, 28))),
    "two shades": gray(255.0 * (RNG.random((280, 280)) < 0.5)),
    "salt": gray(255.0 * (RNG.random((280, 280)) < 0.01)),
    "faint noise": gray(RNG.normal(240, 3, (600, 800))),
    "noise of a JPEG": Image.open(io.BytesIO(saved(gray(RNG.normal(200, 6, (300, 300))), "JPEG", quality=30))),
    "a shadow": gray(np.linspace(60, 220, 300)[:, None] + RNG.normal(0, 3, (300, 300))),
    "a table beside narrow paper": gray(np.where(np.arange(110) < 45, 225.0, 70.0) + RNG.normal(0, 3, (330, 110))),
    "narrow paper, darker at both sides": gray(200 - 50 * np.linspace(-1, 1, 110) ** 2 + RNG.normal(0, 2, (330, 110))),
    "a dot": gray(255.0 - 255.0 * (np.hypot(*np.mgrid[-150:150, -150:150]) < 2)),
}


@pytest.mark.parametrize("name", NO_DIGIT)
def test_images_without_a_digit_give_none(name: str) -> None:
    assert find_digits(NO_DIGIT[name]) == NOTHING


def random_image(rng: np.random.Generator) -> Image.Image:
    """Noise, or lines, boxes and ellipses of any gray, on an image of any shape."""
    width, height = (int(np.exp(rng.uniform(0, np.log(700)))) for _ in range(2))
    image = Image.new("L", (width, height), int(rng.integers(256)))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 40)):
        (x0, x1), (y0, y1) = (np.sort(rng.uniform(-0.2, 1.2, 2) * side) for side in (width, height))
        shade, thick = int(rng.integers(256)), int(rng.integers(1, 2 + min(width, height) // 3))
        if rng.random() < 0.4:
            pen.line((x0, y0, x1, y1), shade, thick)
        else:
            draw = pen.rectangle if rng.random() < 0.5 else pen.ellipse
            draw((x0, y0, x1, y1), outline=shade, width=thick)
    noise = rng.choice([0, 3, 30]) * rng.normal(0, 1, (height, width))
    return gray(np.asarray(image) + noise)


def test_any_image_gives_prepared_digits_within_it_or_a_reason() -> None:
    for seed in range(150):
        image = random_image(np.random.default_rng(seed))
        found = find_digits(image)
        assert bool(found.rows) != bool(found.reason)
        for digit in (digit for row in found.rows for digit in row):
            assert digit.pixels.shape == (28, 28)
            left, top, right, bottom = digit.box
            assert 0 <= left < right <= image.width
            assert 0 <= top < bottom <= image.height


# --- accuracy, through the command


def accuracy(run: Path, folder: Path, pictures: Iterable[Image.Image], labels: Sequence[int]) -> float:
    """The accuracy of `mnist predict` on pictures, written into a folder."""
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:05}.png", compress_level=1)
    command = [sys.executable, "-m", "mnist", "predict", str(folder), "--json", "--model", str(run)]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    answers = json.loads(done.stdout)
    return float(np.mean([it["label"] == str(label) for it, label in zip(answers, labels, strict=True)]))


@pytest.mark.slow
def test_pasted_and_drawn_digits_are_recognized(cnn_run: Path, digits: ImageData, tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    indices = rng.permutation(len(digits.test))[:MEASURED]
    images, labels = digits.test.take(torch.from_numpy(indices))
    pasted = accuracy(cnn_run, tmp_path / "pasted", (paste_digit(it, rng) for it in images[:]), labels.tolist())
    written = [number % len(HANDS) for number in range(MEASURED)]
    drawn = accuracy(cnn_run, tmp_path / "drawn", (draw_digit(it, rng) for it in written), written)
    print(f"pasted {pasted:.2%}, drawn {drawn:.2%}")
    assert pasted >= 0.97
    assert drawn >= 0.90


@pytest.mark.slow
def test_mnists_images_give_the_accuracy_of_the_run(cnn_run: Path, digits: ImageData, tmp_path: Path) -> None:
    images = (Image.fromarray(image.numpy()) for image in digits.test.images[:])
    measured = accuracy(cnn_run, tmp_path / "mnist", images, digits.test.labels.tolist())
    assert measured == metrics_of(cnn_run)[-1]["test/accuracy"]
