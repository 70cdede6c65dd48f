"""A folder of images as a dataset: its files, refused folders, and the cache of decoded images."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mnist.config.settings import PROJECT_FOLDER, DataOptions
from mnist.data import cache
from mnist.data.cache import FOOTER, MAGIC
from mnist.data.datasets import load_dataset
from mnist.data.images import Form, fit_image, read_image
from mnist.data.loader import Training, build_loader, evaluation_splits
from mnist.data.splits import FITS, ImageData, MappedImages, Split
from mnist.errors import ConfigError, UserError
from mnist.launch.hardware import available_cores
from tests.data.test_images import png, png_claiming, saved

Pixels = NDArray[np.uint8]


def noise(seed: int, height: int = 28, width: int = 28, channels: int = 3) -> Pixels:
    """A unique image; with one channel it is gray."""
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder: Path, count: int, *, first: int = 0, channels: int = 1, side: int = 28) -> None:
    """PNGs called 0000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.fromarray(noise(number, side, side, channels)).save(folder / f"{number:04}.png")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """20 gray cats and 10 gray dogs."""
    write_images(tmp_path / "pets" / "cat", 20)
    write_images(tmp_path / "pets" / "dog", 10, first=100)
    return tmp_path / "pets"


def load(folder: Path, class_names: tuple[str, ...] | None = None, **options: Any) -> ImageData:
    return load_dataset(str(folder), folder.parent, DataOptions(**options), class_names)


def contents(*splits: Split) -> list[tuple[bytes, int]]:
    """The images of the splits with their labels, sorted."""
    rows = [row for split in splits for row in zip(split.images[:], split.labels, strict=True)]
    return sorted((image.numpy().tobytes(), int(label)) for image, label in rows)


def expected(*seeds_and_labels: tuple[range, int]) -> list[tuple[bytes, int]]:
    return sorted((noise(seed, channels=1).tobytes(), label) for seeds, label in seeds_and_labels for seed in seeds)


def cache_of(pets: Path) -> Path:
    (path,) = (pets.parent / "cache").glob("*.u8")
    return path


def in_cache(pets: Path) -> list[str]:
    """What the cache folder contains besides its lock."""
    return [path.suffix for path in (pets.parent / "cache").iterdir() if path.name != ".lock"]


# --- what is in a dataset


