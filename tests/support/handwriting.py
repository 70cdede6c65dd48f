"""Digits as people hand them in: MNIST's own on photographed paper, and drawn with a pen.

    paste_digit(image28, rng)      # an image of MNIST, somewhere on paper with a shadow, as a JPEG gives it
    draw_digit(7, rng)             # strokes of a pen on a page for drawing, in one of the hands of that digit

They were written before the clean-up that they measure (`mnist/inference/handwriting.py`), and are not changed to suit
it.
"""

import io
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

Points = NDArray[np.float64]  # [points, 2], x to the right and y down
Stroke = list[tuple[float, float]]

MIN_CONTRAST = 60  # levels of brightness between paper and ink, before a shadow falls on both
CANVASES = ((280, 280), (400, 400), (500, 500), (560, 560), (640, 480), (800, 600), (480, 640))


def _hand(*strokes: str) -> list[Stroke]:
    """Strokes from "x,y x,y ...", in hundredths."""
    return [[(int(x) / 100, int(y) / 100) for x, y in (it.split(",") for it in stroke.split())] for stroke in strokes]


# The skeletons of each digit: strokes through control points in a box of height 1, about 0.6 wide. A repeated point is
# a corner; between corners the pen swings through the points.
HANDS: dict[int, dict[str, list[Stroke]]] = {
    0: {
        "oval": _hand("32,0 6,20 0,55 20,97 48,85 60,45 50,10 30,0"),
        "round": _hand("40,3 8,20 0,60 30,100 68,85 80,40 60,5 30,6"),
        "looped": _hand("42,10 20,4 2,35 6,80 30,100 55,70 56,25 40,2 28,8 36,18 58,10"),
        "open": _hand("42,8 16,8 0,50 14,92 40,96 60,60 54,20 50,10"),
    },
    1: {
        "bar": _hand("30,0 30,50 30,100"),
        "bent": _hand("34,0 31,35 30,70 33,100"),
        "serif": _hand("8,26 24,12 36,0 36,0 35,50 34,100"),
        "foot": _hand("10,22 24,10 34,0 34,0 34,50 34,100", "8,100 34,99 60,100"),
    },
    2: {
        "plain": _hand("4,22 16,3 42,2 56,22 46,50 22,78 0,100 0,100 30,98 62,99"),
        "looped": _hand("6,20 20,2 46,4 54,26 38,60 18,92 3,95 6,82 22,84 40,96 66,92"),
        "angular": _hand("2,10 26,0 52,6 56,26 30,62 2,96 2,96 34,100 64,96"),
        "swan": _hand("8,30 12,8 34,0 50,18 42,50 20,82 4,96 20,90 38,98 60,100 68,88"),
    },
    3: {
        "round": _hand("4,14 24,0 48,10 46,34 22,46 22,46 50,54 58,78 36,100 10,97 0,84"),
        "flat": _hand("4,2 30,2 54,0 54,0 38,20 24,40 24,40 52,50 56,80 30,100 2,90"),
        "looped": _hand("6,10 30,0 50,14 40,40 20,50 18,42 30,44 52,60 52,88 26,100 2,90"),
        "soft": _hand("8,6 34,0 46,20 32,44 24,48 44,56 50,78 30,98 0,94"),
    },
    4: {
        "open": _hand("8,2 4,30 2,56 2,56 30,57 60,52", "50,0 47,50 44,100"),
        "closed": _hand("44,0 22,34 0,66 0,66 34,66 68,64", "46,0 46,50 45,100"),
        "one stroke": _hand("10,0 6,26 2,50 2,50 28,50 50,46 50,46 52,4 52,4 48,50 46,100"),
        "curved": _hand("10,0 4,24 8,48 30,52 54,40", "56,4 52,50 40,100"),
    },
    5: {
        "hat": _hand("10,2 9,20 6,42 6,42 30,36 54,52 52,84 26,100 0,92", "10,3 34,2 58,0"),
        "one stroke": _hand("58,2 34,2 12,3 12,3 10,22 6,42 6,42 34,40 54,62 46,90 20,100 0,90"),
        "swung": _hand("60,0 36,3 20,12 14,34 30,46 48,62 40,90 16,100 0,94"),
        "short hat": _hand("14,8 12,26 10,46 10,46 34,44 50,62 42,90 16,100 0,96", "16,6 34,4 54,0"),
    },
    6: {
        "curved": _hand("46,0 20,20 4,56 10,90 32,100 52,82 44,58 22,58 7,76"),
        "straight": _hand("34,0 18,32 4,68 10,94 34,100 50,82 42,64 22,66 8,82"),
        "big loop": _hand("40,0 16,16 0,50 8,88 34,100 60,76 50,46 26,42 4,60"),
        "open loop": _hand("30,0 12,24 2,62 12,94 36,98 52,78 42,60 26,64 18,72"),
    },
    7: {
        "plain": _hand("0,4 30,3 60,0 60,0 42,46 22,100"),
        "barred": _hand("0,4 30,3 60,0 60,0 42,46 24,100", "16,52 38,50 60,46"),
        "curved": _hand("0,12 20,2 44,6 58,4 58,4 38,40 28,100"),
        "serif": _hand("2,20 3,3 3,3 30,5 60,0 60,0 40,40 26,100"),
        "soft": _hand("0,8 28,2 52,6 54,24 44,54 36,100"),
    },
    8: {
        "crossed": _hand("50,10 28,0 8,16 20,42 46,60 50,88 26,100 4,84 16,60 42,40 52,14"),
        "two rings": _hand("28,0 8,10 10,36 30,46 50,34 50,10 28,0", "30,46 4,60 4,88 28,100 54,88 54,60 30,46"),
        "open": _hand("52,2 26,4 12,22 28,46 48,70 36,98 10,92 12,66 34,42 54,16"),
        "small head": _hand("42,4 22,4 16,22 34,40 56,66 44,96 14,96 4,70 22,42 44,22 42,4"),
    },
    9: {
        "straight": _hand("50,12 28,0 4,16 6,40 28,46 48,28 50,10 50,10 48,55 46,100"),
        "curved": _hand("48,10 26,0 4,18 10,44 32,46 50,24 52,14 52,50 42,86 20,100 2,92"),
        "ring and tail": _hand("30,0 8,8 2,30 20,48 44,36 48,10 30,0", "50,6 46,50 34,100"),
        "open": _hand("50,6 26,2 6,20 12,44 34,42 50,20 50,20 46,60 40,100"),
    },
}


