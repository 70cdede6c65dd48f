"""A person's folder of pictures as a data set: what is found, what is refused, and the file it is decoded into."""

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
from PIL import Image

from mnist.config.settings import PROJECT_FOLDER, DataOptions
from mnist.data import cache
from mnist.data.cache import FOOTER, MAGIC
from mnist.data.datasets import load_dataset
from mnist.data.images import fit_image, read_image
from mnist.data.loader import Training, build_loader, evaluation_splits
from mnist.data.splits import ImageData, MappedImages, Split
from mnist.errors import ConfigError, UserError
from mnist.launch.hardware import available_cores
from tests.data.test_images import png, png_claiming, saved

Pixels = NDArray[np.uint8]


def noise(seed: int, height: int = 28, width: int = 28, channels: int = 3) -> Pixels:
    """A picture unlike any other; with one channel it is grey."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder: Path, count: int, *, first: int = 0, channels: int = 1, side: int = 28) -> None:
    """PNGs called 0000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.fromarray(noise(number, side, side, channels)).save(folder / f"{number:04}.png")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """20 grey cats and 10 grey dogs."""
    write_images(tmp_path / "pets" / "cat", 20)
    write_images(tmp_path / "pets" / "dog", 10, first=100)
    return tmp_path / "pets"


def load(folder: Path, class_names: tuple[str, ...] | None = None, **options: Any) -> ImageData:
    return load_dataset(str(folder), folder.parent, DataOptions(**options), class_names)


def contents(*splits: Split | None) -> list[tuple[bytes, int]]:
    """The images of the splits with their labels, in an order that depends on nothing else."""
    pairs = [
        (image.numpy().tobytes(), int(label))
        for split in splits
        if split is not None
        for image, label in zip(split.images[:], split.labels, strict=True)
    ]
    return sorted(pairs)


def expected(*numbers_and_labels: tuple[range, int]) -> list[tuple[bytes, int]]:
    return sorted((noise(number, channels=1).tobytes(), label) for them, label in numbers_and_labels for number in them)


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "_build", refuse)


# --- what is in a data set


def test_grey_images_of_the_right_size_come_out_as_they_went_in(digits: ImageData, tmp_path: Path) -> None:
    images, labels = digits.train.images[:300].numpy(), digits.train.labels[:300].tolist()
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "digits" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "digits" / str(label) / f"{place}.png")
    data = load(tmp_path / "digits")
    assert contents(data.train, data.test) == sorted(
        (image.tobytes(), label) for image, label in zip(images, labels, strict=True)
    )
    assert (data.name, data.class_names, data.skipped) == ("digits", tuple("0123456789"), ())
    assert data.train.images.shape[1:] == (28, 28)


def test_a_folder_of_classes_is_split_by_class_always_alike_and_what_is_added_moves_next_to_none(pets: Path) -> None:
    data, again = load(pets), load(pets)
    assert contents(data.train, data.test) == expected((range(20), 0), (range(100, 110), 1))
    assert data.test.labels.bincount().tolist() == [4, 2]
    assert torch.equal(data.train.images[:], again.train.images[:])
    assert torch.equal(data.test.images[:], again.test.images[:])
    assert load(pets, test_fraction=0.5).test.labels.bincount().tolist() == [10, 5]
    write_images(pets / "cat", 3, first=700)
    former, more = set(contents(data.test)), load(pets)
    assert len(former & set(contents(more.train))) <= 1  # a fifth of 23 is 5: one more than before, perhaps another
    everything = load(pets, test_fraction=1)
    assert (len(everything.train), len(everything.test)) == (0, 33)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
def test_every_class_is_trained_on_and_tested_on_however_few_its_images_are(pets: Path, fraction: float) -> None:
    write_images(pets / "one", 1, first=200)
    write_images(pets / "two", 2, first=300)
    data = load(pets, test_fraction=fraction)
    assert data.train.labels.bincount(minlength=4).min() >= 1
    assert data.test.labels.bincount(minlength=4)[[0, 1, 3]].min() >= 1
    assert data.train.labels.bincount()[2:].tolist() == [1, 1]
    assert "none to test on: one" in data.notes[0]