def test_gray_images_of_the_right_size_are_unchanged(digits: ImageData, tmp_path: Path) -> None:
    some = digits.train.take(slice(0, 300))
    for index, (image, label) in enumerate(zip(some.images[:], some.labels.tolist(), strict=True)):
        (tmp_path / "digits" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(tmp_path / "digits" / str(label) / f"{index}.png")
    data = load(tmp_path / "digits")
    assert contents(data.train, data.test) == contents(some)
    assert (data.name, data.class_names, data.skipped) == ("digits", tuple("0123456789"), ())
    assert data.train.images.shape[1:] == (28, 28)


def test_classes_are_split_reproducibly_and_added_images_move_hardly_any_other(pets: Path) -> None:
    data, again = load(pets), load(pets)
    assert contents(data.train, data.test) == expected((range(20), 0), (range(100, 110), 1))
    assert data.test.labels.bincount().tolist() == [4, 2]
    assert torch.equal(data.train.images[:], again.train.images[:])
    assert torch.equal(data.test.images[:], again.test.images[:])
    assert load(pets, test_fraction=0.5).test.labels.bincount().tolist() == [10, 5]
    write_images(pets / "cat", 3, first=700)
    former, more = set(contents(data.test)), load(pets)
    assert len(former & set(contents(more.train))) <= 1
    everything = load(pets, test_fraction=1)
    assert (len(everything.train), len(everything.test)) == (0, 33)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
def test_every_class_with_two_images_is_trained_and_tested_on(pets: Path, fraction: float) -> None:
    write_images(pets / "one", 1, first=200)
    write_images(pets / "two", 2, first=300)
    data = load(pets, test_fraction=fraction)
    assert data.train.labels.bincount(minlength=4).min() >= 1
    assert data.test.labels.bincount(minlength=4)[[0, 1, 3]].min() >= 1
    assert data.train.labels.bincount()[2:].tolist() == [1, 1]
    assert "no test images: one" in data.notes[0]


@pytest.mark.parametrize("test_part", ["test", "val"])
def test_the_split_of_a_folder_is_kept(pets: Path, tmp_path: Path, test_part: str) -> None:
    write_images(tmp_path / "split" / test_part / "dog", 3, first=200)
    write_images(tmp_path / "split" / "extra" / "dog", 1)
    pets.rename(tmp_path / "split" / "train")
    data = load(tmp_path / "split")
    assert contents(data.train) == expected((range(20), 0), (range(100, 110), 1))
    assert contents(data.test) == expected((range(200, 203), 1))
    assert data.validation is None
    assert data.notes == ("cat 20, dog 13; no test images: cat", f"ignored next to train/, {test_part}/: extra")
    with pytest.raises(ConfigError, match=r"--test-fraction 0.3: .*split has its own test split\. Omit the flag"):
        load(tmp_path / "split", test_fraction=0.3)


def test_splits_without_train_are_not_classes(pets: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "split" / "val" / "dog", 3, first=200)
    pets.rename(tmp_path / "split" / "test")
    with pytest.raises(ConfigError, match=r"there is test/, val/, but no train/\. Add it, or .*--dataset \S+/test$"):
        load(tmp_path / "split")


def test_links_are_followed_and_a_note_names_those_out_of_the_folder(pets: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere" / "deep", 3, first=200)
    (pets / "bird").symlink_to(tmp_path / "elsewhere")
    data = load(pets)
    assert data.class_names == ("bird", "cat", "dog")
    assert contents(data.train, data.test) == expected((range(200, 203), 0), (range(20), 1), (range(100, 110), 2))
    assert "followed links that lead out of the folder: bird" in data.notes


def test_linked_images_are_read_once(pets: Path) -> None:
    (pets / "ant").symlink_to(pets / "dog")  # sorted before its target
    with pytest.raises(ConfigError, match=r"ant/ contains no images, only skipped files: link to a file or folder"):
        load(pets)
    (pets / "ant").unlink()
    write_images(pets / "ant", 2, first=300)
    (pets / "ant" / "more").symlink_to(pets / "dog")
    (pets / "ant" / "again.png").symlink_to(pets / "cat" / "0000.png")
    (pets / "cat" / "circle").symlink_to(pets)
    data = load(pets)
    assert contents(data.train, data.test) == expected((range(300, 302), 0), (range(20), 1), (range(100, 110), 2))
    skipped = dict(data.skipped)
    assert skipped["ant/again.png"] == skipped["ant/more"] == "link to a file or folder already read"


def test_of_three_splits_val_is_the_validation_split(pets: Path, tmp_path: Path) -> None:
    for part, first in (("val", 200), ("test", 300)):
        write_images(tmp_path / "split" / part / "cat", 2, first=first)
        write_images(tmp_path / "split" / part / "dog", 3, first=first + 50)
    pets.rename(tmp_path / "split" / "train")
    data = load(tmp_path / "split", limit_train_images=25)
    assert data.validation is not None
    assert contents(data.validation) == expected((range(200, 202), 0), (range(250, 253), 1))
    assert contents(data.test) == expected((range(300, 302), 0), (range(350, 353), 1))
    assert len(data.train) == 25
    with pytest.raises(ConfigError, match=r"--validation-size 5: .*split has its own val/\. Omit the flag"):
        load(tmp_path / "split", validation_size=5)


def test_limited_splits_have_images_of_all_classes(pets: Path) -> None:
    data = load(pets, limit_train_images=10, limit_test_images=4, validation_size=8)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 8, 4)
    for part in (data.train, data.validation, data.test):
        assert set(part.labels.tolist()) == {0, 1}
    assert len(set(contents(data.train, data.validation, data.test))) == 22
    with pytest.raises(ConfigError, match="--validation-size 24: leaves none of the 24 training images of pets"):
        load(pets, validation_size=24)


def test_images_may_be_nested_and_of_any_size(pets: Path) -> None:
    (pets / "cat" / "a" / "b").mkdir(parents=True)
    picture = Image.fromarray(noise(1, 90, 50, channels=1))
    picture.save(pets / "cat" / "a" / "b" / "deep.bmp")
    data = load(pets)
    assert (fit_image(picture, Form(28, False)).tobytes(), 0) in contents(data.train, data.test)
    assert len(data.train) + len(data.test) == 31


# --- color and size


def test_one_color_image_makes_the_data_set_color(pets: Path) -> None:
    Image.fromarray(noise(5)).save(pets / "dog" / "red.png")
    data = load(pets)
    assert data.train.images.shape == (len(data.train), 64, 64, 3)
    gray = fit_image(read_image(pets / "cat" / "0000.png"), Form(64, True))
    assert (gray.tobytes(), 0) in contents(data.train, data.test)
    assert load(pets, image_size=32).test.images.shape[1:] == (32, 32, 3)


def test_gray_images_stored_in_color_count_as_gray(pets: Path) -> None:
    for path in pets.rglob("*.png"):
        mode = ("RGB", "RGBA", "LA", "P", "1")[int(path.stem) % 5]
        Image.open(path).convert(mode).save(path)
    assert load(pets).train.images.shape[1:] == (28, 28)
    assert load(pets, image_size=20).train.images.shape[1:] == (20, 20)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 64), (64, 200)])
