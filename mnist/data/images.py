"""Files of any kind that Pillow reads -> one upright picture each, in grey or in colour, or one line that says why not.

for path in find_images([Path("digits"), Path("photo.jpg")]):
    image = read_image(path)     # mode L or RGB
    pixels = fit_image(image, 64, colour=True)      # uint8 [64, 64, 3], what a network is trained on and asked about

Nothing here loads torch: the processes that decode a folder (mnist/data/cache.py) import this module alone.
"""

import contextlib
import hashlib
import io
import multiprocessing
import os
import signal
import stat
import threading
import warnings
from collections.abc import Iterable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from mnist.errors import ImageError
from mnist.launch.streams import printable

# A photograph of 12 to 50 million pixels is common; one of 64 takes 200 MB in colour, a few times that in all
MOST_PIXELS = 64_000_000
MOST_BYTES = 512 << 20  # of a file: that many pixels, not compressed, of 16 bits in colour and some more
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .heic .heif .jfif .jpe .jpeg .jpg .jp2 .pbm .pcx .pgm .png .pnm .ppm .tga .tif .tiff"
    " .webp".split()
)
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # ISO/IEC 23008-12
NEARLY_WHITE = 200  # of 255
_one_at_a_time = threading.Lock()  # a filter of warnings belongs to all threads, and so does the memory


Scale = tuple[float, float]  # of images of more than 8 bits per pixel: the values that become 0 and 255


def read_image(source: Path | bytes | BinaryIO, name: str = "", scale: Scale | None = None) -> Image.Image:
    """The picture in a file, in what a file holds, or in an open one, in mode L or RGB.

    It is turned as its EXIF data say; of an animation it is the first frame. What is transparent becomes white, or
    black where all that is opaque is nearly white. More than 8 bits per pixel are brought to 8 by `scale`, that of a
    data set, or else by the image's own range (`scale_of`). `name` is what messages call it, if the source itself does
    not say.

    Raises ImageError, with one line, for what cannot be opened, is no image, is broken, or has more than MOST_PIXELS.
    """
    return in_8_bits(_read(source, name), scale)


def _read(source: Path | bytes | BinaryIO, name: str = "") -> Image.Image:
    """As `read_image`, but what has more than 8 bits per pixel stays as it is."""
    name = printable(name or str(source if isinstance(source, Path) else getattr(source, "name", "") or "the image"))
    with _one_at_a_time, warnings.catch_warnings(), contextlib.ExitStack() as opened:
        warnings.simplefilter("ignore")  # of Pillow's, on what it skips in files that are a little wrong
        if isinstance(source, Path):
            source = opened.enter_context(_open(source, name))
        elif isinstance(source, bytes):
            source = io.BytesIO(source)
        try:
            image = _decode(source, name)
            return _in_grey_or_colour(_upright(image))
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name}: too large; at most {MOST_PIXELS:,} pixels are read.") from error
        except MemoryError as error:
            raise ImageError(f"{name}: it does not fit into the memory.") from error
        except Exception as error:  # a broken file may be anything to a decoder: SyntaxError, struct.error, ...
            reason = printable(" ".join(str(error).split()).rstrip(".")) or type(error).__name__
            raise ImageError(f"{name}: the image is broken or cut off ({reason}).") from error


def fit_image(picture: Image.Image, size: int, colour: bool) -> NDArray[np.uint8]:
    """A picture in mode L or RGB -> uint8 [size, size], or [size, size, 3] in colour: what training and prediction see.

    The square in the middle, as wide as the shorter side, is resized; a picture of that size stays as it is, to the
    byte. Bicubic, with a support that grows as the picture shrinks: BOX makes blocks of what it enlarges, and LANCZOS
    takes half as long again and draws rings around strokes. What is over four times too large is first shrunk by whole
    pixels: 0.7 ms instead of 1.2 for 500 x 375, 12 instead of 65 for 12 million, and off by 3 of 255 at most.
    """
    picture = picture.convert("RGB" if colour else "L")
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