@pytest.mark.parametrize("test_part", ["test", "val"])
def test_a_folder_that_is_split_stays_split(pets: Path, tmp_path: Path, test_part: str) -> None:
    write_images(tmp_path / "split" / test_part / "dog", 3, first=200)
    write_images(tmp_path / "split" / "extra" / "dog", 1)
    pets.rename(tmp_path / "split" / "train")
    data = load(tmp_path / "split")
    assert contents(data.train) == expected((range(20), 0), (range(100, 110), 1))
    assert contents(data.test) == expected((range(200, 203), 1))
    assert data.validation is None
    assert data.notes == ("cat 20, dog 13; none to test on: cat", f"beside train/, {test_part}/, not read: extra")
    with pytest.raises(ConfigError, match=r"--test-fraction 0.3: .*split says by its folders what to test on"):
        load(tmp_path / "split", test_fraction=0.3)


@pytest.mark.parametrize("names", [("Train", "TEST"), ("training", "testing"), ("train", "valid")])
def test_parts_may_be_called_otherwise(pets: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    write_images(tmp_path / "split" / names[1] / "dog", 3, first=200)
    pets.rename(tmp_path / "split" / names[0])
    data = load(tmp_path / "split")
    assert (len(data.train), len(data.test), data.class_names) == (30, 3, ("cat", "dog"))


def test_parts_without_those_to_train_on_are_not_taken_for_classes(pets: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "split" / "val" / "dog", 3, first=200)
    pets.rename(tmp_path / "split" / "test")
    with pytest.raises(ConfigError, match=r"test/, val/ is there, but no train/\. Add it; or .*--dataset \S+/test$"):
        load(tmp_path / "split")


def test_links_are_followed_and_a_line_says_which_lead_out_of_the_folder(pets: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere" / "deep", 3, first=200)
    (pets / "bird").symlink_to(tmp_path / "elsewhere")
    data = load(pets)
    assert data.class_names == ("bird", "cat", "dog")
    assert contents(data.train, data.test) == expected((range(200, 203), 0), (range(20), 1), (range(100, 110), 2))
    assert "links that lead out of the folder are followed: bird" in data.notes


def test_each_image_is_read_once_however_many_links_lead_to_it(pets: Path) -> None:
    (pets / "ant").symlink_to(pets / "dog")  # comes before what it leads to
    with pytest.raises(ConfigError, match=r"ant/ holds no image, only what is skipped: a link to what is read already"):
        load(pets)
    (pets / "ant").unlink()
    write_images(pets / "ant", 2, first=300)
    (pets / "ant" / "more").symlink_to(pets / "dog")
    (pets / "ant" / "again.png").symlink_to(pets / "cat" / "0000.png")
    (pets / "cat" / "circle").symlink_to(pets)
    data = load(pets)
    assert contents(data.train, data.test) == expected((range(300, 302), 0), (range(20), 1), (range(100, 110), 2))
    assert (
        dict.fromkeys(("ant/again.png", "ant/more"), "a link to what is read already").items()
        <= dict(data.skipped).items()
    )


def test_with_all_three_parts_val_is_for_choosing(pets: Path, tmp_path: Path) -> None:
    for part, first in (("val", 200), ("test", 300)):
        write_images(tmp_path / "split" / part / "cat", 2, first=first)
        write_images(tmp_path / "split" / part / "dog", 3, first=first + 50)
    pets.rename(tmp_path / "split" / "train")
    data = load(tmp_path / "split", limit_train_images=25)
    assert data.validation is not None
    assert contents(data.validation) == expected((range(200, 202), 0), (range(250, 253), 1))
    assert contents(data.test) == expected((range(300, 302), 0), (range(350, 353), 1))
    assert len(data.train) == 25
    with pytest.raises(ConfigError, match=r"--validation-size 5: .*split has val/, which is used for that"):
        load(tmp_path / "split", validation_size=5)


def test_the_first_images_and_the_last_are_of_all_classes(pets: Path) -> None:
    data = load(pets, limit_train_images=10, limit_test_images=4, validation_size=8)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 8, 4)
    for part in (data.train, data.validation, data.test):
        assert set(part.labels.tolist()) == {0, 1}
    assert len(set(contents(data.train, data.validation, data.test))) == 22
    with pytest.raises(ConfigError, match="--validation-size 24: leaves nothing of the 24 training images of pets"):
        load(pets, validation_size=24)


def test_images_may_lie_deeper_and_be_of_any_size(pets: Path) -> None:
    (pets / "cat" / "a" / "b").mkdir(parents=True)
    picture = Image.fromarray(noise(1, 90, 50, channels=1))
    picture.save(pets / "cat" / "a" / "b" / "deep.bmp")
    data = load(pets)
    assert (fit_image(picture, 28, False).tobytes(), 0) in contents(data.train, data.test)
    assert len(data.train) + len(data.test) == 31


# --- colour and size


def test_one_picture_in_colour_makes_the_data_set_one_in_colour(pets: Path) -> None:
    Image.fromarray(noise(5)).save(pets / "dog" / "red.png")
    data = load(pets)
    assert data.train.images.shape == (len(data.train), 64, 64, 3)
    grey = fit_image(read_image(pets / "cat" / "0000.png"), 64, True)
    assert (grey.tobytes(), 0) in contents(data.train, data.test)
    assert load(pets, image_size=32).test.images.shape[1:] == (32, 32, 3)


def test_what_is_stored_in_colour_but_is_grey_counts_as_grey(pets: Path) -> None:
    for path in pets.rglob("*.png"):
        mode = ("RGB", "RGBA", "LA", "P", "1")[int(path.stem) % 5]
        Image.open(path).convert(mode).save(path)
    assert load(pets).train.images.shape[1:] == (28, 28)
    assert load(pets, image_size=20).train.images.shape[1:] == (20, 20)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 64), (64, 200)])
