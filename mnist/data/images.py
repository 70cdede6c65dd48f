"""Read image files of any format Pillow supports, upright and in 8 bits, or raise a one-line ImageError.

for path in find_images([Path("digits"), Path("photo.jpg")]):
    image = read_image(path)     # mode L or RGB
    pixels = fit_image(image, Form(64, color=True))      # uint8 [64, 64, 3], for training and prediction

Must not import torch: the processes that decode a folder (mnist/data/cache.py) import only this module.
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

from mnist.data.duplicates import likeness_of
from mnist.errors import ImageError
from mnist.launch.streams import printable

# photographs of 12 to 50 million pixels are common; 64 million take 200 MB in color, times a few copies
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 512 << 20  # of a file: MAX_PIXELS in 16-bit color, uncompressed, with a margin
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .heic .heif .jfif .jpe .jpeg .jpg .jp2 .pbm .pcx .pgm .png .pnm .ppm .tga .tif .tiff"
    " .webp".split()
)
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # ISO/IEC 23008-12
NEARLY_WHITE = 200  # of 255
_one_at_a_time = threading.Lock()  # warning filters are global to all threads; also bounds memory

Scale = tuple[float, float]  # for images with more than 8 bits per pixel: the values that become 0 and 255


def read_image(source: Path | bytes | BinaryIO, name: str = "", scale: Scale | None = None) -> Image.Image:
    """The image in a file, in an open file or in a file's bytes, in mode L or RGB.

    EXIF orientation is applied; of an animation the first frame is read. Transparent pixels become white, or black if
    all opaque ones are nearly white. More than 8 bits per pixel are reduced by `scale`, by default from the image's
    own range (`scale_of`). `name` is for messages about a source without a name.

    Raises ImageError with one line if it cannot be opened, is not an image, is broken or has more than MAX_PIXELS.
    """
    return in_8_bits(_read(source, name), scale)


def _read(source: Path | bytes | BinaryIO, name: str = "") -> Image.Image:
    """Like `read_image`, but keeps more than 8 bits per pixel."""
    name = printable(name or str(source if isinstance(source, Path) else getattr(source, "name", "") or "the image"))
    with _one_at_a_time, warnings.catch_warnings(), contextlib.ExitStack() as opened:
        warnings.simplefilter("ignore")  # Pillow's, about slightly invalid files
        if isinstance(source, Path):
            source = opened.enter_context(_open(source, name))
        elif isinstance(source, bytes):
            source = io.BytesIO(source)
        try:
            return _in_gray_or_color(_upright(_decode(source, name)))
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name}: too large; the limit is {MAX_PIXELS:,} pixels.") from error
        except MemoryError as error:
            raise ImageError(f"{name}: does not fit in memory.") from error
        except Exception as error:  # decoders raise anything on broken files: SyntaxError, struct.error, ...
            reason = printable(" ".join(str(error).split()).rstrip(".")) or type(error).__name__
            raise ImageError(f"{name}: the image is broken or cut off ({reason}).") from error


class Form(NamedTuple):
    """What an image becomes: `size` pixels square, its middle (`crop`) or all of it (`pad`)."""

    size: int
    color: bool
    fit: str = "crop"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pixels: height, width, and 3 in color."""
        return (self.size, self.size, 3) if self.color else (self.size, self.size)