def test_images_of_the_right_size_are_cropped_only(width: int, height: int) -> None:
    pixels = noise(1, height, width)
    left, top = (width - 64) // 2, (height - 64) // 2
    assert np.array_equal(fit_image(Image.fromarray(pixels), Form(64, True)), pixels[top : top + 64, left : left + 64])


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1, 1), (5, 3000), (3000, 5), (28, 29), (1001, 999)])
def test_any_size_fits(size: tuple[int, int], fit: str) -> None:
    for color, mode, value in ((False, "L", 77), (True, "RGB", (10, 200, 77))):
        fitted = fit_image(Image.new(mode, size, value), Form(28, color, fit))
        assert fitted.shape == ((28, 28, 3) if color else (28, 28))
        assert fitted.dtype == np.uint8
        assert np.array_equal(fitted.reshape(784, -1), np.broadcast_to(value, (784, 3 if color else 1)))


@pytest.mark.parametrize(("width", "height"), [(64, 31), (31, 64), (64, 1), (64, 64)])
def test_padding_keeps_all_of_an_image_in_the_middle_and_repeats_its_edges(width: int, height: int) -> None:
    pixels = noise(1, height, width)
    left, top = (64 - width) // 2, (64 - height) // 2
    fitted = fit_image(Image.fromarray(pixels), Form(64, True, "pad"))
    rows, columns = ((np.arange(64) - first).clip(0, side - 1) for first, side in ((top, height), (left, width)))
    assert np.array_equal(fitted, pixels[rows][:, columns])


@pytest.mark.parametrize("size", [(640, 480), (33, 100), (1001, 999)])
def test_padding_and_cropping_keep_the_proportions(size: tuple[int, int]) -> None:
    """A disc stays one: as wide as it is high."""
    picture = Image.new("L", size)
    (width, height), radius = size, min(size) * 0.45
    ImageDraw.Draw(picture).ellipse(
        (width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius), fill=255
    )
    for fit, share in (("crop", 0.9), ("pad", 0.9 * min(size) / max(size))):
        inside = fit_image(picture, Form(64, False, fit)) > 127
        assert [np.ptp(np.flatnonzero(inside.any(axis=axis))) + 1 for axis in (0, 1)] == pytest.approx(
            [64 * share] * 2, abs=3
        )


def test_padded_and_cropped_images_have_caches_of_their_own(pets: Path) -> None:
    Image.fromarray(noise(7, 28, 14, channels=1)).save(pets / "cat" / "high.png")
    cropped, padded = load(pets), load(pets, fit="pad")
    assert len(list((pets.parent / "cache").glob("*.u8"))) == 2
    assert cropped.checksum != padded.checksum
    assert (cropped.preparation, padded.preparation) == ("crop", "pad")
    assert load(pets).checksum == cropped.checksum


def test_shrinking_antialiases() -> None:
    checkers = np.indices((640, 640)).sum(axis=0) % 2 * 255
    fitted = fit_image(Image.fromarray(checkers.astype(np.uint8)), Form(64, False))
    assert np.abs(fitted.astype(int) - 127).max() <= 2