def test_what_has_the_size_already_is_cut_but_not_changed(width: int, height: int) -> None:
    pixels = noise(1, height, width)
    left, top = (width - 64) // 2, (height - 64) // 2
    assert np.array_equal(fit_image(Image.fromarray(pixels), 64, True), pixels[top : top + 64, left : left + 64])


@pytest.mark.parametrize("size", [(1, 1), (5, 3000), (3000, 5), (28, 29), (1001, 999)])
def test_any_size_fits(size: tuple[int, int]) -> None:
    for colour, mode, value in ((False, "L", 77), (True, "RGB", (10, 200, 77))):
        fitted = fit_image(Image.new(mode, size, value), 28, colour)
        assert fitted.shape == ((28, 28, 3) if colour else (28, 28))
        assert fitted.dtype == np.uint8
        assert np.array_equal(fitted.reshape(784, -1), np.broadcast_to(value, (784, 3 if colour else 1)))


def test_shrinking_averages_rather_than_picks() -> None:
    checkers = np.indices((640, 640)).sum(axis=0) % 2 * 255
    fitted = fit_image(Image.fromarray(checkers.astype(np.uint8)), 64, False)
    assert np.abs(fitted.astype(int) - 127).max() <= 2


@pytest.mark.parametrize(("side", "size"), [(16, 28), (28, 28), (32, 28), (40, 64), (64, 64), (300, 64)])
def test_grey_images_become_28_pixels_only_where_they_are_about_that_small(
    side: int, size: int, tmp_path: Path
) -> None:
    for number, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "pets" / name, 3, first=10 * number, side=side)
    Image.fromarray(noise(99, 500, 500, channels=1)).save(tmp_path / "pets" / "dog" / "large.png")  # an exception
    assert load(tmp_path / "pets").train.images.shape[1:] == (size, size)


# --- more than 8 bits


