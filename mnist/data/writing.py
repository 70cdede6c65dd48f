"""Augmentation of handwritten digits: from MNIST's hands to other people's.

parameters = writing_parameters(len(X), seed=0, epoch=1)     # float [B, COLUMNS], the same for any number of processes
X, y = rewrite(X, y, parameters)                            # [B, 1, 28, 28] in [0, 1], [B]

MNIST was written in the United States. Elsewhere a 1 has a flag and a foot, a 7 a bar, a 4 is closed and the tail of a
9 curls. `rewrite` adds such strokes, then slants, stretches and distorts the digit (elastically: Simard et al., "Best
practices for convolutional neural networks", 2003) and varies the width of its strokes. Some digits are stretched
towards a square, as in data sets that fill images of a fixed size.

A share of the images become random strokes with a random class. Their expected loss is that of a uniform distribution,
so the network learns not to be confident about what is not a digit (outlier exposure: Hendrycks et al., 2019).
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from mnist.data.transforms import centers

SIDE = 28  # pixels
LARGEST = [math.radians(9), 0.09, 0.11, 0.22, 0.06, 0.06, 1, 0.6, 0.6]  # angle, zoom, stretch, slant, shifts right and
MOVES = len(LARGEST)  # down, elastic distortion, width of strokes, contrast
NODES = 5  # of the elastic distortion, per side
ELASTIC = 0.04  # standard deviation of a node's displacement, in half sides of the image
UNIFORM = 8  # uniform numbers: whether it is a digit, choices of strokes, and how square it becomes
COLUMNS = MOVES + 2 * NODES**2 + UNIFORM
NOT_DIGITS = 0.1  # share of images
SQUARED = 0.3  # share of images that are stretched towards a square, half of them fully
SHAPES = 16384


def writing_parameters(count: int, seed: int, epoch: int) -> Tensor:
    """[count, COLUMNS]: uniform numbers up to LARGEST, a displacement per node, and uniform numbers in [0, 1).

    They depend only on the arguments, not on the number of processes or on where a run was resumed.
    """
    random = np.random.default_rng([seed, epoch, 2])  # [seed, epoch] is the order of the images
    moves = random.uniform(-1, 1, (count, MOVES)) * LARGEST
    nodes = random.normal(0, 1, (count, 2 * NODES**2))
    uniform = np.minimum(random.random((count, UNIFORM)), 1 - 2**-24)  # float32 would round the largest to 1
    return torch.from_numpy(np.hstack([moves, nodes, uniform])).to(torch.get_default_dtype())


def rewrite(X: Tensor, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Digits X [B, 1, 28, 28] of the classes y [B] in other hands, and their classes; each image by itself."""
    moves, nodes, random = torch.split(parameters.to(X), [MOVES, 2 * NODES**2, UNIFORM], dim=1)
    is_digit = random[:, 0] >= NOT_DIGITS
    X = torch.where(is_digit[:, None, None, None], _with_strokes(X, y, random), _not_digits(X, y, random))
    y = torch.where(is_digit, y, (10 * random[:, 3]).long())
    angle, zoom, stretch, slant, right, down, elastic, width, contrast = moves[:, :, None, None].unbind(1)  # [B, 1, 1]
    wider, taller = _to_square(X, random[:, 7])
    column, row = centers(SIDE, X) - 2 * right, centers(SIDE, X)[0, :, None] - 2 * down  # [B, 1, 28], [B, 28, 1]
    across = column * angle.cos() + row * angle.sin()
    along = row * angle.cos() - column * angle.sin()
    across = (across + slant * along) / ((1 + zoom) * (1 + stretch) * wider)
    along = along / ((1 + zoom) * (1 - stretch) * taller)
    field = F.interpolate(nodes.view(-1, 2, NODES, NODES), (SIDE, SIDE), mode="bicubic", align_corners=True)
    grid = torch.stack([across, along], dim=-1) + ELASTIC * (1 + elastic[..., None]) * field.movedim(1, -1)
    X = F.grid_sample(X, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    width, contrast = width[:, None], contrast[:, None]
    thicker, thinner = F.max_pool2d(X, 3, 1, 1), -F.max_pool2d(-X, 3, 1, 1)
    X = X + 0.7 * width.clamp(min=0) * (thicker - X) - 0.5 * width.clamp(max=0) * (thinner - X)
    # no power or exponential: its last digit may depend on the number of images, and so on the number of processes
    return ((X - 0.5) * (1 + contrast.clamp(min=0)) + 0.5).clamp(0, 1), y


def _to_square(X: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """The factors [B, 1, 1] by which some of the images X [B, 1, 28, 28] are made wider or taller, up to a square."""
    height, width = ((X[:, 0] > 0.5).any(axis).sum(1).clamp(min=4) for axis in (2, 1))
    share = (2 * (random - (1 - SQUARED)) / SQUARED).clamp(0, 1)
    wider = 1 + share * ((height / width).clamp(1, 2.2) - 1)  # a 1 without a flag stays narrow
    taller = 1 + share * ((width / height).clamp(1, 2.2) - 1)
    return wider[:, None, None], taller[:, None, None]


def _segment(start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor], width: Tensor) -> Tensor:
    """Straight strokes [B, 1, 28, 28] with soft edges; x and y of their ends and their widths are [B], in pixels."""
    pixel = torch.arange(SIDE, dtype=width.dtype, device=width.device)
    x0, y0, x1, y1, width = (value[:, None, None] for value in (*start, *end, width))
    dx, dy = x1 - x0, y1 - y0
    px, py = pixel[None, None] - x0, pixel[None, :, None] - y0  # [B, 1, 28], [B, 28, 1]
    share = ((px * dx + py * dy) / (dx * dx + dy * dy + 1e-6)).clamp(0, 1)  # of the nearest point on the stroke
    distance = torch.hypot(px - share * dx, py - share * dy)  # [B, 28, 28]
    return (width / 2 + 0.5 - distance).clamp(0, 1)[:, None]


def _with_strokes(X: Tensor, y: Tensor, random: Tensor) -> Tensor:
    """The digits X [B, 1, 28, 28] with the strokes that another hand adds, if any."""
    ink = X[:, 0]  # [B, 28, 28]
    pixel = torch.arange(SIDE, dtype=X.dtype, device=X.device)
    outline = (ink.diff(dim=1).abs().sum((1, 2)) + ink.diff(dim=2).abs().sum((1, 2))) * math.pi / 4
    width = (2 * ink.sum((1, 2)) / (outline + 1)).clamp(1.2, 4)
    each = torch.arange(len(X), device=X.device)

    def first_row(ink: Tensor) -> Tensor:
        return (ink > 0.5).any(2).to(X.dtype).argmax(1)

    def column(ink: Tensor, row: Tensor) -> Tensor:
        """The mean column of the ink in a row [B]."""
        values = ink[each, row]  # [B, 28]
        return (values * pixel).sum(1) / (values.sum(1) + 1e-6)

    first, last = first_row(ink), SIDE - 1 - first_row(ink.flip(1))
    upper, lower = (column(ink, first), first.to(X.dtype)), (column(ink, last), last.to(X.dtype))  # ends: x, y
    height = lower[1] - upper[1] + 1
    chance, a, b, c, d, e = random[:, 1:7].unbind(1)
    # 1: a flag at its upper end, a foot at its lower end
    dx, dy = lower[0] - upper[0], lower[1] - upper[1] + 1e-6
    angle, length = 0.35 + 0.65 * a, (0.25 + 0.75 * b) * height / torch.hypot(dx, dy)  # between it and the stem
    away, down = dy * angle.sin() - dx * angle.cos(), dx * angle.sin() + dy * angle.cos()
    flag = _segment(upper, (upper[0] - length * away, upper[1] + length * down.clamp(min=0.35 * dy)), width)
    left, right, tilt = (0.15 + 0.25 * c) * height, (0.15 + 0.25 * d) * height, (e - 0.5) * 0.15 * height
    foot = _segment((lower[0] - left, lower[1] - tilt), (lower[0] + right, lower[1] + tilt), width)
    # 4: a stroke that closes it, from the end on the left to the end on the right
    columns = (ink > 0.5).any(1).to(X.dtype)
    is_left = (pixel < ((columns * pixel).sum(1) / (columns.sum(1) + 1e-6))[:, None])[:, None]  # [B, 1, 28]
    (x0, y0), (x1, y1) = (
        (column(half, first_row(half)), first_row(half).to(X.dtype)) for half in (ink * is_left, ink * ~is_left)
    )
    closing = _segment((x0, y0), (x1, y1), width)
    is_narrow = x1 - x0 < 0.45 * height  # otherwise it would look like a 9
    # 7: a bar across its stem
    middle = (first + (0.4 + 0.25 * a) * height).long().clamp(max=SIDE - 1)
    stem, row, half = column(ink, middle), middle.to(X.dtype), (0.15 + 0.2 * b) * height
    bar = _segment((stem - half, row + (c - 0.5) * half), (stem + half, row - (c - 0.5) * half), width)
    # 9: a hook at the end of its tail, of two strokes
    turn = lower[0] - (0.1 + 0.45 * a) * height, lower[1] + 0.06 * height * b
    tip = turn[0] - (0.1 + 0.15 * c) * height, turn[1] - 0.2 * height * d
    hook = torch.maximum(_segment(lower, turn, width), _segment(turn, tip, width))
    for is_chosen, stroke in (
        ((y == 1) & (chance < 0.6), flag),
        ((y == 1) & (chance > 0.35) & (chance < 0.65), foot),
        ((y == 4) & (chance < 0.25) & is_narrow, closing),
        ((y == 7) & (chance < 0.35), bar),
        ((y == 9) & (chance < 0.45), hook),
    ):
        X = torch.maximum(X, torch.where(is_chosen[:, None, None, None], stroke, 0))
    return X


def _not_digits(X: Tensor, y: Tensor, random: Tensor) -> Tensor:
    """Images [B, 1, 28, 28] that are not digits: digits turned by 90 degrees, or shapes."""
    turned = X.transpose(2, 3)  # mirrored, too
    turned = torch.where((random[:, 1] < 0.5)[:, None, None, None], turned, turned.flip(2))
    is_turned = (random[:, 0] < NOT_DIGITS / 4) & (y != 0) & (y != 8)  # which would still be digits
    shape = shapes(X.device)[(random[:, 2] * SHAPES).long()]
    return torch.where(is_turned[:, None, None, None], turned, shape[:, None].to(X.dtype) / 255)


@functools.cache
def shapes(device: torch.device) -> Tensor:
    """Random shapes in the size and place of MNIST's digits, uint8 [SHAPES, 28, 28] on `device`, white on black.

    Most are of two to five lines, arcs, curves and filled areas, composed like letters. One in five is an outline or a
    stroke with a dot, which would be a digit but for a detail.
    """
    random, side = np.random.default_rng(0), 4 * 20
    images = np.zeros((SHAPES, SIDE, SIDE), np.uint8)
    for image in images:
        canvas = Image.new("L", (side, side))
        pen, width = ImageDraw.Draw(canvas), int(random.uniform(side / 20, side / 4.5))
        kind = random.random()
        if kind < 0.1:
            _draw_heart(pen, width, side, random)
        elif kind < 0.2:
            _draw_with_dot(pen, width, side, random)
        else:
            for _ in range(random.integers(2, 6)):
                _draw_part(pen, width, side, random)
        shape = canvas.crop(canvas.getbbox())
        scale = 20 / max(shape.size)
        small = shape.resize([max(1, round(scale * length)) for length in shape.size], Image.Resampling.BOX)
        left, top = (SIDE - small.width) // 2, (SIDE - small.height) // 2
        image[top : top + small.height, left : left + small.width] = np.asarray(small)
    return torch.from_numpy(images).to(device)


def _draw_part(pen: ImageDraw.ImageDraw, width: int, side: int, random: np.random.Generator) -> None:
    marks = np.array([0.1, 0.5, 0.9]) * side  # lines and arcs end near nine points
    (x0, y0), (x1, y1) = np.clip(random.choice(marks, (2, 2)) + random.normal(0, side / 25, (2, 2)), 0, side)
    box = (min(x0, x1), min(y0, y1), max(x0, x1) + width, max(y0, y1) + width)
    kind = random.random()
    if kind < 0.5:
        pen.line((x0, y0, x1, y1), 255, width)
    elif kind < 0.75:
        start = 90 * int(random.integers(4))
        pen.arc(box, start, start + int(random.choice([90, 180, 270])), 255, width)
    elif kind < 0.9:
        points = np.cumsum(random.normal(0, side / 5, (int(random.integers(4, 12)), 2)), axis=0)
        points += side / 2 - points.mean(axis=0)
        pen.line([tuple(point) for point in points.tolist()], 255, width, joint="curve")
    elif kind < 0.95:
        pen.ellipse(box, int(random.integers(80, 256)))
    else:
        pen.polygon(random.uniform(0, side, (int(random.integers(3, 7)), 2)).ravel().tolist(), 255)


def _draw_heart(pen: ImageDraw.ImageDraw, width: int, side: int, random: np.random.Generator) -> None:
    """An outline that would be a 0 without its notch and its tip."""
    t = np.linspace(0, 2 * np.pi, 60)
    x, y = 16 * np.sin(t) ** 3, -13 * np.cos(t) + random.uniform(3, 7) * np.cos(2 * t) + 2 * np.cos(3 * t)
    x, y = x * random.uniform(0.4, 1.2), y + np.cos(4 * t)
    turn = random.normal(0, 0.2)
    points = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=1)
    pen.line([tuple(point) for point in (side / 2 + points * side / 40).tolist()], 255, width, joint="curve")


def _draw_with_dot(pen: ImageDraw.ImageDraw, width: int, side: int, random: np.random.Generator) -> None:
    """A stroke or a hook above a dot: ! would be a 1, and ? a 7."""
    left, right, bottom = random.uniform(0, 0.3) * side, random.uniform(0.6, 1) * side, random.uniform(0.5, 0.7) * side
    middle, low = (left + right) / 2 + random.normal(0, side / 20), 0.75 * side
    if random.random() < 0.6:
        pen.arc((left, 0, right, bottom), random.uniform(150, 230), random.uniform(50, 110), 255, width)
        pen.line((middle, bottom - width / 2, middle + random.normal(0, side / 20), low), 255, width)
    else:
        pen.line((middle + random.normal(0, side / 10), 0, middle, low), 255, width)
    size, top = width * random.uniform(0.8, 1.4), low + random.uniform(0.6, 1.5) * width
    pen.ellipse((middle - size / 2, top, middle + size / 2, top + size), 255)