@pytest.mark.parametrize(("side", "size"), [(16, 28), (28, 28), (32, 28), (40, 64), (64, 64), (300, 64)])
def test_only_small_gray_images_become_28_pixels(side: int, size: int, tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "pets" / name, 3, first=10 * number, side=side)
    Image.fromarray(noise(99, 500, 500, channels=1)).save(tmp_path / "pets" / "dog" / "large.png")  # an outlier
    assert load(tmp_path / "pets").train.images.shape[1:] == (size, size)


# --- more than 8 bits


def write_wide(folder: Path, values: NDArray[np.uint16]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        Image.fromarray(values + np.uint16(number)).save(folder / f"{number}.png")


@pytest.mark.parametrize(
    ("dim", "bright", "shades", "scale"),
    [(1000, 60_000, [233, 4], "65,535"), (100, 1000, [250, 25], "1,023")],
)
def test_wide_images_share_one_scale_named_in_a_note(
    dim: int, bright: int, shades: list[int], scale: str, tmp_path: Path
) -> None:
    write_wide(tmp_path / "wide" / "dim", np.full((28, 28), dim, np.uint16))
    write_wide(tmp_path / "wide" / "bright", np.full((28, 28), bright, np.uint16))
    data = load(tmp_path / "wide")
    assert data.class_names == ("bright", "dim")
    images = torch.cat([split.images[:].float() for split in (data.train, data.test)])
    labels = torch.cat([data.train.labels, data.test.labels])
    assert [float(images[labels == label].median()) for label in (0, 1)] == shades
    assert f"more than 8 bits per pixel: 0 maps to black, {scale} to white" in data.notes


def test_a_hot_pixel_does_not_change_the_scale(tmp_path: Path) -> None:
    hot = np.full((40, 40), 500, np.uint16)
    write_wide(tmp_path / "data" / "plain", hot.copy())
    hot[3, 4] = 65_000
    write_wide(tmp_path / "data" / "hot", hot)
    data = load(tmp_path / "data")
    assert "more than 8 bits per pixel: 0 maps to black, 1,023 to white" in data.notes
    assert data.train.images[:].float().median() == pytest.approx(500 / 1023 * 255, abs=1)


# --- dirty folders


def test_invalid_files_are_skipped_with_reasons_and_odd_ones_are_read(pets: Path) -> None:
    write_images(pets / "dog", 60, first=110)
    cat, whole = pets / "cat", png(Image.fromarray(noise(400, channels=1)))
    bad = {
        "cut.png": (whole[:200], "the image is broken or cut off"),
        "empty.jpg": (b"", "an empty file"),
        "text.jpg": (b"not an image at all", "not an image"),
        "text.webp": (b"no picture " * 200, "not an image"),
        "bomb.png": (png_claiming(20_000, 20_000), "too large"),
        "large.png": (png_claiming(10_000, 9_500), "10000 x 9500 is too large"),
    }
    for name, (content, _) in bad.items():
        (cat / name).write_bytes(content)
    (cat / "nothing.png").symlink_to(cat / "missing.png")
    (cat / ".hidden.png").write_bytes(whole)
    (cat / "Thumbs.db").write_bytes(b"thumbs")
    (cat / "notes.txt").write_text("my cats")
    (pets / "__MACOSX" / "cat").mkdir(parents=True)
    (pets / "README").write_text("pets")
    (pets / "stray.png").write_bytes(whole)
    (cat / "circle").symlink_to(pets / "cat")
    (cat / "linked.png").symlink_to(pets / "dog" / "0100.png")
    # odd, but images
    (cat / "really.jpg").write_bytes(whole)
    (cat / "CMYK.JPG").write_bytes(saved(Image.new("CMYK", (28, 28), (0, 0, 0, 100)), "JPEG"))
    see_through = Image.new("P", (28, 28))
    see_through.putpalette([0, 0, 0, 9, 9, 9])
    (cat / "palette.gif").write_bytes(saved(see_through, "GIF", transparency=0))
    (cat / "deep.png").write_bytes(png(Image.fromarray(noise(401, channels=1).astype(np.uint16) * 257)))

    data = load(pets)
    reasons = dict(data.skipped)
    for name, (_, reason) in bad.items():
        assert reasons.pop(f"cat/{name}").startswith(reason)
    assert reasons == {
        "cat/nothing.png": "no such file",
        "cat/.hidden.png": "hidden",
        "cat/Thumbs.db": "system file",
        "cat/notes.txt": "no image file extension",
        "__MACOSX": "system file",
        "README": "not in a class folder",
        "stray.png": "not in a class folder",
        "cat/circle": "link to a file or folder already read",
        "cat/linked.png": "link to a file or folder already read",
    }
    assert len(data.skipped) == 15
    (note,) = (note for note in data.notes if "skipped" in note)
    assert note.startswith("15 of 109 files skipped: ")
    for part in ("link to a file or folder already read (2)", "not an image (2)", "too large (2)", "an empty file (1)"):
        assert part in note
    kept = contents(data.train, data.test)
    odd = [noise(400, channels=1), noise(401, channels=1), np.full((28, 28), 255, np.uint8)]
    for image in odd:
        assert (image.tobytes(), 0) in kept
    assert len(kept) == 20 + 70 + 4
    assert [it for it in kept if it[1] == 1] == expected((range(100, 170), 1))


def test_over_one_broken_file_in_ten_is_an_error_with_reasons(pets: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (pets / "cat" / name).write_bytes(b"")
    for number in range(50):
        (pets / "cat" / f"{number}.txt").write_text("not an image, and not named like one")
    assert len(load(pets).skipped) == 53  # 3 of 33
    (pets / "dog" / "cut.png").write_bytes(png(Image.fromarray(noise(0)))[:99])
    with pytest.raises(UserError, match=r"4 of 34 images \(over 10%\) cannot be read: ") as raised:
        load(pets)
    assert "an empty file (3), the image is broken or cut off (1). Fix or remove them: cat/a.png, " in str(raised.value)
    cache_of(pets)  # of the folder as it was


def test_a_class_without_a_readable_image_is_an_error(pets: Path) -> None:
    (pets / "eel").mkdir()
    with pytest.raises(ConfigError, match=r"eel/ contains no images\. "):
        load(pets)
    (pets / "eel" / "notes.txt").write_text("slippery")
    with pytest.raises(
        ConfigError, match=r"eel/ contains no images, only skipped files: no image file extension \(1\)"
    ):
        load(pets)
    (pets / "eel" / "eel.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image of class eel can be read: an empty file \(1\)"):
        load(pets)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no such folder"),
        ({".": 0}, "contains no folders. Make one folder per class"),
        ({".": 2}, "contains no folders. Make one folder per class"),
        ({"cat": 2}, "only one class, cat"),
        ({"train/cat": 2}, "data/train"),
        ({"train/cat": 2, "train/dog": 2, "test/cat": 2, "test/eel": 2}, "test/ has classes that train/ lacks: eel"),
        ({"train/cat": 2, "train/dog": 2, "test": 0}, "test/ has no class folders"),
        ({"cat": 1, "dog": 1}, "no class has two images"),
    ],
)
def test_folders_that_are_not_data_sets_are_refused(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    for index, (folder, count) in enumerate(counts.items()):
        write_images(tmp_path / "data" / folder, count, first=100 * index)
    with pytest.raises(ConfigError) as raised:
        load(tmp_path / "data")
    assert str(raised.value).startswith(f"--dataset {tmp_path / 'data'}: ")
    assert message in str(raised.value)


def test_a_file_is_not_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="data: a file, not a folder with one folder per class"):
        load(tmp_path / "data")