def write_wide(folder: Path, values: NDArray[np.uint16], count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(values + np.uint16(number)).save(folder / f"{number}.png")


def shades(folder: Path) -> dict[str, float]:
    """The mean of the images of each class."""
    data = load(folder)
    images = torch.cat([split.images[:].float() for split in (data.train, data.test)])
    labels = torch.cat([data.train.labels, data.test.labels])
    return {name: float(images[labels == label].median()) for label, name in enumerate(data.class_names)}


def test_images_of_16_bits_have_one_scale_for_the_data_set_and_a_line_says_which(tmp_path: Path) -> None:
    flat = np.full((28, 28), 1, np.uint16)
    for name, value in (("dim", 1000), ("bright", 60_000)):
        write_wide(tmp_path / "sixteen" / name, flat * np.uint16(value))
    assert shades(tmp_path / "sixteen") == {"dim": 4, "bright": 233}
    assert "more than 8 bits per pixel: 0 becomes black, 65,535 white" in load(tmp_path / "sixteen").notes
    write_wide(tmp_path / "ten" / "dim", flat * np.uint16(100))
    write_wide(tmp_path / "ten" / "bright", flat * np.uint16(1000))
    assert shades(tmp_path / "ten") == {"dim": 25, "bright": 250}


def test_a_hot_pixel_darkens_nothing(tmp_path: Path) -> None:
    hot = np.full((40, 40), 500, np.uint16)
    write_wide(tmp_path / "data" / "plain", hot.copy())
    hot[3, 4] = 65_000
    write_wide(tmp_path / "data" / "hot", hot)
    data = load(tmp_path / "data")
    assert "more than 8 bits per pixel: 0 becomes black, 1,023 white" in data.notes
    assert data.train.images[:].float().median() == pytest.approx(500 / 1023 * 255, abs=1)


# --- dirty folders


def test_dirty_files_are_skipped_with_their_reasons_and_the_others_are_all_there(pets: Path) -> None:
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
        "cat/Thumbs.db": "left by a system",
        "cat/notes.txt": "not called as images are",
        "__MACOSX": "left by a system",
        "README": "in no class's folder",
        "stray.png": "in no class's folder",
        **dict.fromkeys(("cat/circle", "cat/linked.png"), "a link to what is read already"),
    }
    assert len(data.skipped) == 15
    (note,) = (note for note in data.notes if "skipped" in note)
    assert note.startswith("15 of 109 files skipped, listed in skipped.txt: ")
    for part in ("a link to what is read already (2)", "not an image (2)", "too large (2)", "an empty file (1)"):
        assert part in note
    kept = contents(data.train, data.test)
    odd = [noise(400, channels=1), noise(401, channels=1), np.full((28, 28), 255, np.uint8)]
    for image in odd:
        assert (image.tobytes(), 0) in kept
    assert len(kept) == 20 + 70 + 4
    assert [it for it in kept if it[1] == 1] == expected((range(100, 170), 1))


def test_over_one_broken_file_in_ten_is_an_error_with_the_reasons(pets: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (pets / "cat" / name).write_bytes(b"")
    for number in range(50):
        (pets / "cat" / f"{number}.txt").write_text("no image, but nobody says it is")
    assert len(load(pets).skipped) == 53  # 3 of 33
    (pets / "dog" / "cut.png").write_bytes(png(Image.fromarray(noise(0)))[:99])
    with pytest.raises(UserError, match="4 of 34 images cannot be read, over one in ten: ") as raised:
        load(pets)
    assert "an empty file (3), the image is broken or cut off (1). For example cat/a.png, " in str(raised.value)
    assert len(list((pets.parent / "cache").glob("*.u8"))) == 1  # of the folder as it was


def test_a_class_without_a_readable_image_is_an_error(pets: Path) -> None:
    (pets / "eel").mkdir()
    with pytest.raises(ConfigError, match=r"eel/ holds no image\. "):
        load(pets)
    (pets / "eel" / "notes.txt").write_text("slippery")
    with pytest.raises(ConfigError, match=r"eel/ holds no image, only what is skipped: not called as images are \(1\)"):
        load(pets)
    (pets / "eel" / "eel.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image of the class eel can be read: an empty file \(1\)"):
        load(pets)


def make_nothing(_: Path) -> None:
    pass


def make_file(path: Path) -> None:
    path.write_bytes(b"PK")


def make_train_only(path: Path) -> None:
    write_images(path / "train" / "cat", 2)


def make_unknown_class(path: Path) -> None:
    for name in ("train/cat", "train/dog", "test/cat", "test/eel"):
        write_images(path / name, 2)


def make_no_tests(path: Path) -> None:
    for name in ("train/cat", "train/dog"):
        write_images(path / name, 2)
    (path / "test").mkdir()


def make_single_images(path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        write_images(path / name, 1, first=number)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_nothing, "no such folder"),
        (make_file, "a file, where a folder with one folder per class is needed"),
        (Path.mkdir, "holds no folders. Make a folder for each class"),
        (lambda path: write_images(path, 2), "holds no folders. Make a folder for each class"),
        (lambda path: write_images(path / "cat", 2), "one class only, cat"),
        (make_train_only, "data/train"),
        (make_unknown_class, "test/ has classes that train/ lacks: eel"),
        (make_no_tests, "test/ holds no folders of classes"),
        (make_single_images, "no class has two images"),
    ],
)
def test_what_is_no_data_set_is_refused_with_the_way_out(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "data")
    with pytest.raises(ConfigError) as raised:
        load(tmp_path / "data")
    assert str(raised.value).startswith(f"--dataset {tmp_path / 'data'}: ")
    assert message in str(raised.value)