class Decoded(NamedTuple):
    """An image as `fit_image` gives it, and what is known of it without looking at it again."""

    pixels: bytes
    digest: bytes  # of the pixels: the same for the same picture in another file, or in another format
    sums: tuple[int, ...]  # of the pixels of each channel, then of their squares


def digest_of(pixels: bytes | memoryview) -> bytes:
    """16 bytes that tell an image from others."""
    return hashlib.blake2b(pixels, digest_size=16).digest()


def decode_images(
    files: Sequence[tuple[Path, str]], size: int, colour: bool, scale: Scale | None
) -> list[Decoded | str | None]:
    """For each path, with the name to call it by, the image, fitted, or why it cannot be read.

    None for an image of more than 8 bits per pixel where there is no `scale`.
    """
    decoded: list[Decoded | str | None] = []
    for path, name in files:
        try:
            image = _read(path, name)
            if scale is None and is_wide(image):
                decoded.append(None)
                continue
            fitted = fit_image(in_8_bits(image, scale), size, colour)
        except ImageError as error:
            decoded.append(str(error).removeprefix(f"{printable(name)}: ").rstrip("."))
        else:
            values = fitted.reshape(size * size, -1).astype(np.int64)  # [pixels, channels]
            sums = (*values.sum(axis=0).tolist(), *(values * values).sum(axis=0).tolist())
            pixels = fitted.tobytes()
            decoded.append(Decoded(pixels, digest_of(pixels), sums))
    return decoded


class Survey(NamedTuple):
    """What is to be known of images before the first is decoded for good."""

    any_in_colour: bool  # a pixel whose channels differ
    sides: list[int]  # the shorter side of each; of those before the first in colour


def survey_images(files: Sequence[tuple[Path, str]]) -> Survey:
    """Look at images up to the first in colour. Those whose header says that they are grey are not decoded."""
    sides: list[int] = []
    for path, name in files:
        with contextlib.suppress(ImageError):
            if (size := _size_if_grey(path, name)) is None:
                image = _read(path, name)
                size, pixels = image.size, np.asarray(image.convert("RGB"))
                if (pixels != pixels[..., :1]).any():
                    return Survey(True, sides)
            sides.append(min(size))
    return Survey(False, sides)


def _size_if_grey(path: Path, name: str) -> tuple[int, int] | None:
    with _one_at_a_time, warnings.catch_warnings(), _open(path, name) as file:
        warnings.simplefilter("ignore")
        try:
            image = _identify(file, name)
        except Exception:  # _read says what is wrong with it
            return None
        return image.size if image.mode.startswith(("1", "L", "I", "F")) else None  # LA, I;16


def ranges_of(files: Sequence[tuple[Path, str]]) -> list[Scale]:
    """`range_of` each image of more than 8 bits per pixel among the files."""
    ranges = []
    for path, name in files:
        with contextlib.suppress(ImageError):
            if is_wide(image := _read(path, name)):
                ranges.append(range_of(image))
    return ranges


def is_wide(image: Image.Image) -> bool:
    """Whether it has more than 8 bits per pixel: integers of 16 or 32 bits, or floating point."""
    return image.mode.startswith(("I", "F"))


def range_of(image: Image.Image) -> Scale:
    """The values that a thousandth of the pixels are below and above: a few hot pixels say nothing of the others."""
    low, high = np.quantile(_values(image), (0.001, 0.999), method="nearest")
    return float(low), float(high)


def scale_of(ranges: Sequence[Scale]) -> Scale:
    """One scale for images with such ranges: from zero, or less, to the end of as many bits as they need.

    So an empty page stays empty, which stretching from the darkest to the brightest would make noise of, and images of
    12 bits are not dark for being stored in 16.
    """
    low, high = min(0.0, *(low for low, _ in ranges)), max(high for _, high in ranges)
    if low < 0 or high <= 1:  # signed, or shares of one
        return low, max(high, low + 1)
    return low, next((2.0**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits), high)


def _values(image: Image.Image) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)