# --- MNIST's digits on paper


def paste_digit(image28: Tensor, rng: np.random.Generator) -> Image.Image:
    """An image of MNIST, uint8 [28, 28], on paper of any shade and in ink of any shade, in mode RGB.

    Its longer side is 60 to 500 pixels; it lies anywhere on a larger picture, under a shadow, with the noise of a
    camera and of a JPEG of quality 30 to 90.
    """
    ink = image28.numpy().astype(np.float64) / 255
    rows, columns = np.nonzero(ink.max(axis=1) > 0)[0], np.nonzero(ink.max(axis=0) > 0)[0]
    ink = np.pad(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 2)  # so that its edge is whole
    size = math.exp(rng.uniform(math.log(60), math.log(500)))
    scale = size / (max(ink.shape) - 4)
    width, height = round(ink.shape[1] * scale), round(ink.shape[0] * scale)
    large = Image.fromarray(ink.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    cover = np.clip(np.array(large, dtype=np.float64), 0, 1)
    if rng.random() < 0.5:  # a pen's edge is sharper than that of an enlarged picture
        cover = 1 / (1 + np.exp(-rng.uniform(6, 14) * (cover - 0.45)))
        cover = (cover - cover.min()) / (cover.max() - cover.min())

    page_width, page_height = (round(side * rng.uniform(1.1, 3.0) + 20) for side in (width, height))
    left, top = rng.integers(0, page_width - width + 1), rng.integers(0, page_height - height + 1)
    page = np.zeros((page_height, page_width))
    page[top : top + height, left : left + width] = cover
    paper, pen = _paper_and_ink(rng)
    colors = paper + page[:, :, None] * (pen - paper)
    colors *= shadow(page_height, page_width, rng)[:, :, None]
    colors += rng.normal(0, rng.uniform(0, 5), (page_height, page_width, 1))
    return through_jpeg(colors, int(rng.integers(30, 91)))


def _paper_and_ink(rng: np.random.Generator) -> tuple[Points, Points]:
    """Two colors [3] in 0..255 that differ in brightness by at least MIN_CONTRAST, either of them the lighter."""
    weights = np.array([0.299, 0.587, 0.114])
    tint = rng.choice([0, 15, 60])  # white and gray paper, yellowed paper, colored paper
    while True:
        paper, pen = rng.uniform(10, 250, 2)[:, None] + rng.normal(0, tint, (2, 3))
        paper, pen = np.clip(paper, 0, 255), np.clip(pen, 0, 255)
        if abs(float((paper - pen) @ weights)) >= MIN_CONTRAST:
            return paper, pen


def shadow(height: int, width: int, rng: np.random.Generator) -> Points:
    """Light [height, width] in 0.4..1: it falls off in some direction, and a soft edge of a shadow may lie across."""
    y, x = np.mgrid[0:height, 0:width]
    angle = rng.uniform(0, 2 * math.pi)
    along = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)  # about -0.7..0.7
    light = 1 - rng.uniform(0, 0.4) * (along / 1.4 + 0.5)
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * math.pi)
        across = (x / width - rng.uniform(0.2, 0.8)) * math.cos(angle)
        across += (y / height - rng.uniform(0.2, 0.8)) * math.sin(angle)
        light *= 1 - rng.uniform(0.1, 0.33) / (1 + np.exp(-across / rng.uniform(0.04, 0.2)))
    return np.asarray(light)


