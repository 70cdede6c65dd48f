"""Reading image files, refusing invalid ones, and preparing digits like MNIST's."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from mnist.cli import main
from mnist.config.settings import PROJECT_FOLDER
from mnist.data.images import MAX_PIXELS, find_images, read_image
from mnist.data.splits import ImageData
from mnist.errors import ImageError, UserError
from mnist.inference.handwriting import BOX, is_prepared, label_regions, prepare_digit
from mnist.models.networks import Net
from mnist.models.saved import ModelConfig, save_model
from tests.conftest import metrics_of
from tests.support.handwriting import HANDS, draw_digit, paste_digit

MEASURED = 1000  # digits of each kind
SEED = 20240  # of the test digits; the preparation was tuned on training images


def png(image: Image.Image, **options: object) -> bytes:
    return saved(image, "PNG", **options)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def seven(size: int = 280, paper: int = 255, ink: int = 0, mode: str = "L") -> Image.Image:
    """A 7 in thick strokes."""
    image = Image.new("L", (size, size), paper)
    points = [(0.3 * size, 0.25 * size), (0.7 * size, 0.25 * size), (0.45 * size, 0.75 * size)]
    ImageDraw.Draw(image).line(points, fill=ink, width=size // 16, joint="curve")
    return image.convert(mode)


def png_claiming(width: int, height: int) -> bytes:
    """The start of a PNG of that size, without its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = [struct.pack(">I", len(it) - 4) + it + struct.pack(">I", zlib.crc32(it)) for it in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# --- what is read


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (png(seven()), "L"),
        (png(seven(mode="RGB")), "RGB"),
        (png(seven(mode="1")), "L"),
        (png(seven(mode="P")), "RGB"),
        (saved(seven(mode="CMYK"), "JPEG"), "RGB"),
        (saved(seven(mode="CMYK"), "TIFF"), "RGB"),
        (saved(seven(), "BMP"), "L"),
        (saved(seven(), "GIF"), "RGB"),
        (saved(seven(mode="RGB"), "WEBP"), "RGB"),
        (saved(seven().convert("F"), "TIFF"), "L"),
        (saved(seven().convert("I"), "TIFF"), "L"),
        (png(Image.fromarray(np.asarray(seven()).astype(np.uint16) * 257)), "L"),
        (saved(Image.fromarray(np.asarray(seven()).astype(np.uint16) * 16), "TIFF"), "L"),  # 12 bits of 16
        (saved(Image.fromarray(np.asarray(seven()).astype(np.float32) / 255), "TIFF"), "L"),
    ],
)
def test_every_mode_and_format_is_read_as_the_same_digit(content: bytes, mode: str) -> None:
    image = read_image(content)
    assert image.mode == mode
    assert image.size == (280, 280)
    plain = np.asarray(seven(), dtype=int)
    assert np.abs(np.asarray(image.convert("L"), dtype=int) - plain).mean() < 2


def test_a_path_an_open_file_and_bytes_give_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "7.png"
    path.write_bytes(png(seven()))
    with path.open("rb") as file:
        assert read_image(path) == read_image(file) == read_image(path.read_bytes()) == seven()


