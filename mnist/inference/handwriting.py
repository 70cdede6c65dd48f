"""Find the handwritten digits in an image, and prepare each like MNIST's: 28 x 28 pixels.

    found = find_digits(read_image(Path("photo.jpg")))
    found.rows[0][0].pixels, found.rows[0][0].box             # uint8 [28, 28], and where it is in the image

MNIST's digits were resized to fit 20 x 20, keeping the aspect ratio, and centered in 28 x 28 by center of mass (LeCun
et al., "Gradient-based learning applied to document recognition", 1998). The rest is this project's own: ink is
separated from the paper, what belongs to the paper (rules, boxes, the table below it) is removed, and the regions of
ink are grouped into digits in reading order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage

from mnist.inference.predict import Digit, Found

Floats = NDArray[np.float32]
Ints = NDArray[np.intp]
Mask = NDArray[np.bool_]

SIDE, FITTED = 28, 20  # pixels: MNIST's images, and the box around their digits
MIDDLE = 14.0  # row and column of the center of mass, in pixels; 13.48 to 14.5 in MNIST
SEARCHED = (300, 960, 1920)  # pixels of the longest side; the next one if digits have fewer than ENOUGH
ENOUGH = 40  # pixels of a digit's height
MIN_CONTRAST = 0.10  # of ink, relative to the paper's brightness
MIN_LEVELS = 12.0  # the same in gray levels of 0..255, for black paper
MIN_CONTRAST_TO_NOISE = 7.0  # contrast of ink, in standard deviations of the paper's noise
TWO_KINDS = 0.82  # separability of ink and evenly lit paper; of an even gradient it is 0.75
TWO_KINDS_TINY = 0.7  # in images of less than MIN_RULED pixels, where edges are blurred
STROKES = 8  # a stroke is narrower than this part of the longest side, if a shadow or a table is in the image
MIN_BESIDE = 0.05  # of the image, of such a shadow or table
SAMPLES = 96  # pixels of the longest side by which ink and paper are told apart
MIN_SIZE = 0.01  # of a digit, relative to the image's longest side
MIN_PIXELS, MIN_TINY = 10, 7  # of a digit's longer side; in images of less than MIN_RULED pixels
MIN_PART = 0.07  # of a digit's size, such as the dot of a question mark; what is smaller is dirt
MAX_STROKE_LENGTH = 10  # of a digit, in units of its longer side; textures exceed it
MAX_HOLES = 20  # in a digit, some of them left by a grid; whole grids and forms have more
MAX_ASPECT = 2.5  # a digit's width relative to its height
MAX_DIGITS = 100  # in an image; textures exceed it
MAX_REGIONS = 500  # the largest ones
MIN_RULED = 40  # pixels of the shorter side; rules and frames are not looked for in smaller images
MIN_LINE = 24  # pixels of a printed line
MAX_LINE = 0.03  # thickness of a printed line, relative to the image's longest side
MIN_STROKE = 2.0  # width in pixels of the 20 x 20 box; thinner strokes are thickened
CORNERS = np.ones((3, 3), np.int8)  # regions connect at corners, too


NOTHING = Found([], "no digit found")


def find_digits(image: Image.Image) -> Found:
    """The digits in an image of mode L or RGB as uint8 [28, 28], bright on black.

    Ink may be darker or lighter than the paper. An image that already looks like MNIST's is returned unchanged.
    """
    if image.size == (SIDE, SIDE):
        pixels = np.array(image.convert("L"))
        for candidate in (pixels, 255 - pixels):
            if is_prepared(candidate):
                return Found([[Digit(torch.from_numpy(candidate), (0, 0, SIDE, SIDE))]])
    width, height = image.size
    image, margin = _with_margin(image)
    groups: list[list[int]] = []
    for longest in SEARCHED:
        shrunk = _shrunk(image, longest)
        strokes = _ink(shrunk[0])
        if strokes is None:
            return NOTHING
        grouped = _group(strokes)
        count = len(grouped[1])
        if count == 0:
            return NOTHING
        if count < len(groups) / 2:  # at this resolution, lines join the digits
            break
        (gray, factor), ink, (labels, groups, boxes) = shrunk, strokes, grouped
        widths, heights = (boxes[:, 2:] - boxes[:, :2]).T
        touching = widths > MAX_ASPECT * (heights if len(boxes) == 1 else np.maximum(heights, np.median(heights)))
        enough = ENOUGH * min(2, len(groups))  # a page's boxes and rules show at a higher resolution
        if factor == 1 or (np.quantile(heights, 0.25) >= enough and not touching.any()):
            break
    least = MIN_TINY if max(gray.shape) < MIN_RULED else MIN_PIXELS
    large = np.maximum(widths, heights) >= max(MIN_SIZE * max(gray.shape), least / factor)
    kept = np.flatnonzero(large).tolist()
    if not 0 < len(kept) <= MAX_DIGITS:
        return NOTHING
    if touching[kept].any():
        return Found([], "digits touch each other")
    digits = []
    for number in kept:
        left, top, right, bottom = boxes[number].tolist()
        place = np.s_[top:bottom, left:right]
        pixels = _center(_fit(_thickened(np.where(np.isin(labels[place], groups[number]), ink[place], 0))))
        inner = max(0, factor * left - margin), max(0, factor * top - margin)
        outer = min(factor * right - margin, width), min(factor * bottom - margin, height)
        digits.append(Digit(torch.from_numpy(pixels), (*inner, *outer)))
    rows = [[digits[index] for index in row] for row in _rows(boxes[kept])]
    return Found(rows, on_paper=min(gray.shape) >= MIN_RULED)


def is_prepared(pixels: NDArray[np.uint8]) -> bool:
    """Whether an image [28, 28] is like all 70,000 of MNIST: bright ink on black, of their size and position."""
    rows, columns = np.nonzero(pixels.any(axis=1))[0], np.nonzero(pixels.any(axis=0))[0]
    if pixels.max() < 254 or np.count_nonzero(pixels) > pixels.size // 2:
        return False
    longest = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    center = ndimage.center_of_mass(pixels)
    return longest in (FITTED - 1, FITTED) and all(abs(place - MIDDLE) < 0.55 for place in center)


# --- from an image to ink


def _with_margin(image: Image.Image) -> tuple[Image.Image, int]:
    """The image and a margin of paper around it, in pixels: a straight 1 that is cut out tightly hides its paper."""
    if image.width < 3 or image.height < MAX_ASPECT * image.width:
        return image, 0
    gray = np.asarray(image.convert("L").reduce(-(-image.width // SAMPLES)), dtype=np.float32)
    threshold, separability = _otsu(gray)
    if separability < (TWO_KINDS_TINY if image.height < MIN_RULED else TWO_KINDS):
        return image, 0
    third = gray.shape[1] // 3
    for paper in (gray < threshold, gray >= threshold):
        left, middle, right = (paper[:, columns].mean() for columns in np.s_[:third, third:-third, -third:])
        if min(left, right) > 1.2 * middle and paper.mean() < 0.6:  # on both sides, and not much of it
            margin = image.height // 4
            return ImageOps.expand(image.convert("L"), margin, int(np.median(gray[paper]))), margin
    return image, 0


def _shrunk(image: Image.Image, longest: int) -> tuple[Floats, int]:
    """The image in gray, [height, width] in 0..255, reduced to at most `longest` pixels per side, and the factor."""
    factor = -(-max(image.size) // longest)
    whole = tuple(max(side - side % factor, min(side, factor)) for side in image.size)
    # whole blocks only: a partial one at the edge would be noisier
    small = image.reduce(factor, box=(0, 0, whole[0], whole[1])).convert("L")
    if min(small.size) >= 64:
        small = small.filter(ImageFilter.GaussianBlur(0.8))  # reduces camera and JPEG noise
    return np.asarray(small, dtype=np.float32), factor


def _ink(gray: Floats) -> Floats | None:
    """The amount of ink [height, width] in 0..1, zero outside of strokes; None if there is none."""
    strength, noise = _contrast(gray)
    height, width = gray.shape
    rim = round(0.03 * min(height, width))  # a frame around a canvas is no table
    for attempt in range(3):
        least = max(MIN_CONTRAST, MIN_LEVELS / (float(np.median(gray)) + 16), MIN_CONTRAST_TO_NOISE * noise)
        strongest = float(strength.max())
        if strongest < least:
            return None
        full = float(np.median(strength[strength > strongest / 2]))
        mask = strength > max(full / 4, 3 * noise)
        foreign, beside = _foreign(mask, strength > max(full / 8, 1.5 * noise))
        if attempt == 0 and beside[rim : height - rim, rim : width - rim].mean() > MIN_BESIDE:
            strength, noise = _contrast_of_strokes(gray)
        elif foreign.any():
            strength = np.where(foreign, 0, strength)
        else:
            break
    labels, count = ndimage.label(mask, CORNERS)
    strong = np.bincount(labels[strength > full / 2], minlength=count + 1) > 0
    strong[0] = False
    ink = np.where(strong[labels], np.clip(strength / full, 0, 1), 0).astype(np.float32)
    return ink if ink.any() else None


def _contrast(gray: Floats) -> tuple[Floats, float]:
    """Each pixel's contrast relative to the paper's brightness, positive for ink, and the noise (std) of the paper.

    Of three estimates of the paper (uniform, a smooth surface, and one that follows shadows) that one is taken which
    separates two kinds of pixels best (Otsu, 1979). The kind at the image's border is the paper.
    """
    light = np.log(gray + 16)  # makes shadows additive; 16 avoids dividing by black paper
    height, width = gray.shape
    shrink = max(1.0, max(gray.shape) / 48)
    small = _resized(light, (max(1, round(width / shrink)), max(1, round(height / shrink))))
    surface = _smooth_surface(small)
    half = (max(1, small.shape[1] // 2), max(1, small.shape[0] // 2))
    most = ndimage.median_filter(_resized(small - surface, half), max(3, round(max(half) / 2.5) | 1), mode="nearest")
    papers = (np.zeros_like(small), surface, surface + _resized(most, (small.shape[1], small.shape[0])))
    step = -(-max(gray.shape) // SAMPLES)
    sample = light[::step, ::step]  # single pixels: averages over thin strokes would not be as dark as ink
    splits = [_split(np.exp(sample)), *(_split(sample - _resized(it, sample.shape[::-1])) for it in papers[1:])]
    uniform, smooth, shadowed = (separability for separability, _ in splits)
    # a surface also fits ink that is cut out tightly, so it must be clearly better
    is_uniform = uniform > max(TWO_KINDS, smooth - 0.03, shadowed - 0.03)
    best = 0 if is_uniform else 1 + int(shadowed > smooth)
    off = light - _resized(papers[best], (width, height))
    sign = -1 if splits[best][1] else 1
    contrast = sign * np.expm1(off)
    if best == 0:
        contrast = sign * np.expm1(light - np.median(light[contrast <= _otsu(contrast)[0]]))
    else:  # a shadow's edge, too, is paper: remove everything wider than a brush (morphological opening)
        contrast -= _without_strokes(ndimage.grey_opening, contrast, max(3, round(max(gray.shape) / 3)))
    return _above_noise(contrast)


def _contrast_of_strokes(gray: Floats) -> tuple[Floats, float]:
    """Like `_contrast`, of dark strokes on paper with sharp shadows or a table beside it.

    The paper is what remains without strokes (morphological closing), so edges that are wider than these stay with it.
    """
    light = np.log(gray + 16)
    paper = _without_strokes(ndimage.grey_closing, light, max(3, round(max(gray.shape) / STROKES)))
    contrast = -np.expm1(light - paper)
    contrast[np.exp(paper) * contrast < MIN_LEVELS] = 0  # the noise of a dark table
    return _above_noise(contrast)


def _without_strokes(remove: Callable[..., Floats], values: Floats, brush: int) -> Floats:
    """What a morphological opening or closing leaves; the outermost pixels are repeated beyond the image."""
    margin = brush // 2 + 1
    return remove(np.pad(values, margin, "edge"), (brush, brush), mode="nearest")[margin:-margin, margin:-margin]


def _above_noise(contrast: Floats) -> tuple[Floats, float]:
    """A contrast that is 0 for most of the paper, and the noise (standard deviation) of the paper."""
    width = contrast.shape[1]
    low, lower = np.quantile(contrast[::2, ::2], [0.25, 0.05])  # both are paper if at least a quarter of the image is
    local = float(np.quantile(np.abs(np.diff(contrast[::2], axis=1)), 0.25)) / 0.255 if width > 1 else 0.0
    noise = min(float(low - lower) / 0.97, 3 * local)  # for a normal distribution, like 0.674 below
    return (contrast - low - 0.674 * noise).astype(np.float32), noise


def _split(values: Floats) -> tuple[float, bool]:
    """How well a threshold separates ink from paper, 0..1, and whether the paper is above it.

    Most of the border is paper, except in a tiny image of a digit that is cut out tightly. There, strokes divide the
    paper into more parts than the ink has.
    """
    threshold, separability = _otsu(values)
    above, band = values >= threshold, max(1, round(0.06 * max(values.shape)))
    border = np.ones_like(above)
    border[band:-band, band:-band] = False
    share = float(above[border].mean())
    if max(values.shape) < MIN_RULED and abs(share - 0.5) < 0.15:
        sizes = (np.bincount(ndimage.label(kind)[0].ravel())[1:] for kind in (above, ~above))
        upper, lower = (int(np.count_nonzero(size > 2)) for size in sizes)
        if upper != lower:
            return separability, upper > lower
    return separability, share > 0.5


def _otsu(values: Floats) -> tuple[float, float]:
    """The threshold with the largest variance between both sides, and this variance relative to the total."""
    ordered = np.sort(values, axis=None).astype(np.float64)
    below = np.arange(1, len(ordered))
    if len(below) == 0 or ordered[0] == ordered[-1]:
        return float(ordered[0]), 0.0
    total = np.cumsum(ordered)
    means = total[:-1] / below, (total[-1] - total[:-1]) / (len(ordered) - below)
    between = below * (len(ordered) - below) * (means[1] - means[0]) ** 2 / len(ordered) ** 2
    best = int(np.argmax(between))
    return float(ordered[best] + ordered[best + 1]) / 2, float(between[best] / ordered.var())


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


# --- what is not ink


def _foreign(mask: Mask, faint: Mask) -> tuple[Mask, Mask]:
    """The part of a mask that is of the paper (rules) or beside it (frames, tables, shadows), and the latter alone."""
    if min(mask.shape) < MIN_RULED:
        return np.zeros_like(mask), np.zeros_like(mask)
    across, down = _printed([_lines(faint), _lines(faint.T)], mask.shape)
    across, down = _completed(across, faint), _completed(down, faint.T)
    foreign = np.zeros_like(mask)
    for _ in range(2):  # in the first round, junctions of lines are taken for strokes that cross a line
        rest = mask & ~foreign
        foreign = _covered(rest, across) | _covered(rest.T, down).T
    rest = mask & ~foreign
    count = len(across), len(down)
    if (max(count) == 1 and _touches(rest, bool(count[0]))) or (sum(count) == 1 and not rest.any()):
        foreign[:] = False  # a stroke of a digit that is cut out tightly
    beside = _beside(mask & ~foreign)
    return foreign | beside, beside


def _touches(mask: Mask, horizontally: bool) -> bool:
    """Whether it comes close to the left or right edge (or the upper or lower one)."""
    ends = np.flatnonzero(mask.any(axis=0 if horizontally else 1))
    length = mask.shape[1 if horizontally else 0]
    return len(ends) > 0 and bool(ends[0] < 0.03 * length or ends[-1] >= 0.97 * length)


def _lines(mask: Mask) -> Floats:
    """Thin and nearly horizontal lines [lines, 6]: start and end (x), thickness, and the polynomial y(x)."""
    thickest = max(8, round(MAX_LINE * max(mask.shape)))
    thin = mask & (_opened(mask, thickest, 0) == 0)
    unknown = mask & ~thin  # what crosses it
    share, known = (ndimage.uniform_filter1d(it.astype(np.float32), MIN_LINE, 1) for it in (thin, ~unknown))
    dense = (share > 0.8 * known) & (known > 0.3)
    wide = ndimage.maximum_filter1d(dense.view(np.int8), round(0.6 * MIN_LINE), 1)  # to the ends
    labels, _ = ndimage.label(wide & ndimage.grey_closing(mask.view(np.int8), (1, 5)), CORNERS)
    lines = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        region = (labels[rows, columns] == number) & thin[rows, columns]
        inked = np.flatnonzero(region.any(axis=0))
        if len(inked) < MIN_LINE / 2:
            continue
        top, bottom = region.argmax(axis=0), len(region) - 1 - region[::-1].argmax(axis=0)
        height, count = bottom - top + 1, np.diff(region.view(np.int8), axis=0, prepend=0, append=0).clip(0).sum(axis=0)
        length, thickness = inked[-1] - inked[0] + 1, np.median(height[inked])  # of two lines if they lie side by side
        single = np.median(region.sum(axis=0)[inked] / count[inked])
        if length < max(MIN_LINE, 5 * single) or thickness > 3 * single + 2:
            continue
        x = inked[height[inked] <= thickness + 1]
        y = rows.start + (top + bottom)[x] / 2
        curve = np.polyfit(x + columns.start, y, 2 if length > mask.shape[1] / 2 else 1)
        lines.append([*(columns.start + inked[[0, -1]]), thickness, *np.pad(curve, (3 - len(curve), 0))])
    return np.array(lines).reshape(-1, 6)


def _printed(lines: list[Floats], shape: tuple[int, int]) -> list[Floats]:
    """Of nearly horizontal and of nearly vertical lines those that end at each other or at the image's edges."""
    edge = 0.03 * max(shape)
    ends = [(these[:, :2], _curve(these, these[:, :2])) for these in lines]  # x and y [lines, 2]; y and x
    at_edge = [
        (x < edge) | (x > shape[1 - axis] - edge) | (y < edge) | (y > shape[axis] - edge)
        for axis, (x, y) in enumerate(ends)
    ]
    is_rule = [(x[:, 0] < edge) & (x[:, 1] > shape[1 - axis] - edge) for axis, (x, _) in enumerate(ends)]
    meets = []  # [lines, 2, lines of the other direction]
    for axis, (x, y) in enumerate(ends):
        others, y = lines[1 - axis], y[:, :, None]
        reach = MIN_LINE / 8 + others[:, 2]
        near = np.abs(_curve(others, y) - x[:, :, None]) < reach
        near &= (y > others[:, 0] - reach) & (y < others[:, 1] + reach)
        # a stroke of a digit may well reach from one rule to the next; a rule crosses the image, a box's side does not
        meets.append(near & (np.asarray(at_edge[axis].any(axis=1))[:, None, None] | ~is_rule[1 - axis]))
    continued = []  # [lines, 2, lines of the same direction]: on the other side of what crosses the line
    for these, (x, y) in zip(lines, ends, strict=True):
        in_line = np.abs(_curve(these, x[:, :, None]) - y[:, :, None]) < MIN_LINE / 8
        in_line &= in_line[:, ::-1].transpose(2, 1, 0)
        beyond = np.stack([these[:, 1] < x[:, :1], these[:, 0] > x[:, 1:]], axis=1)
        continued.append(in_line & beyond)
    kept = [np.ones(len(these), dtype=bool) for these in lines]
    for _ in range(4):
        for axis in (0, 1):
            reached = (meets[axis] & kept[1 - axis]).any(axis=2) | (continued[axis] & kept[axis]).any(axis=2)
            kept[axis] = (at_edge[axis] | reached).all(axis=1)
    for these, keep, continues in zip(lines, kept, continued, strict=True):  # close the gaps
        start = np.where(continues[:, 0] & keep, these[:, 1], -1).max(axis=1, initial=-1)
        these[:, 0] = np.where(start >= 0, start, these[:, 0])
    return [these[keep] for these, keep in zip(lines, kept, strict=True)]