@pytest.mark.parametrize("is_split", [True, False])
def test_duplicates_of_training_images_in_the_test_split_are_counted(
    pets: Path, tmp_path: Path, is_split: bool
) -> None:
    folder = pets
    if is_split:
        folder = tmp_path / "split"
        write_images(folder / "test" / "cat", 3, first=18)  # 18 and 19 are among the cats
        write_images(folder / "test" / "dog", 3, first=300)
        pets.rename(folder / "train")
    else:
        for path in (pets / "cat").glob("*.png"):  # the same image in another format
            Image.open(path).save(path.with_suffix(".bmp"))
    data = load(folder)
    (note,) = (note for note in data.notes if "duplicates" in note)
    seen = {image for image, _ in contents(data.train)}
    count = sum(image in seen for image, _ in contents(data.test))
    assert note.startswith(f"{count} of {len(data.test)} test images are duplicates of training images and inflate")
    assert count == 2 if is_split else count > 0
    assert re.search(r": (test/)?cat/(\d+)\.(png|bmp) is (train/)?cat/\2\.(png|bmp)", note)


def test_names_that_are_not_utf_8_are_escaped(pets: Path) -> None:
    write_images(pets / os.fsdecode(b"b\xffd"), 9, first=300)
    (pets / "cat" / os.fsdecode(b"x\xff\n.png")).write_bytes(b"")
    data = load(pets)
    assert data.class_names[0] == "b\\udcffd"
    assert data.skipped == (("cat/x\\udcff\\n.png", "an empty file"),)
    "".join(data.notes).encode()
    assert contents(data.train) == contents(load(pets).train)