@pytest.mark.parametrize("is_split", [True, False])
def test_test_images_that_are_training_images_too_are_counted(pets: Path, tmp_path: Path, is_split: bool) -> None:
    folder = pets
    if is_split:
        folder = tmp_path / "split"
        write_images(folder / "test" / "cat", 3, first=18)  # 18 and 19 are among the cats
        write_images(folder / "test" / "dog", 3, first=300)
        pets.rename(folder / "train")
    else:
        for path in (pets / "cat").glob("*.png"):  # as another file of another format
            Image.open(path).save(path.with_suffix(".bmp"))
    data = load(folder)
    (note,) = (note for note in data.notes if "training images too" in note)
    seen = {image for image, _ in contents(data.train)}
    count = sum(image in seen for image, _ in contents(data.test))
    assert note.startswith(f"{count} of {len(data.test)} test images are training images too, pixel for pixel, and")
    assert count == 2 if is_split else count > 0
    assert re.search(r": (test/)?cat/(\d+)\.(png|bmp) is (train/)?cat/\2\.(png|bmp)", note)


def test_names_that_are_no_text_are_written_out(pets: Path) -> None:
    (pets / os.fsdecode(b"b\xffd")).mkdir()
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
    (cache,) = (pets.parent / "cache").glob("*.u8")
    assert capsys.readouterr().out == f"Decoding 31 images of pets at 28 x 28 in grey into {cache} (1 MiB) ...\n"
    no_decoding(monkeypatch)
    again = load(pets)
    assert contents(again.train, again.test) == contents(first.train, first.test)
    assert torch.equal(again.train.images[:], first.train.images[:])
    assert (again.notes, again.skipped, again.checksum) == (first.notes, first.skipped, first.checksum)
    load(pets, test_fraction=0.4, limit_train_images=3)  # the split is no part of the cache
    (pets.parent / "link").symlink_to(pets)
    assert load(pets.parent / "link").name == "pets"


def change(pets: Path) -> None:
    write_images(pets / "dog", 1, first=109, side=30)


def touch(pets: Path) -> None:  # the same size
    path = pets / "dog" / "0109.png"
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 1))


def add(pets: Path) -> None:
    write_images(pets / "dog", 1, first=500)


def remove(pets: Path) -> None:
    (pets / "dog" / "0109.png").unlink()


def rename(pets: Path) -> None:
    (pets / "dog" / "0109.png").rename(pets / "cat" / "0109.png")


@pytest.mark.parametrize("act", [change, touch, add, remove, rename])
def test_a_change_in_the_folder_is_noticed_and_the_old_cache_removed(pets: Path, act: Callable[[Path], None]) -> None:
    before = load(pets)
    small = load(pets, image_size=8)
    (pets.parent / "cache" / "other-0-0.u8").write_bytes(b"another's")
    old = set((pets.parent / "cache").glob("*.u8"))
    act(pets)
    after = load(pets)
    fresh = load_dataset(str(pets), pets.parent / "fresh")
    assert contents(after.train, after.test) == contents(fresh.train, fresh.test)
    assert (after.checksum == before.checksum) == (act is touch)
    now = set((pets.parent / "cache").glob("*.u8"))
    assert len(now) == len(old) == 3  # that of another size stays, as does what is not this folder's
    assert len(now - old) == 1
    assert len(contents(before.train, before.test)) == len(contents(small.train, small.test)) == 30  # still mapped