def through_jpeg(colors: NDArray[np.floating[Any]], quality: int) -> Image.Image:
    buffer = io.BytesIO()
    Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


# --- digits drawn with a pen


def draw_digit(digit: int, rng: np.random.Generator, hand: str | None = None) -> Image.Image:
    """A digit in strokes of a pen, in mode L or RGB, white on black or black on white, as a page for drawing gives it.

    `hand` is one of HANDS[digit]; any, if it isn't given. The writer's slant, size, width of pen and unsteadiness vary.
    """
    hand = hand or str(rng.choice(list(HANDS[digit])))
    width, height = CANVASES[rng.integers(len(CANVASES))]
    size = min(width, height) * rng.uniform(0.3, 0.85)
    strokes = [path * size for path in write_strokes(HANDS[digit][hand], any_writer(rng), rng)]

    pen = max(2.5, size * math.exp(rng.uniform(math.log(0.025), math.log(0.16))))  # pixels
    low, high = (pick(np.concatenate(strokes), axis=0) for pick in (np.min, np.max))
    extent = high - low + pen + 2
    fit = min(1.0, float(np.min(np.array([width, height]) / extent)))
    room = np.maximum(0, np.array([width, height]) - extent * fit)
    offset = rng.uniform(0, 1, 2) * room + (pen / 2 + 1) * fit
    strokes = [(path - low) * fit + offset for path in strokes]

    by_mouse, pressing = rng.random() < 0.5, rng.random() < 0.3
    drawn = ink_strokes(strokes, (width, height), pen * fit, rng, by_mouse=by_mouse, pressing=pressing)
    if rng.random() < 0.5:
        drawn = drawn.point(lambda value: 255 - value)
    return drawn.convert("RGB") if rng.random() < 0.5 else drawn