# --- the cache


def test_a_folder_is_decoded_once(
    pets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (pets / "cat" / "empty.png").write_bytes(b"")
    first = load(pets)
    assert (
        capsys.readouterr().out == f"Decoding 31 images of pets at 28 x 28 in gray into {cache_of(pets)} (1 MiB) ...\n"
    )
    monkeypatch.setattr(cache, "_build", lambda *_: pytest.fail("decoded again"))
    again = load(pets)
    assert contents(again.train, again.test) == contents(first.train, first.test)
    assert torch.equal(again.train.images[:], first.train.images[:])
    assert (again.notes, again.skipped, again.checksum) == (first.notes, first.skipped, first.checksum)
    load(pets, test_fraction=0.4, limit_train_images=3)  # the cache does not depend on the split
    (pets.parent / "link").symlink_to(pets)
    assert load(pets.parent / "link").name == "pets"


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("change", lambda pets: write_images(pets / "dog", 1, first=109, side=30)),
        ("touch", lambda pets: os.utime(pets / "dog" / "0109.png", ns=(0, 1))),
        ("add", lambda pets: write_images(pets / "dog", 1, first=500)),
        ("remove", lambda pets: (pets / "dog" / "0109.png").unlink()),
        ("rename", lambda pets: (pets / "dog" / "0109.png").rename(pets / "cat" / "0109.png")),
    ],
)
def test_a_change_in_the_folder_replaces_the_cache(pets: Path, name: str, act: Callable[[Path], None]) -> None:
    before = load(pets)
    small = load(pets, image_size=8)
    (pets.parent / "cache" / "other-0-0.u8").write_bytes(b"another's")
    old = set((pets.parent / "cache").glob("*.u8"))
    act(pets)
    after = load(pets)
    fresh = load_dataset(str(pets), pets.parent / "fresh")
    assert contents(after.train, after.test) == contents(fresh.train, fresh.test)
    assert (after.checksum == before.checksum) == (name == "touch")
    now = set((pets.parent / "cache").glob("*.u8"))
    assert len(now) == len(old) == 3  # caches of another size or folder stay
    assert len(now - old) == 1
    assert len(contents(before.train, before.test)) == len(contents(small.train, small.test)) == 30  # still mapped


def test_the_checksum_depends_on_images_classes_and_split(pets: Path) -> None:
    checksum = load(pets).checksum
    assert load(pets, limit_train_images=3).checksum == checksum
    assert load(pets, test_fraction=0.5).checksum != checksum
    (pets / "dog").rename(pets / "hound")
    assert load(pets).checksum != checksum


