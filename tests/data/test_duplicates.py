"""Duplicates, near duplicates, and the same image under two labels."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from mnist.config.settings import DataOptions
from mnist.data.datasets import load_dataset
from mnist.data.duplicates import find_alike, likeness_of
from mnist.data.images import Form, digest_of, fit_image
from tests.support.shapes import OUTLINES, draw, make_shapes

Change = Callable[[Image.Image], Image.Image]


def recompressed(image: Image.Image) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=40)
    return Image.open(content).convert("RGB")


CHANGES: dict[str, Change] = {
    "recompressed": recompressed,
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "with less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
}


def photographs(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    names = list(OUTLINES)
    return [draw(OUTLINES[names[number % len(names)]], rng) for number in range(count)]


def alike(images: list[Image.Image]) -> set[tuple[int, ...]]:
    pixels = np.stack([fit_image(image, Form(64, color=True)) for image in images])
    digests, likenesses = (
        np.stack([np.frombuffer(make(one), np.uint8) for one in pixels])
        for make in (lambda one: digest_of(one.tobytes()), likeness_of)
    )
    return {tuple(pair) for pair in find_alike(pixels, digests, likenesses).tolist()}


@pytest.mark.parametrize("change", CHANGES)
def test_most_changed_copies_are_found_and_no_others(change: str) -> None:
    originals = photographs(60)
    found = alike(originals + [CHANGES[change](image) for image in originals])
    assert len(found & {(number, number + 60) for number in range(60)}) >= 48
    assert found <= {(number, number + 60) for number in range(60)}


def test_different_images_of_one_kind_are_not_alike() -> None:
    assert not alike(photographs(400, seed=1))


def test_nearly_empty_images_and_exact_copies_are_not_near_duplicates() -> None:
    empty = [Image.new("RGB", (80, 80), (value, value, value)) for value in range(100, 160)]
    (original,) = photographs(1)
    assert not alike([*empty, original, original])


def test_many_nearly_equal_images_are_one_group() -> None:
    """As in the frames of a video: each is compared only with some of the others."""
    (original,) = photographs(1)
    frames = []
    for number in range(100):
        frame = original.copy()
        ImageDraw.Draw(frame).rectangle((30, 30, 32, 32), fill=(number, number, number))
        frames.append(frame)
    found, reached = alike(frames), {0}
    for _ in frames:
        reached |= {one for pair in found for one in pair if reached & set(pair)}
    assert len(reached) == 100


def test_many_pages_that_look_alike_do_not_hide_other_duplicates() -> None:
    pages, originals = [], photographs(10)
    for number in range(2000):
        page = Image.new("RGB", (64, 64), "white")
        page.putpixel((number % 64, number // 64), (0, 0, 0))
        pages.append(page)
    found = alike([*pages, *originals, *(CHANGES["half as large"](image) for image in originals)])
    assert found >= {(2000 + number, 2010 + number) for number in range(10)}


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return make_shapes(tmp_path / "shapes", sizes=lambda place: 4)


def notes(folder: Path) -> str:
    return "\n".join(load_dataset(str(folder), folder.parent, DataOptions(image_size=64, test_fraction=0.25)).notes)


def test_a_folder_without_duplicates_has_no_note(shapes: Path) -> None:
    assert "data.html" not in notes(shapes)


def test_an_image_in_two_classes_is_named(shapes: Path) -> None:
    Image.open(shapes / "ring" / "2.jpg").resize((300, 400)).save(shapes / "disc" / "copy.png")
    text = notes(shapes)
    assert "1 image has duplicates in another class: disc/copy.png looks like ring/2.jpg" in text
    assert "repeated images: 0 exactly, 1 nearly; see data.html" in text


def test_an_exact_duplicate_is_named_before_a_near_one(shapes: Path) -> None:
    recompressed(Image.open(shapes / "ring" / "2.jpg")).save(shapes / "disc" / "0.png")  # sorted before the next
    shutil.copy(shapes / "ring" / "3.jpg", shapes / "disc" / "copy.jpg")
    assert "2 images have duplicates in another class: disc/copy.jpg is ring/3.jpg, ..." in notes(shapes)


def test_near_duplicates_in_both_splits_inflate_the_accuracy(shapes: Path) -> None:
    for path in sorted(shapes.glob("*/*.jpg")):
        recompressed(Image.open(path)).save(path.with_suffix(".png"))
    text = notes(shapes)
    assert "test images are duplicates of training images and inflate the accuracy" in text
    assert " looks like " in text


def test_duplicates_are_known_again_from_the_cache(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recompressed(Image.open(shapes / "ring" / "2.jpg")).save(shapes / "ring" / "copy.png")
    first = notes(shapes)
    assert "Decoding" in capsys.readouterr().out
    assert notes(shapes) == first
    assert "Decoding" not in capsys.readouterr().out
    assert "1 nearly" in first
