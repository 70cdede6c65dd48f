"""Prepare a photograph or drawing of one digit like MNIST's images: 28 x 28 pixels.

    pixels = prepare_digit(read_image(Path("photo.jpg")))     # uint8 [28, 28], or None if there is no digit

MNIST's digits were resized to fit 20 x 20, keeping the aspect ratio, and centered in 28 x 28 by center of mass (LeCun
et al., "Gradient-based learning applied to document recognition", 1998). Ink extraction is this project's own.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are exclusive

SIDE, BOX = 28, 20  # pixels: MNIST's images, and the box around their digits
MIDDLE = 14.0  # row and column of the center of mass, in pixels; 13.48 to 14.5 in MNIST
SEARCHED = 480  # pixels: longest side to which an image is reduced to find the digit
DRAWN = 240  # pixels: longest side to which the crop is reduced to extract the ink
BRUSH = 3.0  # anything wider than longest side / BRUSH is paper
MEDIAN_WINDOW = 2.5  # a window of longest side / MEDIAN_WINDOW is mostly paper
MIN_CONTRAST = 0.10  # of ink, relative to the paper's brightness
MIN_CONTRAST_TO_NOISE = 7.0  # contrast of ink, in standard deviations of the paper's noise
MIN_SIZE = 0.02  # of a digit, relative to the longest side
MAX_STROKE_LENGTH = 10  # of all strokes together, in units of the digit's longer side; textures exceed it
MAX_PIECES = 8  # connected regions of a digit
MIN_PIECE = 0.06  # size of a region, relative to the largest; smaller ones are dirt
MIN_STROKE = 2.0  # width in pixels of the 20 x 20 box; thinner strokes are thickened


def prepare_digit(image: Image.Image) -> Tensor | None:
    """The digit in an image of mode L or RGB, uint8 [28, 28], white on black, or None if there is none.

    Ink may be darker or lighter than the paper. An image that already looks like MNIST's is returned unchanged.
    """
    if image.size == (SIDE, SIDE):
        pixels = np.array(image.convert("L"))
        for candidate in (pixels, 255 - pixels):
            if is_prepared(candidate):
                return torch.from_numpy(candidate)
    box = _find(image)
    ink = None if box is None else _clean(image, box)
    return None if ink is None else torch.from_numpy(_center(_fit(ink)))


def is_prepared(pixels: NDArray[np.uint8]) -> bool:
    """Whether an image [28, 28] is like all 70,000 of MNIST: bright ink on black, of their size and position."""
    rows, columns = np.nonzero(pixels.any(axis=1))[0], np.nonzero(pixels.any(axis=0))[0]
    if pixels.max() < 254 or np.count_nonzero(pixels) > pixels.size // 2:
        return False
    longest = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    return longest in (BOX - 1, BOX) and all(abs(center - MIDDLE) < 0.55 for center in _center_of_mass(pixels))


# --- from an image to ink


def _find(image: Image.Image) -> Box | None:
    """The bounding box of the digit."""
    gray, factor = _shrunk(image, SEARCHED)
    strength, noise = _contrast(gray)
    ink = _ink(strength, noise)
    foreign = _foreign(ink > 0) if ink is not None else None
    if foreign is not None:
        strength = np.where(_sliding(foreign.astype(np.float32), 7, np.maximum) > 0, 0, strength)
        ink = _ink(strength, noise)
    if ink is None:
        return None
    left, top, right, bottom = (factor * edge for edge in _box(ink))
    if max(right - left, bottom - top) < max(MIN_SIZE * max(image.size), 5):
        return None
    return left, top, right, bottom


def _clean(image: Image.Image, box: Box) -> Floats | None:
    """The ink [height, width] in 0..1 of the digit in `box`: cropped, with thin strokes thickened."""
    margin = max(box[2] - box[0], box[3] - box[1]) // 4 + 2
    left, top = max(0, box[0] - margin), max(0, box[1] - margin)
    right, bottom = min(image.width, box[2] + margin), min(image.height, box[3] + margin)
    gray, factor = _shrunk(image.crop((left, top, right, bottom)), DRAWN)
    strength, noise = _contrast(gray)
    inside = np.zeros(gray.shape, dtype=bool)  # outside is dirt that _find has rejected
    rows = slice(max(0, (box[1] - top) // factor - 3), (box[3] - top) // factor + 4)
    columns = slice(max(0, (box[0] - left) // factor - 3), (box[2] - left) // factor + 4)
    inside[rows, columns] = True
    ink = _ink(np.where(inside, strength, 0), noise)
    if ink is None:
        return None
    left, top, right, bottom = _box(ink)
    return _thickened(ink[top:bottom, left:right])


def _shrunk(image: Image.Image, longest: int) -> tuple[Floats, int]:
    """The image in gray, [height, width] in 0..255, reduced to at most `longest` pixels per side, and the factor."""
    factor = -(-max(image.size) // longest)
    whole = tuple(max(side - side % factor, min(side, factor)) for side in image.size)
    # whole blocks only: a partial one at the edge would be noisier
    small = image.reduce(factor, box=(0, 0, whole[0], whole[1])).convert("L")
    if min(small.size) >= 64:
        small = small.filter(ImageFilter.GaussianBlur(0.8))  # reduces camera and JPEG noise
    return np.asarray(small, dtype=np.float32), factor


def _ink(strength: Floats, noise: float) -> Floats | None:
    """The amount of ink [height, width] in 0..1, zero outside of strokes; None if there are none."""
    strongest = float(strength.max())
    if strongest < max(MIN_CONTRAST, MIN_CONTRAST_TO_NOISE * noise):
        return None
    full = float(np.median(strength[strength > strongest / 2]))
    labels = label_regions(strength > max(full / 4, 3 * noise))
    count = int(labels.max()) + 1
    size = np.bincount(labels.ravel(), minlength=count)
    strong = np.bincount(labels[strength > full / 2], minlength=count)
    size[0] = 0  # the paper
    size[strong == 0] = 0
    kept = size >= max(2, MIN_PIECE * size.max())
    if not 1 <= np.count_nonzero(kept) <= MAX_PIECES:
        return None
    strokes = kept[labels] & (strength > full / 2)
    left, top, right, bottom = _box(strokes)
    if _outline(strokes) / 2 > MAX_STROKE_LENGTH * max(right - left, bottom - top):
        return None
    return np.where(kept[labels], np.clip(strength / full, 0, 1), 0).astype(np.float32)


def _foreign(mask: Mask) -> Mask | None:
    """The part of a mask that is not ink, e.g. a table next to the paper, a shadow or a frame; None if there is none.

    Such a region lies along an edge of the image, or is a rectangle around other regions.
    """
    labels = label_regions(mask)
    edge = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    along_edge = np.bincount(edge, minlength=int(labels.max()) + 1) > min(mask.shape) / 4
    along_edge[0] = False
    for number in range(1, len(along_edge)):
        region = labels == number
        left, top, right, bottom = _box(region)
        part = region[top:bottom, left:right]
        band = max(1, min(part.shape) // 10)
        sides = (
            part[:band].any(axis=0),
            part[-band:].any(axis=0),
            part[:, :band].any(axis=1),
            part[:, -band:].any(axis=1),
        )
        along_edge[number] |= min(part.shape) > 10 and min(side.mean() for side in sides) > 0.9
    if not along_edge.any():
        return None
    left, top, right, bottom = _box(mask)
    fills_picture = bottom - top > 0.9 * mask.shape[0] and right - left > 0.9 * mask.shape[1]
    if along_edge[1:].all() and fills_picture:
        return None  # a closely cropped digit
    return np.asarray(along_edge[labels])


def _contrast(gray: Floats) -> tuple[Floats, float]:
    """Each pixel's contrast relative to the paper's brightness, positive for ink, and the noise (std) of the paper.

    The paper is first estimated by a smooth surface that fits most pixels; this shows whether ink is darker or lighter.
    It is then refined by removing everything narrower than a brush (morphological opening).
    """
    light = np.log(gray + 16)  # makes shadows additive; 16 avoids dividing by black paper
    height, width = gray.shape
    shrink = max(1.0, max(gray.shape) / 48)
    small = _resized(light, (max(1, round(width / shrink)), max(1, round(height / shrink))))
    surface = _smooth_surface(small)
    most = _sliding_median(small - surface, max(3, round(max(small.shape) / MEDIAN_WINDOW) | 1))
    sign = 1 if float(((small - surface - most) ** 3).sum()) > 0 else -1
    contrast = sign * np.expm1(light - _resized(surface, (width, height)))
    brush = max(3, round(max(gray.shape) / BRUSH))
    contrast -= _sliding(_sliding(contrast, brush, np.minimum), brush, np.maximum)
    low, lower = np.quantile(contrast, [0.25, 0.05])  # both are paper if at least a quarter of the image is
    noise = float(low - lower) / 0.97  # for a normal distribution, like 0.674 below
    return (contrast - low - 0.674 * noise).astype(np.float32), noise


def _smooth_surface(values: Floats) -> Floats:
    """A quadratic polynomial in x and y, [height, width], fitted robustly."""
    height, width = values.shape
    y, x = (grid.ravel() for grid in np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"))
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=1)
    z = values.ravel().astype(np.float64)
    fitted = np.full_like(z, np.median(z))
    for _ in range(8):
        off = np.abs(z - fitted)
        weight = 1 / (1 + (off / (2 * np.median(off) + 0.01)) ** 2)  # Cauchy weights, small for outliers
        scaled = terms * weight[:, None]
        solution = np.linalg.lstsq(scaled.T @ terms, scaled.T @ z, rcond=None)[0]
        fitted = terms @ solution
    return fitted.reshape(height, width).astype(np.float32)


def _sliding(values: Floats, window: int, pick: np.ufunc) -> Floats:
    """Minimum or maximum filter with a square window and repeated edges; 15 times as fast as torch's max_pool2d."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (window // 2, window - 1 - window // 2)
        values = np.pad(values, padding, mode="edge")
        seen = 1
        while seen < window:  # two adjacent or overlapping windows make a wider one
            step = min(seen, window - seen)
            length = values.shape[axis] - step
            first, second = values.take(range(length), axis), values.take(range(step, step + length), axis)
            values = pick(first, second)
            seen += step
    return np.asarray(values, dtype=np.float32)