@pytest.mark.parametrize("ink", [0, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_paper_on_which_the_ink_is_visible(mode: str, ink: int) -> None:
    drawn = ImageOps.invert(seven())
    image = Image.new("RGBA", drawn.size, (ink, ink, ink, 0))
    image.putalpha(drawn)
    read = read_image(png(image.convert(mode) if mode != "P" else image.quantize(16))).convert("L")
    assert read.getpixel((0, 0)) == 255 - ink
    assert read.getpixel((140, 70)) == ink
    assert read_as_seven(read)


def test_a_white_page_with_transparent_corners_gets_white_corners() -> None:
    image = seven(mode="RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    assert read_image(png(image)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    lying = seven().crop((0, 0, 280, 200)).transpose(Image.Transpose.ROTATE_90)
    read = read_image(saved(lying, "JPEG", exif=exif, quality=95))
    assert read.size == (280, 200)
    assert np.abs(np.asarray(read, dtype=int) - np.asarray(seven().crop((0, 0, 280, 200)), dtype=int)).mean() < 3


def test_broken_exif_is_ignored() -> None:
    assert read_image(saved(seven(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")).size == (280, 280)


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("L", (280, 280), shade) for shade in (10, 200)]
    content = saved(seven(), "GIF", save_all=True, append_images=frames, duration=50)
    assert np.array_equal(np.asarray(read_image(content).convert("L")), np.asarray(seven()))


# --- what is refused


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file."),
        (Path.mkdir, "a folder, not an image."),
        (os.mkfifo, "not a regular file."),
        (lambda path: path.symlink_to(path), "ymbolic link"),
        (b"no image", "not an image"),
        (b"", "an empty file."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "not an image"),
        (half(png(paste_digit(torch.full((28, 28), 255), np.random.default_rng(0)))), "broken or cut off"),
        (half(saved(seven(), "JPEG")), "broken or cut off"),
        (png(seven())[:20], "broken or cut off"),
        (png_claiming(50_000, 50_000), f"too large; the limit is {MAX_PIXELS:,} pixels"),
        (png_claiming(10_000, 9_500), "10000 x 9500 is too large"),  # Pillow itself would only warn
        (png_claiming(MAX_PIXELS // 1000 + 1, 1000), "64001 x 1000 is too large"),
        (png_claiming(0, 100), ""),
    ],
)
def test_unreadable_files_are_errors_of_one_line_without_a_warning(
    make: Callable[[Path], object] | bytes, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "digit.png"
    if isinstance(make, bytes):
        path.write_bytes(make)
    else:
        make(path)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert len(message.splitlines()) == 1
    assert isinstance(caught.value, UserError)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("error")
def test_a_file_truncated_anywhere_is_read_or_refused() -> None:
    picture = draw_digit(5, np.random.default_rng(1)).resize((40, 40))
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        content = saved(picture, kind)
        for length in range(0, len(content), max(1, len(content) // 60)):
            try:
                assert read_image(content[:length]).size == (40, 40)
            except ImageError as error:
                assert str(error).startswith("the image: ")  # noqa: PT017


def test_messages_escape_control_characters_in_names(tmp_path: Path) -> None:
    for name in ("two\nlines.png", "red\x1b[31m.png", os.fsdecode(b"not utf-8 \xff.png"), "zero\0byte.png"):
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).isprintable()
        str(caught.value).encode()


def test_messages_name_bytes_as_the_caller_does() -> None:
    with pytest.raises(ImageError, match=r"^upload\.png: an empty file\.$"):
        read_image(b"", name="upload.png")


# --- finding images


def test_a_folder_gives_its_images_sorted_and_named_files_are_always_kept(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png", "deep/er/c.webp", ".cache/d.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "deep" / "circle").symlink_to(tmp_path)
    found = [tmp_path / name for name in ("a.jpg", "b.PNG", "deep/er/c.webp")]
    assert find_images([tmp_path]) == found
    named = [tmp_path / "notes.txt", tmp_path / "missing"]
    assert find_images([*named, tmp_path, tmp_path / "a.jpg"]) == named + found
    (tmp_path / "empty").mkdir()
    assert find_images([tmp_path / "empty"]) == []


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # root may read any folder
    with pytest.raises(ImageError, match=f"^{tmp_path}: Permission denied.$"):
        find_images([tmp_path])


# --- preparing digits


def read_as_seven(image: Image.Image) -> bool:
    """Whether it is prepared like `seven`."""
    return difference(prepared_of(image), prepared_of(seven())) < 3


def prepared_of(image: Image.Image) -> Tensor:
    prepared = prepare_digit(image)
    assert prepared is not None
    return prepared


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
    assert BOX - 1 <= max(sides) <= BOX
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


@pytest.mark.parametrize("direction", [0, 90, 180, 270])
def test_a_shadow_does_not_matter(direction: int) -> None:
    light = np.linspace(0.5, 1, 280)[:, None] * np.ones(280)
    shaded = np.asarray(seven(paper=230, ink=40)) * np.rot90(light, direction // 90)
    assert read_as_seven(Image.fromarray(shaded.astype(np.uint8)))


def test_dust_a_frame_and_a_table_next_to_the_paper_are_ignored() -> None:
    dust, frame, table = seven(), seven(), seven()
    for x, y in ((20, 30), (250, 40), (60, 250), (200, 260)):
        ImageDraw.Draw(dust).ellipse((x, y, x + 4, y + 4), fill=0)
    ImageDraw.Draw(frame).rectangle((8, 8, 271, 271), outline=0, width=3)
    ImageDraw.Draw(table).rectangle((0, 0, 30, 280), fill=60)
    assert [read_as_seven(page) for page in (dust, frame, table)] == [True] * 3


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
    "a dot": gray(255.0 - 255.0 * (np.hypot(*np.mgrid[-150:150, -150:150]) < 2)),
}


@pytest.mark.parametrize("name", NO_DIGIT)
def test_images_without_a_digit_give_none(name: str) -> None:
    assert prepare_digit(NO_DIGIT[name]) is None


def test_regions_connect_at_corners() -> None:
    rows = ["##..#", "..#.#", "....#", "#.#..", "###.."]
    labels = label_regions(np.array([[it == "#" for it in row] for row in rows]))
    assert labels.max() == 3
    assert labels[0, 0] == labels[1, 2] != labels[0, 4] == labels[2, 4]
    assert labels[3, 0] == labels[3, 2] == labels[4, 1]
    assert label_regions(np.zeros((3, 3), dtype=bool)).max() == 0


def test_an_icon_with_a_large_image_in_it_is_refused() -> None:
    inner = png(Image.new("1", (13_000, 13_000)))
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 1, len(inner), 22) + inner
    with pytest.raises(ImageError, match="not an image, or of an unsupported format"):
        read_image(icon)


# --- HEIC

HEIF_ENC = shutil.which("heif-enc")


@pytest.mark.skipif(HEIF_ENC is None, reason="apt install libheif-examples")
def test_heic_is_read(tmp_path: Path) -> None:
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48], pixels[:, 48:] = (200, 40, 40), (20, 60, 180)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    command = [str(HEIF_ENC), "-q", "95", "-o", str(tmp_path / "IMG_0001.HEIC"), str(tmp_path / "photo.png")]
    subprocess.run(command, check=True, capture_output=True)
    assert find_images([tmp_path]) == [tmp_path / "IMG_0001.HEIC", tmp_path / "photo.png"]
    image = read_image(tmp_path / "IMG_0001.HEIC")
    assert (image.mode, image.size) == ("RGB", (96, 64))
    assert np.abs(np.asarray(image, dtype=int) - pixels).mean() < 8


def test_heic_without_pi_heif_names_it_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(Net(), tmp_path / "model", ModelConfig("mlp", tuple("0123456789"), (28, 28), "mnist", 1, "digit"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "photos" / "seven.png").write_bytes(png(seven()))
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    monkeypatch.setattr(Image, "ID", [it for it in Image.ID if it != "HEIF"])  # in case another test registered it
    assert main(["predict", str(tmp_path / "photos"), "--model", str(tmp_path / "model")]) == 1
    printed = capsys.readouterr()
    assert "seven.png" in printed.out
    assert "IMG_0001.HEIC: HEIC images need pi-heif. Run: pip install pi-heif" in printed.err


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
