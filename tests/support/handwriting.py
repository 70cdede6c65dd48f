"""Digits as people hand them in: MNIST's own on photographed paper, and drawn with a pen.

    paste_digit(image28, rng)      # an image of MNIST, somewhere on paper with a shadow, as a JPEG gives it
    draw_digit(7, rng)             # strokes of a pen on a page for drawing, in one of the hands of that digit

They were written before the clean-up that they measure (`mnist/inference/handwriting.py`), and are not changed to suit
it.
"""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

Points = NDArray[np.float64]  # [points, 2], x to the right and y down
Stroke = list[tuple[float, float]]

LEAST_CONTRAST = 60  # levels of brightness between paper and ink, before a shadow falls on both
CANVASES = ((280, 280), (400, 400), (500, 500), (560, 560), (640, 480), (800, 600), (480, 640))

# What a hand's skeleton of each digit is: strokes through control points in a box of height 1, about 0.6 wide. A point
# that is given twice is a corner; between corners the pen swings through the points.
HANDS: dict[int, dict[str, list[Stroke]]] = {
    0: {
        "oval": [[(0.32, 0.0), (0.06, 0.2), (0.0, 0.55), (0.2, 0.97), (0.48, 0.85), (0.6, 0.45), (0.5, 0.1), (0.3, 0)]],
        "round": [[(0.4, 0.03), (0.08, 0.2), (0.0, 0.6), (0.3, 1), (0.68, 0.85), (0.8, 0.4), (0.6, 0.05), (0.3, 0.06)]],
        "looped": [
            [(0.42, 0.1), (0.2, 0.04), (0.02, 0.35), (0.06, 0.8), (0.3, 1), (0.55, 0.7), (0.56, 0.25), (0.4, 0.02)]
            + [(0.28, 0.08), (0.36, 0.18), (0.58, 0.1)]
        ],
        "open": [
            [(0.42, 0.08), (0.16, 0.08), (0.0, 0.5), (0.14, 0.92), (0.4, 0.96), (0.6, 0.6), (0.54, 0.2), (0.5, 0.1)]
        ],
    },
    1: {
        "bar": [[(0.3, 0.0), (0.3, 0.5), (0.3, 1.0)]],
        "bent": [[(0.34, 0.0), (0.31, 0.35), (0.3, 0.7), (0.33, 1.0)]],
        "serif": [[(0.08, 0.26), (0.24, 0.12), (0.36, 0.0), (0.36, 0.0), (0.35, 0.5), (0.34, 1.0)]],
        "foot": [
            [(0.1, 0.22), (0.24, 0.1), (0.34, 0.0), (0.34, 0.0), (0.34, 0.5), (0.34, 1.0)],
            [(0.08, 1.0), (0.34, 0.99), (0.6, 1.0)],
        ],
    },
    2: {
        "plain": [
            [(0.04, 0.22), (0.16, 0.03), (0.42, 0.02), (0.56, 0.22), (0.46, 0.5), (0.22, 0.78), (0.0, 1.0), (0.0, 1.0)]
            + [(0.3, 0.98), (0.62, 0.99)]
        ],
        "looped": [
            [
                (0.06, 0.2),
                (0.2, 0.02),
                (0.46, 0.04),
                (0.54, 0.26),
                (0.38, 0.6),
                (0.18, 0.92),
                (0.03, 0.95),
                (0.06, 0.82),
            ]
            + [(0.22, 0.84), (0.4, 0.96), (0.66, 0.92)]
        ],
        "angular": [
            [(0.02, 0.1), (0.26, 0.0), (0.52, 0.06), (0.56, 0.26), (0.3, 0.62), (0.02, 0.96), (0.02, 0.96), (0.34, 1.0)]
            + [(0.64, 0.96)]
        ],
        "swan": [
            [(0.08, 0.3), (0.12, 0.08), (0.34, 0.0), (0.5, 0.18), (0.42, 0.5), (0.2, 0.82), (0.04, 0.96), (0.2, 0.9)]
            + [(0.38, 0.98), (0.6, 1.0), (0.68, 0.88)]
        ],
    },
    3: {
        "round": [
            [
                (0.04, 0.14),
                (0.24, 0.0),
                (0.48, 0.1),
                (0.46, 0.34),
                (0.22, 0.46),
                (0.22, 0.46),
                (0.5, 0.54),
                (0.58, 0.78),
            ]
            + [(0.36, 1.0), (0.1, 0.97), (0.0, 0.84)]
        ],
        "flat": [
            [(0.04, 0.02), (0.3, 0.02), (0.54, 0.0), (0.54, 0.0), (0.38, 0.2), (0.24, 0.4), (0.24, 0.4), (0.52, 0.5)]
            + [(0.56, 0.8), (0.3, 1.0), (0.02, 0.9)]
        ],
        "looped": [
            [(0.06, 0.1), (0.3, 0.0), (0.5, 0.14), (0.4, 0.4), (0.2, 0.5), (0.18, 0.42), (0.3, 0.44), (0.52, 0.6)]
            + [(0.52, 0.88), (0.26, 1.0), (0.02, 0.9)]
        ],
        "soft": [
            [(0.08, 0.06), (0.34, 0.0), (0.46, 0.2), (0.32, 0.44), (0.24, 0.48), (0.44, 0.56), (0.5, 0.78), (0.3, 0.98)]
            + [(0.0, 0.94)]
        ],
    },
    4: {
        "open": [
            [(0.08, 0.02), (0.04, 0.3), (0.02, 0.56), (0.02, 0.56), (0.3, 0.57), (0.6, 0.52)],
            [(0.5, 0.0), (0.47, 0.5), (0.44, 1.0)],
        ],
        "closed": [
            [(0.44, 0.0), (0.22, 0.34), (0.0, 0.66), (0.0, 0.66), (0.34, 0.66), (0.68, 0.64)],
            [(0.46, 0.0), (0.46, 0.5), (0.45, 1.0)],
        ],
        "one stroke": [
            [(0.1, 0.0), (0.06, 0.26), (0.02, 0.5), (0.02, 0.5), (0.28, 0.5), (0.5, 0.46), (0.5, 0.46), (0.52, 0.04)]
            + [(0.52, 0.04), (0.48, 0.5), (0.46, 1.0)]
        ],
        "curved": [
            [(0.1, 0.0), (0.04, 0.24), (0.08, 0.48), (0.3, 0.52), (0.54, 0.4)],
            [(0.56, 0.04), (0.52, 0.5), (0.4, 1.0)],
        ],
    },
    5: {
        "hat": [
            [(0.1, 0.02), (0.09, 0.2), (0.06, 0.42), (0.06, 0.42), (0.3, 0.36), (0.54, 0.52), (0.52, 0.84), (0.26, 1.0)]
            + [(0.0, 0.92)],
            [(0.1, 0.03), (0.34, 0.02), (0.58, 0.0)],
        ],
        "one stroke": [
            [
                (0.58, 0.02),
                (0.34, 0.02),
                (0.12, 0.03),
                (0.12, 0.03),
                (0.1, 0.22),
                (0.06, 0.42),
                (0.06, 0.42),
                (0.34, 0.4),
            ]
            + [(0.54, 0.62), (0.46, 0.9), (0.2, 1.0), (0.0, 0.9)]
        ],
        "swung": [
            [(0.6, 0.0), (0.36, 0.03), (0.2, 0.12), (0.14, 0.34), (0.3, 0.46), (0.48, 0.62), (0.4, 0.9), (0.16, 1.0)]
            + [(0.0, 0.94)]
        ],
        "short hat": [
            [(0.14, 0.08), (0.12, 0.26), (0.1, 0.46), (0.1, 0.46), (0.34, 0.44), (0.5, 0.62), (0.42, 0.9), (0.16, 1.0)]
            + [(0.0, 0.96)],
            [(0.16, 0.06), (0.34, 0.04), (0.54, 0.0)],
        ],
    },
    6: {
        "curved": [
            [(0.46, 0.0), (0.2, 0.2), (0.04, 0.56), (0.1, 0.9), (0.32, 1.0), (0.52, 0.82), (0.44, 0.58), (0.22, 0.58)]
            + [(0.07, 0.76)]
        ],
        "straight": [
            [(0.34, 0.0), (0.18, 0.32), (0.04, 0.68), (0.1, 0.94), (0.34, 1.0), (0.5, 0.82), (0.42, 0.64), (0.22, 0.66)]
            + [(0.08, 0.82)]
        ],
        "big loop": [
            [(0.4, 0.0), (0.16, 0.16), (0.0, 0.5), (0.08, 0.88), (0.34, 1.0), (0.6, 0.76), (0.5, 0.46), (0.26, 0.42)]
            + [(0.04, 0.6)]
        ],
        "open loop": [
            [
                (0.3, 0.0),
                (0.12, 0.24),
                (0.02, 0.62),
                (0.12, 0.94),
                (0.36, 0.98),
                (0.52, 0.78),
                (0.42, 0.6),
                (0.26, 0.64),
            ]
            + [(0.18, 0.72)]
        ],
    },
    7: {
        "plain": [[(0.0, 0.04), (0.3, 0.03), (0.6, 0.0), (0.6, 0.0), (0.42, 0.46), (0.22, 1.0)]],
        "barred": [
            [(0.0, 0.04), (0.3, 0.03), (0.6, 0.0), (0.6, 0.0), (0.42, 0.46), (0.24, 1.0)],
            [(0.16, 0.52), (0.38, 0.5), (0.6, 0.46)],
        ],
        "curved": [[(0.0, 0.12), (0.2, 0.02), (0.44, 0.06), (0.58, 0.04), (0.58, 0.04), (0.38, 0.4), (0.28, 1.0)]],
        "serif": [
            [(0.02, 0.2), (0.03, 0.03), (0.03, 0.03), (0.3, 0.05), (0.6, 0.0), (0.6, 0.0), (0.4, 0.4), (0.26, 1.0)]
        ],
        "soft": [[(0.0, 0.08), (0.28, 0.02), (0.52, 0.06), (0.54, 0.24), (0.44, 0.54), (0.36, 1.0)]],
    },
    8: {
        "crossed": [
            [(0.5, 0.1), (0.28, 0.0), (0.08, 0.16), (0.2, 0.42), (0.46, 0.6), (0.5, 0.88), (0.26, 1.0), (0.04, 0.84)]
            + [(0.16, 0.6), (0.42, 0.4), (0.52, 0.14)]
        ],
        "two rings": [
            [(0.28, 0.0), (0.08, 0.1), (0.1, 0.36), (0.3, 0.46), (0.5, 0.34), (0.5, 0.1), (0.28, 0.0)],
            [(0.3, 0.46), (0.04, 0.6), (0.04, 0.88), (0.28, 1.0), (0.54, 0.88), (0.54, 0.6), (0.3, 0.46)],
        ],
        "open": [
            [
                (0.52, 0.02),
                (0.26, 0.04),
                (0.12, 0.22),
                (0.28, 0.46),
                (0.48, 0.7),
                (0.36, 0.98),
                (0.1, 0.92),
                (0.12, 0.66),
            ]
            + [(0.34, 0.42), (0.54, 0.16)]
        ],
        "small head": [
            [
                (0.42, 0.04),
                (0.22, 0.04),
                (0.16, 0.22),
                (0.34, 0.4),
                (0.56, 0.66),
                (0.44, 0.96),
                (0.14, 0.96),
                (0.04, 0.7),
            ]
            + [(0.22, 0.42), (0.44, 0.22), (0.42, 0.04)]
        ],
    },
    9: {
        "straight": [
            [(0.5, 0.12), (0.28, 0.0), (0.04, 0.16), (0.06, 0.4), (0.28, 0.46), (0.48, 0.28), (0.5, 0.1), (0.5, 0.1)]
            + [(0.48, 0.55), (0.46, 1.0)]
        ],
        "curved": [
            [(0.48, 0.1), (0.26, 0.0), (0.04, 0.18), (0.1, 0.44), (0.32, 0.46), (0.5, 0.24), (0.52, 0.14), (0.52, 0.5)]
            + [(0.42, 0.86), (0.2, 1.0), (0.02, 0.92)]
        ],
        "ring and tail": [
            [(0.3, 0.0), (0.08, 0.08), (0.02, 0.3), (0.2, 0.48), (0.44, 0.36), (0.48, 0.1), (0.3, 0.0)],
            [(0.5, 0.06), (0.46, 0.5), (0.34, 1.0)],
        ],
        "open": [
            [(0.5, 0.06), (0.26, 0.02), (0.06, 0.2), (0.12, 0.44), (0.34, 0.42), (0.5, 0.2), (0.5, 0.2), (0.46, 0.6)]
            + [(0.4, 1.0)]
        ],
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
    colours = paper + page[:, :, None] * (pen - paper)
    colours *= _shadow(page_height, page_width, rng)[:, :, None]
    colours += rng.normal(0, rng.uniform(0, 5), (page_height, page_width, 1))
    return _through_jpeg(colours, int(rng.integers(30, 91)))


def _paper_and_ink(rng: np.random.Generator) -> tuple[Points, Points]:
    """Two colours [3] in 0..255 that differ in brightness by at least LEAST_CONTRAST, either of them the lighter."""
    weights = np.array([0.299, 0.587, 0.114])
    tint = rng.choice([0, 15, 60])  # white and grey paper, yellowed paper, coloured paper
    while True:
        paper, pen = rng.uniform(10, 250, 2)[:, None] + rng.normal(0, tint, (2, 3))
        paper, pen = np.clip(paper, 0, 255), np.clip(pen, 0, 255)
        if abs(float((paper - pen) @ weights)) >= LEAST_CONTRAST:
            return paper, pen


def _shadow(height: int, width: int, rng: np.random.Generator) -> Points:
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


def _through_jpeg(colours: Points, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


# --- digits drawn with a pen


def draw_digit(digit: int, rng: np.random.Generator, hand: str | None = None) -> Image.Image:
    """A digit in strokes of a pen, in mode L or RGB, white on black or black on white, as a page for drawing gives it.

    `hand` is one of HANDS[digit]; any, if it isn't given. The writer's slant, size, width of pen and unsteadiness vary.
    """
    hand = hand or str(rng.choice(list(HANDS[digit])))
    width, height = CANVASES[rng.integers(len(CANVASES))]
    size = min(width, height) * rng.uniform(0.3, 0.85)
    steady = rng.uniform(0.01, 0.035)  # how far a point is missed, in heights of the digit
    stretch = rng.uniform(0.8, 1.35)
    slant = float(np.clip(rng.normal(0.05, 0.16), -0.35, 0.45))
    turn = math.radians(float(np.clip(rng.normal(0, 5), -12, 12)))
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    strokes = []
    for skeleton in HANDS[digit][hand]:
        path = swing(skeleton, steady, rng)
        path = path * [stretch, 1.0]
        path[:, 0] += slant * (0.5 - path[:, 1])
        strokes.append(path @ rotation * size)

    pen = max(2.5, size * math.exp(rng.uniform(math.log(0.025), math.log(0.16))))  # pixels
    low, high = (pick(np.concatenate(strokes), axis=0) for pick in (np.min, np.max))
    extent = high - low + pen + 2
    fit = min(1.0, float(np.min(np.array([width, height]) / extent)))
    room = np.maximum(0, np.array([width, height]) - extent * fit)
    offset = rng.uniform(0, 1, 2) * room + (pen / 2 + 1) * fit
    strokes = [(path - low) * fit + offset for path in strokes]

    by_mouse, pressing = rng.random() < 0.5, rng.random() < 0.3
    oversampling = 4
    page = Image.new("L", (width * oversampling, height * oversampling))
    draw = ImageDraw.Draw(page)
    for path in strokes:
        if by_mouse:  # a few whole pixels, with straight lines between them
            path = np.round(path[:: int(rng.integers(2, 7))])
            path = _resample(path, 1.0)
        pens = np.full(len(path), pen * fit)
        if pressing:
            place = np.linspace(0, 1, len(path))
            pens *= np.interp(place, [0, rng.uniform(0.1, 0.4), rng.uniform(0.5, 0.9), 1], rng.uniform(0.45, 1.0, 4))
        for (x, y), wide in zip(path * oversampling, np.maximum(2, pens) / 2 * oversampling, strict=True):
            draw.ellipse((x - wide, y - wide, x + wide, y + wide), fill=255)
    drawn = page.resize((width, height), Image.Resampling.BOX)
    if rng.random() < 0.5:
        drawn = drawn.point(lambda value: 255 - value)
    return drawn.convert("RGB") if rng.random() < 0.5 else drawn


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