def test_the_checksum_is_of_images_classes_and_split(pets: Path) -> None:
    checksum = load(pets).checksum
    assert load(pets, limit_train_images=3).checksum == checksum
    assert load(pets, test_fraction=0.5).checksum != checksum
    (pets / "dog").rename(pets / "hound")
    assert load(pets).checksum != checksum


def test_pixels_that_changed_in_the_cache_are_an_error_when_they_are_first_read(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(pets)
    (cache,) = (pets.parent / "cache").glob("*.u8")
    content = bytearray(cache.read_bytes())
    content[7 * 784 + 5] ^= 1
    cache.write_bytes(content)
    for mapped_bytes in (0, 1 << 20):
        monkeypatch.setattr(MappedImages, "MAPPED", mapped_bytes)
        data = load(pets)
        split = data.train if 7 in data.train.images.places else data.test  # type: ignore[union-attr]
        (place,) = (split.images.places == 7).nonzero()[0].tolist()  # type: ignore[union-attr]
        others = torch.tensor([it for it in range(len(split)) if it != place])
        for _ in range(2):
            assert len(split.images[others]) == len(split) - 1
            with pytest.raises(UserError, match="image 7 is not what was decoded: the file was changed, or the disk"):
                split.images[:]


def with_text(content: bytes, text: bytes) -> bytes:
    """The same pixels with another text."""
    length = FOOTER.unpack(content[-FOOTER.size :])[0]
    return content[: -FOOTER.size - length] + text + FOOTER.pack(len(text), MAGIC)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-40] + b"\x8b" + content[-39:],
        lambda content: with_text(content, b"[" * 100_000),
        lambda content: with_text(content, b'{"shape": [30, 28, 28], "broken": {}}'),
        lambda content: with_text(content, b'{"shape": [30, 784, 1], "broken": {}, "scale": null}'),
        lambda content: with_text(content, b'{"shape": [-30, -28, 28], "broken": {}, "scale": null}'),
        lambda content: with_text(content, b'{"shape": ["30", 28, 28], "broken": {}, "scale": null}'),
        lambda content: with_text(content, b'{"shape": [30, 28, 28], "broken": 5, "scale": null}'),
        lambda content: with_text(content, b'{"shape": [30, 28, 28], "broken": {}, "scale": ["x", 1]}'),
        lambda content: content[784:],
        lambda content: None,
    ],
)
def test_a_cache_that_is_damaged_or_none_is_made_anew(pets: Path, damage: Callable[[bytes], bytes | None]) -> None:
    before = load(pets)
    (cache,) = (pets.parent / "cache").glob("*.u8")
    whole = cache.read_bytes()
    damaged = damage(whole)
    cache.unlink()
    if damaged is None:
        os.mkfifo(cache)
    else:
        cache.write_bytes(damaged)
    after = load(pets)
    assert after.checksum == before.checksum
    assert contents(after.train) == contents(before.train)
    assert cache.read_bytes() == whole


def test_a_folder_in_the_place_of_a_cache_is_named(pets: Path) -> None:
    load(pets)
    (path,) = (pets.parent / "cache").glob("*.u8")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"\.u8: a folder, where the decoded images are to be\. Remove it"):
        load(pets)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1, -20])
def test_a_cache_that_is_not_whole_is_made_anew(pets: Path, keep: int) -> None:
    before = contents(load(pets).train)
    (cache,) = (pets.parent / "cache").glob("*.u8")
    whole = cache.read_bytes()
    cache.write_bytes(whole[:keep])
    assert contents(load(pets).train) == before
    assert cache.read_bytes() == whole


def test_want_of_room_is_said_before_anything_is_written(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(pets)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 << 20))
    with pytest.raises(
        UserError, match=r"1 MiB are needed for the 30 images of pets at 28 x 28, and 64 MiB to spare; 10 MiB are free"
    ):
        load(pets)
    assert [path.name for path in (pets.parent / "cache").iterdir() if path.name != ".lock"] == []


def test_a_full_disk_leaves_nothing_behind(pets: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write: File too large"):
            load(pets)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (pets.parent / "cache").iterdir() if path.name != ".lock"] == []


