"""A photograph or a drawing of one digit -> 28 x 28 pixels, prepared as MNIST's were.

    pixels = prepare_digit(read_image(Path("photo.jpg")))     # uint8 [28, 28], or None where there is no digit

MNIST's digits were fitted into a box of 20 x 20 pixels, their proportions kept and their edges smoothed, and laid on
28 x 28 with the centre of their mass in the middle (LeCun et al., "Gradient-based learning applied to document
recognition", 1998). What comes before that, from a photograph to ink, is ours.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are the first outside

SIDE, BOX = 28, 20  # pixels: of MNIST's images, and of the box that a digit is fitted into
MIDDLE = 14.0  # where the centre of mass lies, counted from 0 for the first pixel: between 13.48 and 14.5 in MNIST
SEARCHED = 480  # pixels: longest side at which a digit is looked for
DRAWN = 240  # pixels: longest side at which it is cleaned
BRUSH = 3.0  # the longest side divided by it: what is wider than that is paper
MOST = 2.5  # the longest side divided by it: most of a window of that size is paper
FAINTEST = 0.10  # of the paper's brightness: ink differs by at least that much
CLEAREST = 7.0  # deviations of the paper's noise
SMALLEST = 0.02  # of the picture's longest side: a digit is at least that large
LONGEST = 10  # times the digit's longest side: what the pen has drawn, if it is a digit and no texture
MOST_PIECES = 8  # that a digit may have been broken into
SPECK = 0.06  # of the largest stroke's pixels: less is dirt
STROKE = 2.0  # pixels of the box: a thinner pen is made thicker


def prepare_digit(image: Image.Image) -> Tensor | None:
    """The digit in a picture of mode L or RGB, uint8 [28, 28], white on black, or None where there is none.

    Ink may be darker or lighter than the paper. An image that is already as MNIST's are comes back as it is.
    """
    if image.size == (SIDE, SIDE):
        pixels = np.array(image.convert("L"))
        for candidate in (pixels, 255 - pixels):
            if is_prepared(candidate):
                return torch.from_numpy(candidate)
    place = _find(image)
    if place is None:
        return None
    ink = _clean(image, place)
    if ink is None:
        return None
    return torch.from_numpy(_centre(_fit(ink)))


def is_prepared(pixels: NDArray[np.uint8]) -> bool:
    """Whether an image [28, 28] is as all 70,000 of MNIST are: bright ink, most of it empty, in size and in place."""
    rows, columns = np.nonzero(pixels.any(axis=1))[0], np.nonzero(pixels.any(axis=0))[0]
    if pixels.max() < 254 or np.count_nonzero(pixels) > pixels.size // 2:
        return False
    longest = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    return longest in (BOX - 1, BOX) and all(abs(it - MIDDLE) < 0.55 for it in _centre_of_mass(pixels))


# --- from a picture to ink


def _find(image: Image.Image) -> Box | None:
    """Where the digit is: left, top, right and bottom."""
    gray, factor = _shrunk(image, SEARCHED)
    strength, noise = _contrast(gray)
    ink = _ink(strength, noise)
    foreign = _foreign(ink > 0) if ink is not None else None
    if foreign is not None:
        strength = np.where(_sliding(foreign.astype(np.float32), 7, np.maximum) > 0, 0, strength)
        ink = _ink(strength, noise)
    if ink is None:
        return None
    left, top, right, bottom = (factor * it for it in _box(ink))
    if max(right - left, bottom - top) < max(SMALLEST * max(image.size), 5):
        return None
    return left, top, right, bottom


def _clean(image: Image.Image, place: Box) -> Floats | None:
    """The ink [height, width] in 0..1 of the digit at a place, cropped to it, its pen of an even width."""
    margin = max(place[2] - place[0], place[3] - place[1]) // 4 + 2
    left, top = max(0, place[0] - margin), max(0, place[1] - margin)
    right, bottom = min(image.width, place[2] + margin), min(image.height, place[3] + margin)
    gray, factor = _shrunk(image.crop((left, top, right, bottom)), DRAWN)
    strength, noise = _contrast(gray)
    inside = np.zeros(gray.shape, dtype=bool)  # what was found to be dirt around the digit is so here, too
    rows = slice(max(0, (place[1] - top) // factor - 3), (place[3] - top) // factor + 4)
    columns = slice(max(0, (place[0] - left) // factor - 3), (place[2] - left) // factor + 4)
    inside[rows, columns] = True
    ink = _ink(np.where(inside, strength, 0), noise)
    if ink is None:
        return None
    left, top, right, bottom = _box(ink)
    return _thickened(ink[top:bottom, left:right])


def _shrunk(image: Image.Image, longest: int) -> tuple[Floats, int]:
    """A picture in grey, [height, width] in 0..255, at most `longest` pixels long, and how many times smaller."""
    factor = -(-max(image.size) // longest)
    whole = tuple(max(side - side % factor, min(side, factor)) for side in image.size)
    # of whole blocks only: a part of one at the edge would be noisier than all others
    small = image.reduce(factor, box=(0, 0, whole[0], whole[1])).convert("L")
    if min(small.size) >= 64:
        small = small.filter(ImageFilter.GaussianBlur(0.8))  # the noise of a camera and of a JPEG
    return np.asarray(small, dtype=np.float32), factor


def _ink(strength: Floats, noise: float) -> Floats | None:
    """How much ink lies where, [height, width] in 0..1, nothing outside of strokes; None where there are none."""
    strongest = float(strength.max())
    if strongest < max(FAINTEST, CLEAREST * noise):
        return None
    full = float(np.median(strength[strength > strongest / 2]))
    labels = label_regions(strength > max(full / 4, 3 * noise))
    count = int(labels.max()) + 1
    size = np.bincount(labels.ravel(), minlength=count)
    strong = np.bincount(labels[strength > full / 2], minlength=count)
    size[0] = 0  # the paper
    size[strong == 0] = 0
    kept = size >= max(2, SPECK * size.max())
    if not 1 <= np.count_nonzero(kept) <= MOST_PIECES:
        return None
    strokes = kept[labels] & (strength > full / 2)
    left, top, right, bottom = _box(strokes)
    if _outline(strokes) / 2 > LONGEST * max(right - left, bottom - top):
        return None
    return np.where(kept[labels], np.clip(strength / full, 0, 1), 0).astype(np.float32)


def _foreign(mask: Mask) -> Mask | None:
    """What of a mask is a table beside the paper, a shadow or a frame; None where nothing is.

    It lies along an edge of the picture, or it is a rectangle around other things.
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
        return None  # a digit that was cut out closely
    return np.asarray(along_edge[labels])