def _completed(lines: Floats, mask: Mask) -> Floats:
    """The lines, and of evenly spaced ones across the image also those that strokes hide."""
    width = mask.shape[1]
    whole = lines[lines[:, 1] - lines[:, 0] > 0.9 * width]
    place = _curve(whole, np.full((len(whole), 1), width / 2))[:, 0]
    order = np.argsort(place)
    order = order[np.diff(place[order], prepend=-np.inf) > 3]
    if len(order) < 4:
        return lines
    whole, gaps = whole[order], np.diff(place[order])
    spacing = gaps[gaps < 1.5 * np.median(gaps)].mean()
    x, added = np.arange(width), []
    for before, after, steps in zip(whole, whole[1:], gaps / spacing, strict=False):
        count = round(steps)
        for step in range(1, count) if abs(steps - count) < 0.25 else ():
            line = before + (after - before) * step / count
            y = np.rint(np.polyval(line[3:], x)).astype(int).clip(0, len(mask) - 1)
            if mask[y, x].mean() > 0.5:
                added.append(line)
    return np.vstack([lines, *added])


def _curve(lines: Floats, x: Floats) -> Floats:
    """The y of lines [lines, 6] at x, whose last axis or first axis is that of the lines."""
    square, slope, offset = lines[:, 3:].T if x.ndim == 3 else lines[:, 3:].T[:, :, None]
    return np.asarray((square * x + slope) * x + offset)


