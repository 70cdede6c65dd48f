"""Files of any kind that Pillow reads -> one upright picture each, in grey or in colour, or one line that says why not.

for path in find_images([Path("digits"), Path("photo.jpg")]):
    image = read_image(path)     # mode L or RGB
"""

import contextlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist.errors import ImageError

# A photograph of 12 to 50 million pixels is common; one of 64 takes 200 MB in colour, a few times that in all
MOST_PIXELS = 64_000_000
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .jfif .jpe .jpeg .jpg .jp2 .pbm .pcx .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
UNWANTED_FORMATS = {"EPS", "WMF"}  # Pillow has them drawn by other programs, at any size
NEARLY_WHITE = 200  # of 255
_one_at_a_time = threading.Lock()  # a filter of warnings belongs to all threads, and so does the memory


def read_image(source: Path | bytes | BinaryIO, name: str = "") -> Image.Image:
    """The picture in a file, in what a file holds, or in an open one, in mode L or RGB.

    It is turned as its EXIF data say; of an animation it is the first frame. What is transparent becomes white, or
    black where all that is opaque is nearly white. Of more than 8 bits a pixel, the brightest value becomes 255.
    `name` is what messages call it, if the source itself does not say.

    Raises ImageError, with one line, for what cannot be opened, is no image, is broken, or has more than MOST_PIXELS.
    """
    name = _printable(name or str(source if isinstance(source, Path) else getattr(source, "name", "") or "the image"))
    with _one_at_a_time, warnings.catch_warnings(), contextlib.ExitStack() as opened:
        warnings.simplefilter("ignore")  # of Pillow's, on what it skips in files that are a little wrong
        if isinstance(source, Path):
            source = opened.enter_context(_open(source, name))
        elif isinstance(source, bytes):
            source = io.BytesIO(source)
        try:
            image = _decode(source, name)
            return _in_gray_or_colour(_upright(image))
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name}: too large; at most {MOST_PIXELS:,} pixels are read.") from error
        except MemoryError as error:
            raise ImageError(f"{name}: it does not fit into the memory.") from error
        except Exception as error:  # a broken file may be anything to a decoder: SyntaxError, struct.error, ...
            reason = _printable(" ".join(str(error).split()).rstrip(".")) or type(error).__name__
            raise ImageError(f"{name}: the image is broken or cut off ({reason}).") from error


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files among the paths, as they are, and in place of a folder the images in it and below, sorted.

    A file that is named is taken whatever it is called, also one that is missing: `read_image` says so. In a folder
    only IMAGE_SUFFIXES count, and nothing hidden. Raises ImageError for a folder that cannot be read.
    """
    found: dict[Path, None] = {}  # each once, in their order
    for path in paths:
        if os.path.isdir(path):  # unlike Path.is_dir it answers for a folder that it may not look into, too
            found.update(dict.fromkeys(sorted(_images_below(path))))
        else:
            found[path] = None
    return list(found)


def _images_below(folder: Path) -> list[Path]:
    found = []

    def refuse(error: OSError) -> None:
        raise ImageError(f"{_printable(str(error.filename))}: {error.strerror}.") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):  # follows no links, for they may go in circles
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return found


def _open(path: Path, name: str) -> BinaryIO:
    """The file, open; raises ImageError."""
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise ImageError(f"{name}: a folder, not an image.")
        if not stat.S_ISREG(kind):
            raise ImageError(f"{name}: not a file.")  # a pipe might never end
        return path.open("rb")
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file.") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(f"{name}: {reason}.") from error


def _decode(file: BinaryIO, name: str) -> Image.Image:
    """The first picture in an open file, decoded once its size is known; raises ImageError and what decoders raise."""
    Image.init()
    try:
        image = Image.open(file, formats=[it for it in Image.ID if it not in UNWANTED_FORMATS])
    except UnidentifiedImageError as error:
        if file.seekable() and file.seek(0, io.SEEK_END) == 0:
            raise ImageError(f"{name}: an empty file.") from error
        raise ImageError(f"{name}: not an image, or of a kind that is not read; PNG and JPEG are.") from error
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ImageError(f"{name}: {width} x {height} is too large; at most {MOST_PIXELS:,} pixels are read.")
    image.load()
    if min(image.size) < 1:
        raise ImageError(f"{name}: {width} x {height} pixels, nothing to see.")
    return image


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # where the EXIF data are broken, the picture is taken as it lies
        return ImageOps.exif_transpose(image) or image
    return image


def _in_gray_or_colour(image: Image.Image) -> Image.Image:
    """Any mode -> L or RGB."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image.copy()  # without its file
    if image.mode.startswith(("I", "F")):
        return _in_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_paper(image.convert("RGBA"))
    return image.convert("L" if image.mode == "1" else "RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Integers of 16 or 32 bits or floating point -> L: zero, or less where there is less, is black, and the brightest
    white. So an empty page stays empty, which stretching from the darkest to the brightest would make noise of.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    low, high = min(0.0, values.min()), values.max()
    if 1 < high <= 255:  # 8 bits, in a wider mode
        high = 255.0
    return Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8))


def _on_paper(image: Image.Image) -> Image.Image:
    """RGBA -> RGB, on white, or on black where next to nothing that is opaque could be seen on white."""
    opaque = np.asarray(image.getchannel("A")) >= 128
    dark = np.asarray(image.convert("RGB").convert("L")) < NEARLY_WHITE
    white_ink = opaque.any() and not opaque.all() and (opaque & dark).sum() < 0.002 * opaque.sum()
    paper = Image.new("RGBA", image.size, "black" if white_ink else "white")
    return Image.alpha_composite(paper, image).convert("RGB")


def _printable(text: str) -> str:
    """Text for one line of a terminal: control characters, line ends and bytes that are no text are written out."""
    return "".join(it if it.isprintable() else repr(it)[1:-1] for it in text)