def _contrast(gray: Floats) -> tuple[Floats, float]:
    """By how many times the paper's brightness each pixel differs from the paper there, positive for ink, and the
    standard deviation of the paper itself.

    The paper is, first, a smooth surface that most pixels fit. From what most of a wide brush shows, the ink differs
    to one side: darker or lighter. Then the paper is what is left when all that is narrower than the brush is gone.
    """
    light = np.log(gray + 16)  # a shadow takes the same from each then; 16, for black paper is no unit to measure with
    height, width = gray.shape
    shrink = max(1.0, max(gray.shape) / 48)
    small = _resized(light, (max(1, round(width / shrink)), max(1, round(height / shrink))))
    surface = _smooth_surface(small)
    most = _sliding_median(small - surface, max(3, round(max(small.shape) / MOST) | 1))
    sign = 1 if float(((small - surface - most) ** 3).sum()) > 0 else -1
    contrast = sign * np.expm1(light - _resized(surface, (width, height)))
    brush = max(3, round(max(gray.shape) / BRUSH))
    contrast -= _sliding(_sliding(contrast, brush, np.minimum), brush, np.maximum)
    low, lower = np.quantile(contrast, [0.25, 0.05])  # both are of paper, unless three quarters are ink
    noise = float(low - lower) / 0.97  # of a normal distribution, as 0.674 below
    return (contrast - low - 0.674 * noise).astype(np.float32), noise