def _sliding_median(values: Floats, window: int) -> Floats:
    """Median filter with a square window of odd size and repeated edges."""
    padded = np.pad(values, window // 2, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window))
    return np.asarray(np.median(windows, axis=(2, 3)), dtype=np.float32)


def label_regions(mask: Mask) -> NDArray[np.intp]:
    """Number the 8-connected regions of a mask from 1, [height, width]; 0 outside."""
    height = len(mask)
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]  # runs of True in a row: [starts, ends)
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    first_of_row = np.searchsorted(rows, np.arange(height + 1)).tolist()
    begin, end = starts.tolist(), ends.tolist()
    for row in range(1, height):
        above, last_above = first_of_row[row - 1], first_of_row[row]
        for run in range(first_of_row[row], first_of_row[row + 1]):
            while above < last_above and end[above] < begin[run]:
                above += 1
            touching = above
            while touching < last_above and begin[touching] <= end[run]:
                parent[root(run)] = root(touching)
                touching += 1
    roots = np.array([root(run) for run in range(len(rows))], dtype=np.intp)
    numbers = np.unique(roots, return_inverse=True)[1] + 1
    labels = np.zeros(mask.shape, dtype=np.intp)
    labels[mask] = np.repeat(numbers, ends - starts)
    return labels


def _outline(mask: Mask) -> float:
    """The perimeter of a mask; pi / 4 corrects for the steps of slanted edges."""
    around = np.pad(mask, 1)
    return np.pi / 4 * sum(int(np.count_nonzero(np.diff(around, axis=axis))) for axis in (0, 1))