def _covered(mask: Mask, lines: Floats) -> Mask:
    """The pixels of lines, except where a stroke of the mask crosses or touches them."""
    covered: Mask = np.zeros_like(mask)
    height = len(mask)
    for start, stop, thickness, *curve in lines:
        half = thickness / 2 + 1.5
        x = np.arange(max(0, int(start - half)), min(mask.shape[1], int(stop + half) + 1))
        y = np.floor(np.polyval(curve, x) + np.arange(-half, half + 0.5)[:, None] + 0.5).astype(int)
        inside = (y >= 0) & (y < height)
        y = y.clip(0, height - 1)
        around = np.logical_and(mask[y, x] & ~covered[y, x], inside)[[0, -1]]
        crossed = around.any(axis=0)  # just above or below
        crossed = ndimage.grey_closing(crossed.view(np.int8), round(half) + 1) > 0
        covered[y, x] |= inside & ~crossed
    return covered


def _opened(values: NDArray[Any], length: int, axis: int) -> NDArray[np.int8]:
    """Morphological opening: only runs of at least that length remain."""
    eroded = ndimage.minimum_filter1d(values.view(np.int8), length, axis)
    return np.asarray(ndimage.maximum_filter1d(eroded, length, axis, origin=-1 if length % 2 == 0 else 0))


