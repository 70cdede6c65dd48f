"""Generate a folder of color images in twelve unequal classes, which only the shape of an object tells apart.

python -m tests.support.shapes FOLDER [SEED]
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FEWEST, MOST = 40, 600  # images per class
Point = tuple[float, float]


def regular(corners: int, inner: float = 1.0) -> list[Point]:
    """A regular polygon with radius 1; with `inner`, a star with the inner corners at that radius."""
    count = corners if inner == 1.0 else 2 * corners
    radii = (1.0 if number % 2 == 0 or inner == 1.0 else inner for number in range(count))
    return [
        (radius * math.cos(math.tau * number / count), radius * math.sin(math.tau * number / count))
        for number, radius in enumerate(radii)
    ]


def ring(start: float, end: float, inner: float) -> list[Point]:
    """A part of a ring with outer radius 1, from angle `start` to `end`."""
    angles = np.linspace(start, end, 40)
    outside = [(math.cos(angle), math.sin(angle)) for angle in angles]
    return outside + [(inner * x, inner * y) for x, y in reversed(outside)]


OUTLINES: dict[str, list[Point]] = {
    "arrow": [(-1, -0.25), (0.2, -0.25), (0.2, -0.7), (1, 0), (0.2, 0.7), (0.2, 0.25), (-1, 0.25)],
    "bar": [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
    "corner": [(-0.8, -0.8), (-0.25, -0.8), (-0.25, 0.25), (0.8, 0.25), (0.8, 0.8), (-0.8, 0.8)],
    "cross": [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ],
    "disc": regular(40),
    "half": ring(0, math.pi, 0),
    "hexagon": regular(6),
    "horseshoe": ring(0.4, math.tau - 0.4, 0.55),
    "ring": ring(0, math.tau, 0.6),
    "square": regular(4),
    "star": regular(5, 0.42),
    "triangle": regular(3),
}


def draw(outline: list[Point], rng: np.random.Generator) -> Image.Image:
    """The shape in any color, size, position and direction, on a colored background with distracting spots."""
    width, height = (int(side) for side in rng.integers(72, 180, 2))
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    image = Image.blend(coarse.resize((width, height), Image.Resampling.BICUBIC), _plain(width, height, rng), 0.5)
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 9))):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(2, 6)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_color(rng))
    side = min(width, height)
    radius, angle, squeeze = side * rng.uniform(0.2, 0.42), rng.uniform(0, math.tau), rng.uniform(0.8, 1)
    margin = radius * 0.9
    x, y = (extent / 2 + rng.uniform(-1, 1) * max(0, side / 2 - margin) for extent in (width, height))
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [
        (x + radius * (u * cos - squeeze * v * sin), y + radius * (u * sin + squeeze * v * cos)) for u, v in outline
    ]
    # the same shape in a lighter and a darker shade, so that it stands out from any background
    color = _color(rng)
    pen.polygon(corners, fill=color, outline=tuple(255 * (value < 128) for value in color), width=2)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))
    noisy = np.asarray(image, np.float64) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _color(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _plain(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    return Image.new("RGB", (width, height), _color(rng))


def make_shapes(folder: Path, seed: int = 0, sizes: Callable[[int], int] | None = None) -> Path:
    """Write folder/class/number.jpg; by default FEWEST to MOST images per class, in equal ratios."""
    rng = np.random.default_rng(seed)
    ratio = (MOST / FEWEST) ** (1 / (len(OUTLINES) - 1))
    order = rng.permutation(len(OUTLINES))
    for place, number in enumerate(order):
        name = list(OUTLINES)[number]
        (folder / name).mkdir(parents=True)
        for index in range(sizes(place) if sizes else round(FEWEST * ratio**place)):
            draw(OUTLINES[name], rng).save(folder / name / f"{index}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    make_shapes(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