class Writer(NamedTuple):
    """What the digits of one person have in common, besides the hands."""

    steady: float  # how far a point is missed, in heights of the digit
    stretch: float
    slant: float
    turn: float  # radians, counterclockwise


def any_writer(rng: np.random.Generator) -> Writer:
    steady, stretch = rng.uniform(0.01, 0.035), rng.uniform(0.8, 1.35)
    slant = float(np.clip(rng.normal(0.05, 0.16), -0.35, 0.45))
    return Writer(steady, stretch, slant, math.radians(float(np.clip(rng.normal(0, 5), -12, 12))))


def write_strokes(skeletons: list[Stroke], writer: Writer, rng: np.random.Generator) -> list[Points]:
    """The paths of the pen for a digit of height 1."""
    cos, sin = math.cos(writer.turn), math.sin(writer.turn)
    strokes = []
    for skeleton in skeletons:
        path = swing(skeleton, writer.steady, rng) * [writer.stretch, 1.0]
        path[:, 0] += writer.slant * (0.5 - path[:, 1])
        strokes.append(path @ np.array([[cos, sin], [-sin, cos]]))
    return strokes


def ink_strokes(
    strokes: list[Points],
    size: tuple[int, int],
    pen: float,
    rng: np.random.Generator,
    by_mouse: bool = False,
    pressing: bool = False,
) -> Image.Image:
    """Paths in pixels, drawn with a pen of that width, white on black in mode L."""
    oversampling = 4
    page = Image.new("L", (size[0] * oversampling, size[1] * oversampling))
    draw = ImageDraw.Draw(page)
    for path in strokes:
        if by_mouse:  # a few whole pixels, with straight lines between them
            path = np.round(path[:: int(rng.integers(2, 7))])
            path = _resample(path, 1.0)
        pens = np.full(len(path), pen)
        if pressing:
            place = np.linspace(0, 1, len(path))
            pens *= np.interp(place, [0, rng.uniform(0.1, 0.4), rng.uniform(0.5, 0.9), 1], rng.uniform(0.45, 1.0, 4))
        for (x, y), wide in zip(path * oversampling, np.maximum(2, pens) / 2 * oversampling, strict=True):
            draw.ellipse((x - wide, y - wide, x + wide, y + wide), fill=255)
    return page.resize(size, Image.Resampling.BOX)


def swing(skeleton: Stroke, steady: float, rng: np.random.Generator) -> Points:
    """A path [points, 2] of even steps through the control points, each of them missed a little."""
    missed = np.array(skeleton) + rng.normal(0, steady, (len(skeleton), 2))
    corner = [False] + [skeleton[index] == skeleton[index - 1] for index in range(1, len(skeleton))]
    pieces, start = [], 0
    for index in range(1, len(skeleton) + 1):
        if index == len(skeleton) or corner[index]:
            pieces.append(_spline(missed[start:index]))
            if index < len(skeleton):
                missed[index] = missed[index - 1]
                start = index
    path = _resample(np.concatenate(pieces), 0.01)
    tremor = rng.normal(0, 1, (len(path) // 6 + 2, 2)) * rng.uniform(0, 0.008)
    place = np.linspace(0, len(tremor) - 1, len(path))
    return path + np.stack([np.interp(place, np.arange(len(tremor)), tremor[:, axis]) for axis in (0, 1)], axis=1)


def _spline(points: Points) -> Points:
    """The Catmull-Rom spline through [points, 2]."""
    if len(points) == 1:
        return points
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, 24, endpoint=False)[:, None]
    pieces = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        pieces.append(b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))))
    return np.concatenate([*pieces, points[-1:]])


def _resample(path: Points, step: float) -> Points:
    """The same path in even steps of that length."""
    lengths = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    places = np.linspace(0, lengths[-1], max(2, int(lengths[-1] / step) + 1))
    return np.stack([np.interp(places, lengths, path[:, axis]) for axis in (0, 1)], axis=1)