def _beside(mask: Mask) -> Mask:
    """Regions that are frames, or lie along an edge of the image like a table; not a digit that touches the edge."""
    labels, count = ndimage.label(mask, CORNERS)
    beside = np.zeros(count + 1, dtype=bool)
    quarter = min(mask.shape) // 4
    edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
    rim = max(2, round(0.02 * min(mask.shape)))
    inner = np.bincount(labels[rim:-rim, rim:-rim].ravel(), minlength=count + 1)
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        part = labels[place] == number
        longer, shorter = max(part.shape), min(part.shape)
        if longer < MIN_LINE:
            continue
        contact = [np.count_nonzero(edge == number) for edge in edges]
        band = max(1, shorter // 10)
        sides = (part[:band].any(0), part[-band:].any(0), part[:, :band].any(1), part[:, -band:].any(1))
        is_frame = part.mean() < 0.5 and min(side.mean() for side in sides) > 0.9
        is_rim = inner[number] < 0.1 * np.count_nonzero(part)
        beside[number] = is_frame or is_rim
        if longer < quarter or (np.array(part.shape) > 0.9 * np.array(mask.shape)).all():
            continue  # small, or a digit that is cut out tightly
        for axis, length, edge in zip((0, 0, 1, 1), contact, edges, strict=True):
            share, depth = length / len(edge), part.shape[axis] / mask.shape[axis]
            beside[number] |= share > 0.9 or (share > 0.5 and depth < 0.15)
        is_wide = _opened(_opened(np.pad(part, 1), quarter, 0), quarter, 1).any()
        beside[number] |= is_wide and max(contact) > longer / 2
    return np.asarray(ndimage.maximum_filter(beside[labels], 5))  # with its blurred edge


# --- from ink to digits


def _group(ink: Floats) -> tuple[Ints, list[list[int]], Ints]:
    """The regions of ink [height, width], the numbers of those of each digit, and the digits' boxes [digits, 4]."""
    labels, _ = ndimage.label(ink > 0, CORNERS)
    found = ndimage.find_objects(labels)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in found], dtype=np.intp)
    sides = boxes[:, 2:] - boxes[:, :2]
    sizes, is_flat = sides.max(axis=1), sides[:, 1] < 0.35 * sides[:, 0]  # a dash, or the upper stroke of a 5
    by_size = np.argsort(sizes)
    amounts = np.bincount(labels.ravel(), ink.ravel())[1:]
    total = np.cumsum((amounts if is_flat.all() else amounts * ~is_flat)[by_size])
    # size of a digit: half of the ink is in smaller regions. A line that is left over is longer, but has less ink
    usual = float(sizes[by_size[np.searchsorted(total, total[-1] / 2)]])
    order = [number for number in np.lexsort((-sizes, is_flat)).tolist() if sizes[number] > MIN_PART * usual]
    is_tiny = max(ink.shape) < MIN_RULED  # thin strokes are broken, and there is hardly room for several digits
    groups: list[list[int]] = []
    outer = np.zeros((0, 4), dtype=np.intp)
    for number in order[:MAX_REGIONS]:
        box, side = boxes[number], sides[number]
        around = np.hstack([np.minimum(box[:2], outer[:, :2]), np.maximum(box[2:], outer[:, 2:])])
        together = around[:, 2:] - around[:, :2]
        overlap = side + (outer[:, 2:] - outer[:, :2]) - together  # in x and y; negative: a gap
        gap = np.hypot(*np.maximum(-overlap, 0).T)
        is_part = sizes[number] < (0.9 if is_tiny else 0.68) * usual or is_flat[number]
        fits = (together < (1.5 * usual, 1.35 * usual)).all(axis=1)
        joins = is_part & (gap < (0.4 if is_tiny else 0.25) * usual) & fits
        share = overlap / np.minimum(side, outer[:, 2:] - outer[:, :2])
        joins |= (share[:, 0] > 0.5) & (overlap[:, 1] > -0.08 * usual) & (share[:, 1] < 0.6)  # two halves of an 8
        if joins.any():
            nearest = int(np.argmin(np.where(joins, gap, np.inf)))
            groups[nearest].append(number + 1)
            outer[nearest] = around[nearest]
        elif not (groups and is_flat[number]):
            groups.append([number + 1])
            outer = np.vstack([outer, box])
    kept = []
    for number, (left, top, right, bottom) in enumerate(outer.tolist()):
        size = max(right - left, bottom - top)
        strokes = np.isin(labels[top:bottom, left:right], groups[number]) & (ink[top:bottom, left:right] > 0.5)
        length = _outline(strokes) / 2
        is_dash = right - left > MAX_ASPECT * (bottom - top) and length < 1.5 * size  # touching digits are longer
        is_digit = not is_dash and length < MAX_STROKE_LENGTH * size and _count_holes(strokes) <= MAX_HOLES
        if 0.4 * usual < size < 3 * usual and is_digit:
            kept.append(number)
    return labels, [groups[number] for number in kept], outer[kept]