def _smooth_surface(values: Floats) -> Floats:
    """A polynomial of second degree in x and y, [height, width], fitted to most of the values."""
    height, width = values.shape
    y, x = (it.ravel() for it in np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"))
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=1)
    z = values.ravel().astype(np.float64)
    fitted = np.full_like(z, np.median(z))
    for _ in range(8):
        off = np.abs(z - fitted)
        weight = 1 / (1 + (off / (2 * np.median(off) + 0.01)) ** 2)  # Cauchy's: outliers pull less and less
        scaled = terms * weight[:, None]
        solution = np.linalg.lstsq(scaled.T @ terms, scaled.T @ z, rcond=None)[0]
        fitted = terms @ solution
    return fitted.reshape(height, width).astype(np.float32)


def _sliding(values: Floats, window: int, pick: np.ufunc) -> Floats:
    """The least or the greatest value in a square window around each pixel; beyond the edge the edge goes on."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (window // 2, window - 1 - window // 2)
        values = np.pad(values, padding, mode="edge")
        seen = 1
        while seen < window:  # two windows side by side, or overlapping, make a wider one
            step = min(seen, window - seen)
            length = values.shape[axis] - step
            first, second = values.take(range(length), axis), values.take(range(step, step + length), axis)
            values = pick(first, second)
            seen += step
    return np.asarray(values, dtype=np.float32)


def _sliding_median(values: Floats, window: int) -> Floats:
    """The median in a square window, of an odd number of pixels, around each pixel."""
    padded = np.pad(values, window // 2, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window))
    return np.asarray(np.median(windows, axis=(2, 3)), dtype=np.float32)


def label_regions(mask: Mask) -> NDArray[np.intp]:
    """Numbers [height, width] of the connected regions of a mask, from 1; 0 outside. Corners connect."""
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
    """The length of the edge of what is True; pi / 4 for what steps add to a slanting one."""
    around = np.pad(mask, 1)
    return np.pi / 4 * sum(int(np.count_nonzero(np.diff(around, axis=axis))) for axis in (0, 1))


# --- from ink to MNIST's form


def _thickened(ink: Floats) -> Floats:
    """The ink [height, width], its strokes at least STROKE pixels wide in the box of 20 x 20."""
    covered = ink > 0.5
    missing = STROKE * max(ink.shape) / BOX - 2 * int(covered.sum()) / _outline(covered)  # of a long stroke's width
    radius = missing / 2 / (1 - STROKE / BOX)  # what is added makes the digit larger, too
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
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = _resized(ink, size)
    return np.asarray(np.clip(small * (255 / small.max()), 0, 255), dtype=np.float32)


def _centre(small: Floats) -> NDArray[np.uint8]:
    """Ink [height, width] -> pixels [28, 28] with its centre of mass in the middle, as near as whole pixels allow."""
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    row, column = (
        min(max(round(MIDDLE - centre), 0), SIDE - length)
        for centre, length in zip(_centre_of_mass(small), small.shape, strict=True)
    )
    pixels[row : row + small.shape[0], column : column + small.shape[1]] = np.rint(small)
    return pixels


def _centre_of_mass(pixels: NDArray[np.generic]) -> tuple[float, float]:
    """Row and column, counted from 0 for the first."""
    mass = pixels.astype(np.float64)
    return tuple(float(mass.sum(axis=1 - axis) @ np.arange(mass.shape[axis]) / mass.sum()) for axis in (0, 1))  # type: ignore[return-value]


def _box(ink: Floats | Mask) -> Box:
    """Around all that is not 0."""
    rows, columns = np.nonzero(ink.any(axis=1))[0], np.nonzero(ink.any(axis=0))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _resized(values: Floats, size: tuple[int, int]) -> Floats:
    """[height, width] -> `size`, width and height; averaged where it becomes smaller, smooth where larger."""
    larger = size[0] > values.shape[1] or size[1] > values.shape[0]
    how = Image.Resampling.BICUBIC if larger else Image.Resampling.BOX
    return np.asarray(Image.fromarray(values).resize(size, how), dtype=np.float32)