def test_changed_pixels_in_the_cache_are_an_error_when_read(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(pets)
    content = bytearray(cache_of(pets).read_bytes())
    content[7 * 784 + 5] ^= 1
    cache_of(pets).write_bytes(content)
    for mapped_bytes in (0, 1 << 20):
        monkeypatch.setattr(MappedImages, "MAPPED", mapped_bytes)
        data = load(pets)
        split = data.train if 7 in data.train.images.file_indices else data.test  # type: ignore[union-attr]
        (index,) = (split.images.file_indices == 7).nonzero()[0].tolist()  # type: ignore[union-attr]
        others = torch.tensor([it for it in range(len(split)) if it != index])
        for _ in range(2):
            assert len(split.images[others]) == len(split) - 1
            with pytest.raises(UserError, match="image 7 does not match its checksum: the file was changed or the"):
                split.images[:]


def with_text(text: bytes) -> Callable[[bytes], bytes]:
    """The same pixels with another header."""

    def replace(content: bytes) -> bytes:
        length = FOOTER.unpack(content[-FOOTER.size :])[0]
        return content[: -FOOTER.size - length] + text + FOOTER.pack(len(text), MAGIC)

    return replace


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-40] + b"\x8b" + content[-39:],
        with_text(b"[" * 100_000),
        with_text(b'{"shape": [30, 28, 28], "broken": {}}'),
        with_text(b'{"shape": [30, 784, 1], "broken": {}, "scale": null}'),
        with_text(b'{"shape": [-30, -28, 28], "broken": {}, "scale": null}'),
        with_text(b'{"shape": ["30", 28, 28], "broken": {}, "scale": null}'),
        with_text(b'{"shape": [30, 28, 28], "broken": 5, "scale": null}'),
        with_text(b'{"shape": [30, 28, 28], "broken": {}, "scale": ["x", 1]}'),
        lambda content: content[784:],
        *(lambda content, keep=keep: content[:keep] for keep in (0, 5, 1000, -1, -20)),
        None,
    ],
)
def test_an_invalid_cache_is_replaced(pets: Path, damage: Callable[[bytes], bytes] | None) -> None:
    before = load(pets)
    path = cache_of(pets)
    whole = path.read_bytes()
    path.unlink()
    if damage is None:
        os.mkfifo(path)
    else:
        path.write_bytes(damage(whole))
    after = load(pets)
    assert after.checksum == before.checksum
    assert contents(after.train) == contents(before.train)
    assert path.read_bytes() == whole


def test_a_folder_in_place_of_a_cache_is_an_error(pets: Path) -> None:
    load(pets)
    path = cache_of(pets)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"\.u8: a folder, not a file of decoded images\. Remove it"):
        load(pets)


def test_missing_disk_space_is_an_error_before_anything_is_written(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(pets)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 << 20))
    message = "the 30 images of pets at 28 x 28 need 1 MiB plus 64 MiB to spare, but only 10 MiB are free"
    with pytest.raises(UserError, match=message):
        load(pets)
    assert in_cache(pets) == []