def _rows(boxes: Ints) -> list[list[int]]:
    """The indices of boxes [N, 4] by row, each from left to right; a row may be slanted."""
    middle, height = (boxes[:, 1] + boxes[:, 3]) / 2, boxes[:, 3] - boxes[:, 1]
    rows: list[list[int]] = []
    for index in np.argsort(boxes[:, 0], kind="stable").tolist():
        # the row whose last digit is at the same height, if there is one
        away = [abs(middle[row[-1]] - middle[index]) for row in rows]
        nearest = int(np.argmin(away)) if away else -1
        if away and away[nearest] < 0.5 * max(height[rows[nearest][-1]], height[index]):
            rows[nearest].append(index)
        else:
            rows.append([index])
    return sorted(rows, key=lambda row: float(np.mean(middle[row])))


def _outline(mask: Mask) -> float:
    """The perimeter of a mask; pi / 4 corrects for the steps of slanted edges."""
    around = np.pad(mask, 1)
    return np.pi / 4 * sum(int(np.count_nonzero(np.diff(around, axis=axis))) for axis in (0, 1))


def _count_holes(mask: Mask) -> int:
    """Parts of the ground that are surrounded, of at least a thousandth of the area."""
    labels, _ = ndimage.label(~np.pad(mask, 1))
    return int(np.count_nonzero(np.bincount(labels.ravel())[1:] > mask.size / 1000)) - 1