def follow_parent() -> None:
    """Let a process that decodes end with the one that has started it, however that ends, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


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
        raise ImageError(f"{printable(str(error.filename))}: {error.strerror}.") from error

    visited = {os.path.realpath(folder)}  # links are followed, each real folder once: so circles end
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        below = [(name, os.path.realpath(Path(parent, name))) for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [name for name, real in below if real not in visited and not visited.add(real)]  # type: ignore[func-returns-value]
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
    size = file.seek(0, io.SEEK_END) if file.seekable() else None
    if size is not None and size > MOST_BYTES:  # some decoders read all of it
        raise ImageError(f"{name}: too large; at most {MOST_BYTES >> 20} MiB are read.")
    if size is not None:
        file.seek(0)
    try:
        image = _identify(file, name)
    except UnidentifiedImageError as error:
        if size == 0:
            raise ImageError(f"{name}: an empty file.") from error
        raise ImageError(f"{name}: not an image, or of a kind that is not read; PNG and JPEG are.") from error
    width, height = image.size
    if isinstance(image, TiffImageFile) and {TILEWIDTH, TILELENGTH} <= image.tag_v2.keys():
        # a tile is decoded whole, however little of it is in the picture
        width, height = max(width, image.tag_v2[TILEWIDTH]), max(height, image.tag_v2[TILELENGTH])
    if width * height > MOST_PIXELS:
        raise ImageError(f"{name}: {width} x {height} is too large; at most {MOST_PIXELS:,} pixels are read.")
    image.load()
    if min(image.size) < 1:
        raise ImageError(f"{name}: {width} x {height} pixels, nothing to see.")
    return image


def _identify(file: BinaryIO, name: str) -> Image.Image:
    """The picture in an open file, of which only the header has been read; raises ImageError and what Pillow raises."""
    Image.init()
    try:
        return _open_as_named(file)
    except UnidentifiedImageError:
        if "HEIF" in Image.ID or not _is_heif(file):
            raise
    try:
        import pi_heif
    except ImportError as error:
        raise ImageError(
            f"{name}: HEIC, as iPhones write it, needs pi-heif. Run: pip install pi-heif (or -e '.[heic]')."
        ) from error
    pi_heif.register_heif_opener()
    return _open_as_named(file)


def _open_as_named(file: BinaryIO) -> Image.Image:
    """By the formats of IMAGE_SUFFIXES alone: EPS and WMF are drawn by other programs, and an ICO may hold an image of
    any size behind a small one.
    """
    formats = {Image.EXTENSION[suffix] for suffix in IMAGE_SUFFIXES if suffix in Image.EXTENSION}
    return Image.open(file, formats=sorted(formats & set(Image.ID)))


def _is_heif(file: BinaryIO) -> bool:
    if not file.seekable():
        return False
    file.seek(0)
    header = file.read(12)
    file.seek(0)
    return header[4:8] == b"ftyp" and header[8:12] in HEIF_BRANDS


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # where the EXIF data are broken, the picture is taken as it lies
        return ImageOps.exif_transpose(image) or image
    return image


def _in_grey_or_colour(image: Image.Image) -> Image.Image:
    """Any mode -> L or RGB; what is wide stays as it is."""
    if is_wide(image) or (image.mode in ("L", "RGB") and "transparency" not in image.info):
        return image.copy()  # without its file
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_paper(image.convert("RGBA"))
    return image.convert("L" if image.mode == "1" else "RGB")


def in_8_bits(image: Image.Image, scale: Scale | None) -> Image.Image:
    """Integers of 16 or 32 bits or floating point -> L, by `scale` or their own range; other images as they are."""
    if not is_wide(image):
        return image
    low, high = scale or scale_of([range_of(image)])
    return Image.fromarray(np.rint((_values(image) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8))


def _on_paper(image: Image.Image) -> Image.Image:
    """RGBA -> RGB, on white, or on black where next to nothing that is opaque could be seen on white."""
    opaque = np.asarray(image.getchannel("A")) >= 128
    dark = np.asarray(image.convert("RGB").convert("L")) < NEARLY_WHITE
    white_ink = opaque.any() and not opaque.all() and (opaque & dark).sum() < 0.002 * opaque.sum()
    paper = Image.new("RGBA", image.size, "black" if white_ink else "white")
    return Image.alpha_composite(paper, image).convert("RGB")