# --- from ink to MNIST's format


def _thickened(ink: Floats) -> Floats:
    """The ink [height, width] with strokes at least MIN_STROKE pixels wide in the box of 20 x 20."""
    covered = ink > 0.5
    missing = MIN_STROKE * max(ink.shape) / BOX - 2 * int(covered.sum()) / _outline(covered)  # of the mean stroke width
    radius = missing / 2 / (1 - MIN_STROKE / BOX)  # thickening also enlarges the digit
    if radius < 0.5:
        return ink
    reach = int(np.ceil(radius))
    padded = np.pad(ink, 2 * reach)
    height, width = ink.shape[0] + 2 * reach, ink.shape[1] + 2 * reach
    result = np.zeros((height, width), dtype=np.float32)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            weight = np.clip(radius + 0.5 - np.hypot(dy, dx), 0, 1)
            if weight > 0:
                moved = padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
                np.maximum(result, weight * moved, out=result)
    return result


def _fit(ink: Floats) -> Floats:
    """Ink of any size -> at most [20, 20] in 0..255, its longer side 20."""
    height, width = ink.shape
    scale = BOX / max(height, width)
    small = _resized(ink, (max(1, round(width * scale)), max(1, round(height * scale))))
    return np.asarray(np.clip(small * (255 / small.max()), 0, 255), dtype=np.float32)


def _center(small: Floats) -> NDArray[np.uint8]:
    """Ink [height, width] -> pixels [28, 28] with the center of mass in the middle, to the nearest pixel."""
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    centers = zip(_center_of_mass(small), small.shape, strict=True)
    row, column = (min(max(round(MIDDLE - center), 0), SIDE - length) for center, length in centers)
    pixels[row : row + small.shape[0], column : column + small.shape[1]] = np.rint(small)
    return pixels


def _center_of_mass(pixels: NDArray[np.generic]) -> tuple[float, float]:
    """Row and column."""
    mass = pixels.astype(np.float64)
    return tuple(float(mass.sum(axis=1 - axis) @ np.arange(mass.shape[axis]) / mass.sum()) for axis in (0, 1))  # type: ignore[return-value]


def _box(ink: Floats | Mask) -> Box:
    """The bounding box of nonzero values."""
    rows, columns = np.nonzero(ink.any(axis=1))[0], np.nonzero(ink.any(axis=0))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _resized(values: Floats, size: tuple[int, int]) -> Floats:
    """[height, width] -> `size` (width, height): bicubic to enlarge, box average to shrink."""
    larger = size[0] > values.shape[1] or size[1] > values.shape[0]
    method = Image.Resampling.BICUBIC if larger else Image.Resampling.BOX
    return np.asarray(Image.fromarray(values).resize(size, method), dtype=np.float32)
