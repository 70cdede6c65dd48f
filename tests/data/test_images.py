"""Reading image files, and refusing invalid ones."""

import io
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from mnist.cli import main
from mnist.data.images import MAX_PIXELS, find_images, read_image
from mnist.errors import ImageError, UserError
from mnist.models.networks import Net
from mnist.models.saved import ModelConfig, save_model
from tests.support.handwriting import draw_digit, paste_digit


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