def fit_image(image: Image.Image, form: Form) -> NDArray[np.uint8]:
    """An image in mode L or RGB, resized and made square: uint8 of the form's shape.

    `crop` takes the middle. `pad` takes all of it and repeats the outermost pixels on both sides, as augmentation does:
    mostly a border in the color of the background. An image of that size is unchanged. Bicubic with antialiasing: BOX
    is blocky when enlarging, and LANCZOS takes 50 % longer and rings around strokes. If an image is over four times too
    large, it is first reduced by an integer factor: 0.7 ms instead of 1.2 for 500 x 375, 12 instead of 65 for 12
    million pixels, differing by at most 3 of 255.
    """
    image = image.convert("RGB" if form.color else "L")
    size, (width, height) = form.size, image.size
    if form.fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))
    longer = max(width, height)
    # in integers, because the ONNX file must come to the same (inference/export.py)
    inner = [max(1, (2 * size * side + longer) // (2 * longer)) for side in (width, height)]
    resized = np.array(image.resize((inner[0], inner[1]), Image.Resampling.BICUBIC, reducing_gap=2.0))
    borders = [((size - side) // 2, (size - side + 1) // 2) for side in reversed(inner)]  # of rows, then of columns
    return np.pad(resized, [*borders, (0, 0)][: resized.ndim], mode="edge")


class Decoded(NamedTuple):
    """A decoded image: the result of `fit_image`."""

    pixels: bytes
    digest: bytes  # of the pixels, whatever the file format
    sums: tuple[int, ...]  # of each channel's pixels, then of their squares
    sides: tuple[int, int]  # width and height of the image in its file
    likeness: bytes  # see duplicates.py


def digest_of(pixels: bytes | memoryview) -> bytes:
    """A hash of an image, 16 bytes."""
    return hashlib.blake2b(pixels, digest_size=16).digest()


def decode_images(files: Sequence[tuple[Path, str]], form: Form, scale: Scale | None) -> list[Decoded | str | None]:
    """For each (path, name for messages), the image or the reason why it cannot be read.

    None for an image with more than 8 bits per pixel if there is no `scale`.
    """
    decoded: list[Decoded | str | None] = []
    for path, name in files:
        try:
            image = _read(path, name)
            if scale is None and is_wide(image):
                decoded.append(None)
                continue
            fitted = fit_image(in_8_bits(image, scale), form)
        except ImageError as error:
            decoded.append(str(error).removeprefix(f"{printable(name)}: ").rstrip("."))
        else:
            values = fitted.reshape(form.size**2, -1).astype(np.int64)  # [pixels, channels]
            sums = (*values.sum(axis=0).tolist(), *(values * values).sum(axis=0).tolist())
            pixels = fitted.tobytes()
            decoded.append(Decoded(pixels, digest_of(pixels), sums, image.size, likeness_of(fitted)))
    return decoded


def survey_images(files: Sequence[tuple[Path, str]]) -> tuple[bool, list[int]]:
    """Whether any image is in color, and the shorter side of each before it. Gray files are not decoded."""
    sides: list[int] = []
    for path, name in files:
        with contextlib.suppress(ImageError):
            if (size := _size_if_gray(path, name)) is None:
                image = _read(path, name)
                size, pixels = image.size, np.asarray(image.convert("RGB"))
                if (pixels != pixels[..., :1]).any():
                    return True, sides
            sides.append(min(size))
    return False, sides


def _size_if_gray(path: Path, name: str) -> tuple[int, int] | None:
    with _one_at_a_time, warnings.catch_warnings(), _open(path, name) as file:
        warnings.simplefilter("ignore")
        try:
            image = _identify(file, name)
        except Exception:  # _read raises the message
            return None
        return image.size if image.mode.startswith(("1", "L", "I", "F")) else None  # also LA, I;16


def ranges_of(files: Sequence[tuple[Path, str]]) -> list[Scale]:
    """`range_of` each image with more than 8 bits per pixel."""
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
    """The 0.1 % and 99.9 % quantiles of the pixels, so a few hot pixels have no effect."""
    low, high = np.quantile(_values(image), (0.001, 0.999), method="nearest")
    return float(low), float(high)


def scale_of(ranges: Sequence[Scale]) -> Scale:
    """One scale for images with these ranges: from zero, or the lowest negative value, to the maximum of a bit depth.

    Stretching the actual range would turn an empty page into noise. 12 bits stored in 16 are scaled as 12 bits.
    """
    low, high = min(0.0, *(low for low, _ in ranges)), max(high for _, high in ranges)
    if low < 0 or high <= 1:  # signed, or in [0, 1]
        return low, max(high, low + 1)
    return low, next((2.0**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits), high)


def _values(image: Image.Image) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)


def follow_parent() -> None:
    """Make a decoding process exit when its parent does, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files among the paths, and the images in and below the folders among them, sorted; each path once.

    Named files are kept whatever they are called, even if missing: `read_image` raises. In folders, only files with
    IMAGE_SUFFIXES count, and nothing hidden. Raises ImageError for a folder that cannot be read.
    """
    found: dict[Path, None] = {}
    for path in paths:
        # unlike Path.is_dir, also true for a folder without permission
        found.update(dict.fromkeys(sorted(_images_below(path)) if os.path.isdir(path) else [path]))
    return list(found)


def _images_below(folder: Path) -> list[Path]:
    found = []

    def refuse(error: OSError) -> None:
        raise ImageError(f"{printable(str(error.filename))}: {error.strerror}.") from error

    visited = {os.path.realpath(folder)}  # links are followed, each real folder once
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
            raise ImageError(f"{name}: not a regular file.")  # reading a pipe might never end
        return path.open("rb")
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file.") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(f"{name}: {reason}.") from error


def _decode(file: BinaryIO, name: str) -> Image.Image:
    """Decode the first image in a file after checking its size. Raises ImageError and whatever decoders raise."""
    size = file.seek(0, io.SEEK_END) if file.seekable() else None
    if size is not None and size > MAX_FILE_BYTES:  # some decoders read all of it
        raise ImageError(f"{name}: too large; the limit is {MAX_FILE_BYTES >> 20} MiB.")
    if size is not None:
        file.seek(0)
    try:
        image = _identify(file, name)
    except UnidentifiedImageError as error:
        if size == 0:
            raise ImageError(f"{name}: an empty file.") from error
        raise ImageError(f"{name}: not an image, or of an unsupported format; PNG and JPEG always work.") from error
    width, height = image.size
    if isinstance(image, TiffImageFile) and {TILEWIDTH, TILELENGTH} <= image.tag_v2.keys():
        # a tile is decoded whole, even if little of it is in the image
        width, height = max(width, image.tag_v2[TILEWIDTH]), max(height, image.tag_v2[TILELENGTH])
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} x {height} is too large; the limit is {MAX_PIXELS:,} pixels.")
    image.load()
    if min(image.size) < 1:
        raise ImageError(f"{name}: {width} x {height} pixels, an empty image.")
    return image


def _identify(file: BinaryIO, name: str) -> Image.Image:
    """Read only the header of the image in a file. Raises ImageError and whatever Pillow raises."""
    Image.init()
    try:
        return _open_supported(file)
    except UnidentifiedImageError:
        if "HEIF" in Image.ID or not _is_heif(file):
            raise
    try:
        import pi_heif
    except ImportError as error:
        raise ImageError(f"{name}: HEIC images need pi-heif. Run: pip install pi-heif") from error
    pi_heif.register_heif_opener()
    return _open_supported(file)


def _open_supported(file: BinaryIO) -> Image.Image:
    """Open only the formats of IMAGE_SUFFIXES: EPS and WMF run programs, ICO may contain an image of any size."""
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
    with contextlib.suppress(Exception):  # broken EXIF data is ignored
        return ImageOps.exif_transpose(image) or image
    return image


def _in_gray_or_color(image: Image.Image) -> Image.Image:
    """Any mode -> L or RGB, except that wide images are kept."""
    if is_wide(image) or (image.mode in ("L", "RGB") and "transparency" not in image.info):
        return image.copy()  # detached from its file
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_paper(image.convert("RGBA"))
    return image.convert("L" if image.mode == "1" else "RGB")


def in_8_bits(image: Image.Image, scale: Scale | None) -> Image.Image:
    """Wide images -> L, by `scale` or their own range; other images unchanged."""
    if not is_wide(image):
        return image
    low, high = scale or scale_of([range_of(image)])
    return Image.fromarray(np.rint((_values(image) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8))


def _on_paper(image: Image.Image) -> Image.Image:
    """RGBA -> RGB, on white, or on black if hardly any opaque pixel would show on white."""
    opaque = np.asarray(image.getchannel("A")) >= 128
    dark = np.asarray(image.convert("RGB").convert("L")) < NEARLY_WHITE
    white_ink = opaque.any() and not opaque.all() and (opaque & dark).sum() < 0.002 * opaque.sum()
    paper = Image.new("RGBA", image.size, "black" if white_ink else "white")
    return Image.alpha_composite(paper, image).convert("RGB")