def test_a_place_that_cannot_be_written_is_an_error_unless_the_cache_is_there(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pets.parent / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"pets is not decoded there yet\. Name a folder for data that can: --data-dir"):
        load_dataset(str(pets), pets.parent / "file")
    load(pets)
    monkeypatch.setattr(cache, "FileLock", None)
    load(pets)  # without a lock, which a read-only folder does not give


# --- processes


BUILD = """
import sys
if __name__ == "__main__":
    from mnist.data.datasets import load_dataset
    data = load_dataset(sys.argv[1], sys.argv[2])
    print(data.checksum, int(data.train.images[:].sum()), len(data.test))
"""


def python(folder: Path, script: str, *arguments: Path) -> "subprocess.Popen[str]":
    """A process of its own, from a file: those that it starts import what started it."""
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
    """200 pictures that take a second."""
    folder = tmp_path_factory.mktemp("folders") / "slow"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(noise(len(name), 75, 100)).resize((800, 600)).save(folder / name / "0.jpg")
        for number in range(1, 100):
            shutil.copy(folder / name / "0.jpg", folder / name / f"{number}.jpg")
    return folder


def test_two_jobs_at_once_decode_once_and_see_the_same(slow: Path, tmp_path: Path) -> None:
    jobs = [python(tmp_path, BUILD, slow, tmp_path) for _ in range(2)]
    outputs = [job.communicate(timeout=100)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert sum("Decoding 200 images of slow at 64 x 64 in colour" in output for output in outputs) == 1
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert len(list((tmp_path / "cache").glob("*.u8"))) == 1


def test_a_job_that_waits_for_another_says_so(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert capsys.readouterr().out.startswith(f"Waiting for another process, which decodes images into {pets.parent}")
    holder.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_builder_that_is_ended_half_way_leaves_nothing_that_is_used_or_stays(
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
    assert [path.suffix for path in cache.iterdir() if path.name != ".lock"] == [".u8"]


def children(process: int) -> list[int]:
    return [int(it) for it in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_decodes_loads_no_torch() -> None:
    script = "import sys, mnist.data.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=PROJECT_FOLDER, check=False).returncode == 0


# --- images in a file


@pytest.mark.parametrize("mapped_bytes", [0, 1 << 20])
@pytest.mark.parametrize("shape", [(50, 5, 4), (50, 6, 7, 3)])
def test_mapped_images_are_those_of_the_file(
    tmp_path: Path, shape: tuple[int, ...], mapped_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedImages, "MAPPED", mapped_bytes)
    array = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    (tmp_path / "images.u8").write_bytes(array.numpy().tobytes() + b"something behind")
    images = MappedImages(tmp_path / "images.u8", shape)
    (tmp_path / "images.u8").unlink()  # as when a newer one takes its place
    assert (images.shape, images.dim(), len(images)) == (array.shape, array.dim(), 50)
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


def test_batches_of_a_folder_are_those_of_the_same_images_in_memory(pets: Path) -> None:
    data = load(pets)
    in_memory = Split(data.train.images[:], data.train.labels)
    assert isinstance(data.train.images, MappedImages)
    for batch_size, training in ((5, Training(seed=3)), (7, None)):
        ours, theirs = (build_loader(split, batch_size, training=training) for split in (data.train, in_memory))
        for batch, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    assert isinstance(evaluation_splits(data, 0)["train"].images, MappedImages)


def test_a_file_that_is_cut_off_in_use_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MappedImages, "MAPPED", 0)
    (tmp_path / "images.u8").write_bytes(bytes(200))
    images = MappedImages(tmp_path / "images.u8", (2, 10, 10))
    os.truncate(tmp_path / "images.u8", 150)
    assert not images[0].any()
    with pytest.raises(UserError, match=r"images\.u8: was cut off while it was in use"):
        images[:]


@pytest.mark.slow
def test_reading_all_of_a_large_file_needs_little_memory(tmp_path: Path) -> None:
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
total = sum(int(images[places].sum()) for places in torch.randperm(half).split(64))
total += sum(int(images[start : min(start + 64, count)].sum()) for start in range(half, count, 64))
assert total == 127.5 * (600 << 20), total
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    job = python(tmp_path, script, tmp_path / "images.u8")
    output = job.communicate(timeout=100)[0]
    assert job.returncode == 0, output
    assert int(output) < 100, output  # MiB