def test_a_full_disk_leaves_nothing_behind(pets: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write: File too large"):
            load(pets)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert in_cache(pets) == []


def test_a_read_only_folder_is_an_error_unless_it_has_the_cache(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pets.parent / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"the decoded images of pets\. Choose a writable folder: --data-dir"):
        load_dataset(str(pets), pets.parent / "file")
    load(pets)
    monkeypatch.setattr(cache, "FileLock", None)
    load(pets)  # without a lock, which a read-only folder does not have


# --- processes


BUILD = """
import sys
if __name__ == "__main__":
    from mnist.data.datasets import load_dataset
    data = load_dataset(sys.argv[1], sys.argv[2])
    print(data.checksum, int(data.train.images[:].sum()), len(data.test))
"""


def python(folder: Path, script: str, *arguments: Path) -> "subprocess.Popen[str]":
    """A separate process, from a file because its workers import the main module."""
    path = folder / "script.py"
    path.write_text(script)
    return subprocess.Popen(
        [sys.executable, str(path), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(PROJECT_FOLDER)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images that take a second to decode."""
    folder = tmp_path_factory.mktemp("folders") / "slow"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(noise(len(name), 75, 100)).resize((800, 600)).save(folder / name / "0.jpg")
        for number in range(1, 100):
            shutil.copy(folder / name / "0.jpg", folder / name / f"{number}.jpg")
    return folder


def test_two_simultaneous_jobs_decode_once(slow: Path, tmp_path: Path) -> None:
    jobs = [python(tmp_path, BUILD, slow, tmp_path) for _ in range(2)]
    outputs = [job.communicate(timeout=100)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert sum("Decoding 200 images of slow at 64 x 64 in color" in output for output in outputs) == 1
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert len(list((tmp_path / "cache").glob("*.u8"))) == 1


def test_waiting_for_another_job_prints_a_line(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pets.parent / "cache").mkdir()
    holder = python(
        pets.parent,
        "import sys, time\nfrom filelock import FileLock\n"
        "with FileLock(sys.argv[2] + '/.lock'):\n    print('locked', flush=True)\n    time.sleep(2)\n",
        pets,
        pets.parent / "cache",
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    load(pets)
    assert capsys.readouterr().out.startswith(f"Waiting for another process to decode images into {pets.parent}")
    holder.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_job_leaves_no_cache_and_no_workers(
    slow: Path, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    hear = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    builder = python(tmp_path, hear + BUILD, slow, cache.parent)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in cache.glob(".*.new.*")):
        assert builder.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = children(builder.pid)
    assert bool(workers) == (available_cores() > 1)
    builder.send_signal(number)
    output = builder.communicate(timeout=60)[0]
    assert builder.returncode != 0, output
    assert list(cache.glob("*.u8")) == []
    assert len(list(cache.glob(".*.new.*"))) == (0 if number == signal.SIGINT else 1)
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    data = load_dataset(str(slow), cache.parent)
    assert "Decoding 200 images" in capsys.readouterr().out
    assert len(data.train) + len(data.test) == 200
    assert in_cache(tmp_path / "slow") == [".u8"]


def children(process: int) -> list[int]:
    return [int(it) for it in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_decoding_does_not_import_torch() -> None:
    script = "import sys, mnist.data.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=PROJECT_FOLDER, check=False).returncode == 0


# --- images in a file


@pytest.mark.parametrize("mapped_bytes", [0, 1 << 20])
@pytest.mark.parametrize("shape", [(50, 5, 4), (50, 6, 7, 3)])
def test_mapped_images_index_like_tensors(
    tmp_path: Path, shape: tuple[int, ...], mapped_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedImages, "MAPPED", mapped_bytes)
    array = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    (tmp_path / "images.u8").write_bytes(array.numpy().tobytes() + b"more")
    images = MappedImages(tmp_path / "images.u8", shape)
    (tmp_path / "images.u8").unlink()  # as when a newer cache replaces it
    assert (images.shape, len(images)) == (array.shape, 50)
    order = torch.randperm(50)
    part, some = images.at(order), array[order]
    cut, rest = part.at(slice(10, 40)), some[10:40]
    twice, twice_ = cut.at(torch.tensor([3, 1, 1])), rest[torch.tensor([3, 1, 1])]
    for mapped, tensor in ((images, array), (part, some), (cut, rest), (twice, twice_)):
        assert mapped.shape == tensor.shape
        two = torch.arange(6).view(2, 3) % len(tensor)
        for index in (0, -1, slice(None), slice(1, None), slice(0, 0), slice(-2, None), two, two[0], two[:0]):
            assert torch.equal(mapped[index], tensor[index])
        with pytest.raises(IndexError):
            mapped[len(tensor)]
    images[0].zero_()  # a copy
    assert torch.equal(images[0], array[0])


def test_batches_of_mapped_images_equal_those_of_images_in_memory(pets: Path) -> None:
    data = load(pets)
    in_memory = Split(data.train.images[:], data.train.labels)
    assert isinstance(data.train.images, MappedImages)
    for batch_size, training in ((5, Training(seed=3)), (7, None)):
        ours, theirs = (build_loader(split, batch_size, training=training) for split in (data.train, in_memory))
        for batch, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    assert isinstance(evaluation_splits(data, 0)["train"].images, MappedImages)


def test_a_file_truncated_while_in_use_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MappedImages, "MAPPED", 0)
    (tmp_path / "images.u8").write_bytes(bytes(200))
    images = MappedImages(tmp_path / "images.u8", (2, 10, 10))
    os.truncate(tmp_path / "images.u8", 150)
    assert not images[0].any()
    with pytest.raises(UserError, match=r"images\.u8: truncated while in use"):
        images[:]


@pytest.mark.slow
def test_reading_a_large_file_needs_little_memory(tmp_path: Path) -> None:
    size = 600 << 20
    with (tmp_path / "images.u8").open("wb") as file:
        for _ in range(size >> 20):
            file.write(bytes(range(256)) * 4096)
    script = """
import resource, sys, torch
from pathlib import Path
from mnist.data.splits import MappedImages
count = (600 << 20) // 12288
images = MappedImages(Path(sys.argv[1]), (count, 64, 64, 3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
half = count // 2
total = sum(int(images[indices].sum()) for indices in torch.randperm(half).split(64))
total += sum(int(images[start : min(start + 64, count)].sum()) for start in range(half, count, 64))
assert total == 127.5 * (600 << 20), total
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    job = python(tmp_path, script, tmp_path / "images.u8")
    output = job.communicate(timeout=100)[0]
    assert job.returncode == 0, output
    assert int(output) < 100, output  # MiB