# --- from ink to MNIST's format


def _thickened(ink: Floats) -> Floats:
    """The ink [height, width] with strokes at least MIN_STROKE pixels wide in the box of 20 x 20."""
    covered = ink > 0.5
    missing = MIN_STROKE * max(ink.shape) / FITTED - 2 * int(covered.sum()) / max(_outline(covered), 1)
    radius = missing / 2 / (1 - MIN_STROKE / FITTED)  # of the mean stroke width; thickening also enlarges the digit
    if radius < 0.5:
        return ink
    padded = np.pad(ink, int(np.ceil(radius)) + 1)
    reach = ndimage.distance_transform_edt(padded <= 0.5)
    return np.asarray(np.maximum(padded, np.clip(radius + 0.5 - reach, 0, 1)), dtype=np.float32)


def _fit(ink: Floats) -> Floats:
    """Ink of any size -> at most [20, 20] in 0..255, its longer side 20."""
    rows, columns = np.nonzero(ink.any(axis=1))[0], np.nonzero(ink.any(axis=0))[0]
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    scale = FITTED / max(height, width)
    small = _resized(ink, (max(1, round(width * scale)), max(1, round(height * scale))))
    return np.asarray(np.clip(small * (255 / small.max()), 0, 255), dtype=np.float32)


def _center(small: Floats) -> NDArray[np.uint8]:
    """Ink [height, width] -> pixels [28, 28] with the center of mass in the middle, to the nearest pixel."""
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    centers = zip(ndimage.center_of_mass(small), small.shape, strict=True)
    row, column = (min(max(round(MIDDLE - center), 0), SIDE - length) for center, length in centers)
    pixels[row : row + small.shape[0], column : column + small.shape[1]] = np.rint(small)
    return pixels


def _resized(values: Floats, size: tuple[int, int]) -> Floats:
    """[height, width] -> `size` (width, height): bicubic to enlarge, box average to shrink."""
    larger = size[0] > values.shape[1] or size[1] > values.shape[0]
    method = Image.Resampling.BICUBIC if larger else Image.Resampling.BOX
    return np.asarray(Image.fromarray(values).resize(size, method), dtype=np.float32)
