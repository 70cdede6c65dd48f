"""Pages of handwritten digits with the text on them, pages without digits, and drawings of other things.

    make_page(rng, digits_of, "column", "ruled")  # digits_of: MNIST's images and labels, or None for generated hands
    make_empty_page(rng, "squared")
    make_non_digit(rng, "letter")

They were written without knowledge of the reader that they measure, and are not changed to suit it.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from tests.support.handwriting import (
    HANDS,
    Points,
    Stroke,
    _hand,
    any_writer,
    ink_strokes,
    shadow,
    through_jpeg,
    write_strokes,
)

Cover = NDArray[np.floating[Any]]  # [height, width]: 0 is paper, 1 is ink
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are outside
Color = tuple[int, int, int]
Write = Callable[[int, float], Cover]  # a digit of a height in pixels, cropped to its ink

KINDS = ("number", "column", "page")
PAPERS = ("plain", "ruled", "squared", "form")
GROUNDS = ("black", *PAPERS, "photo", "photo of ruled", "photo of squared", "photo of form")
EMPTY_KINDS = (*GROUNDS, "dust", "table")
NON_DIGITS = ("letter", "scribble")
MAX_DIGITS = 60  # on a page
MIN_SIDE = 200  # pixels of an image


class Page(NamedTuple):
    image: Image.Image  # L or RGB
    text: str  # rows joined by newlines, without spaces
    boxes: list[Box]  # of each digit's ink, in the order of the text


def make_page(
    rng: np.random.Generator, digits_of: tuple[Tensor, Tensor] | None, kind: str, ground: str = "plain"
) -> Page:
    """A page of one of KINDS on one of GROUNDS, by one writer with one pen.

    `digits_of` is MNIST's images, uint8 [n, 28, 28], and their labels. If it is None, the digits are strokes of HANDS.
    Digits are about 24 to 90 pixels high, up to 200 in a "number".
    """
    rows = _make_numbers(rng, kind)
    longest = max(sum(map(len, row)) + len(row) - 1 for row in rows)
    paper = _paper_of(ground)
    limits = 200 if kind == "number" else 90, (750 if paper == "form" else 1200) / longest, 650 / len(rows)
    height = _log_uniform(rng, 24, min(limits))  # by these, no side is longer than about 2000 pixels
    write = _mnist_writer(rng, *digits_of, height) if digits_of else _generated_writer(rng, height)
    spacing, pitch = _choose_spacing(rng, paper, height)
    written = [[[write(digit, _vary(rng, height)) for digit in number] for number in row] for row in rows]
    glyphs, frames = _lay_out(rng, written, height, pitch, paper)
    edges = np.array(
        [(left, bottom - len(cover), left + cover.shape[1], bottom) for left, bottom, cover in glyphs] + frames
    )
    low, high = edges.min(axis=0)[:2], edges.max(axis=0)[2:]
    before, after = rng.uniform(0.3, 2, (2, 2)) * height
    missing = np.maximum(0, MIN_SIDE - (high - low + before + after)) / 2
    origin = before + missing - low
    sheet = Sheet(rng, ground, high - low + before + after + 2 * missing)
    sheet.rule(rng, spacing, origin)
    for frame in frames:
        sheet.frame(np.array(frame) + [*origin, *origin])
    boxes = [sheet.write(cover, left + origin[0], bottom + origin[1]) for left, bottom, cover in glyphs]
    text = "\n".join("".join(str(digit) for number in row for digit in number) for row in rows)
    return Page(sheet.finish(rng), text, boxes)


def make_empty_page(rng: np.random.Generator, kind: str) -> Image.Image:
    """A ground of EMPTY_KINDS without digits. "table" is a photo of paper with a table beyond one edge."""
    ground = {"dust": "plain", "table": "photo"}.get(kind, kind)
    height, size = _log_uniform(rng, 24, 90), rng.uniform(220, 1100, 2)
    sheet = Sheet(rng, ground, size)
    sheet.rule(rng, _choose_spacing(rng, _paper_of(ground), height)[0], rng.uniform(0, 100, 2))
    if _paper_of(ground) == "form":
        box = np.array([rng.uniform(1.1, rng.choice([1.6, 6])), rng.uniform(1.3, 2)]) * height
        gap = np.array([rng.choice([0, 0.25]), rng.uniform(0.2, 1)]) * height
        start = rng.uniform(0.3, 1, 2) * height
        fitting = np.maximum(1, (size - start - height / 3) // (box + gap))
        columns, lines = np.minimum(fitting, rng.integers(1, 11, 2)).astype(int)
        for corner in (start + (box + gap) * [column, line] for line in range(lines) for column in range(columns)):
            sheet.frame(np.concatenate([corner, corner + box]))
    if kind == "dust":
        for _ in range(rng.integers(3, 15)):
            (x, y), (wide, tall) = rng.uniform(0, 1, 2) * sheet.image.size, rng.uniform(0.4, 1.6, 2)
            sheet.draw.ellipse((x - wide, y - tall, x + wide, y + tall), fill=_mix(sheet.paper, sheet.pen, 0.6))
    return sheet.finish(rng, table=kind == "table")


# --- text and layout


def _make_numbers(rng: np.random.Generator, kind: str) -> list[list[list[int]]]:
    """Rows of numbers of digits."""
    if kind == "number":
        lengths = [[int(rng.integers(2, 9))]]
    elif kind == "column":
        longest = int(rng.integers(1, 5))
        lengths = [[int(rng.integers(1, longest + 1))] for _ in range(rng.integers(2, 9))]
    else:
        most, left, lengths = int(rng.integers(1, 4)), MAX_DIGITS, []
        for _ in range(rng.integers(2, 11)):
            row = [int(length) for length in rng.integers(1, 5, rng.integers(1, most + 1))]
            if sum(row) <= left:
                lengths.append(row)
                left -= sum(row)
    return [[[int(digit) for digit in rng.integers(0, 10, length)] for length in row] for row in lengths]


def _choose_spacing(rng: np.random.Generator, paper: str, height: float) -> tuple[float, float]:
    """The distance of the printed lines, and that of the rows of digits, both in pixels."""
    if paper == "ruled":
        spacing = rng.choice([rng.uniform(1.0, 1.15), rng.uniform(1.45, 1.7)]) * height
        return spacing, spacing * (1 if spacing > 1.4 * height else 2)
    if paper == "squared":
        spacing = height / rng.choice([2, 3]) * rng.uniform(0.95, 1.1)
        return spacing, spacing * (math.ceil(1.45 * height / spacing) + rng.integers(0, 2))
    return 0.0, rng.uniform(1.9, 2.6) * height if paper == "form" else rng.uniform(1.45, 2.2) * height


def _lay_out(
    rng: np.random.Generator, rows: list[list[list[Cover]]], height: float, pitch: float, paper: str
) -> tuple[list[tuple[float, float, Cover]], list[tuple[float, float, float, float]]]:
    """Left, bottom and ink of every digit, and the boxes of a form; the first row stands at 0."""
    gap, align = rng.uniform(0.15, 0.45) * height, rng.choice([0, 0.5, 1], p=[0.45, 0.1, 0.45])
    in_cells, pad = paper == "form" and rng.random() < 0.6, rng.uniform(0.15, 0.35) * height
    cell = max(glyph.shape[1] for row in rows for number in row for glyph in number) + 2 * pad
    cell_gap = rng.choice([0, rng.uniform(0.1, 0.3)]) * height
    climb = rng.normal(0, 0.012) if paper == "plain" else 0.0
    laid = []  # per row: its width, glyphs and boxes
    for row in rows:
        glyphs: list[tuple[float, Cover]] = []
        boxes, x = [], 0.0
        for number in row:
            start = x
            for index, glyph in enumerate(number):
                if in_cells:
                    shift = rng.uniform(-0.7, 0.7) * pad if rng.random() < 0.95 else rng.choice([-1.1, 1.1]) * pad
                    boxes.append((x, x + cell))
                    glyphs.append((x + (cell - glyph.shape[1]) / 2 + shift, glyph))
                    x += cell + cell_gap
                else:
                    if index:
                        x = glyphs[-1][0] + _advance(glyphs[-1][1], glyph, _vary(rng, gap, 0.3), height)
                    glyphs.append((x, glyph))
                    x += glyph.shape[1]
            if not in_cells:
                boxes.append((start - pad, x + pad))
            x += rng.uniform(0.9, 1.6) * height
        laid.append((max(right for _, right in boxes), glyphs, boxes))
    widest = max(width for width, _, _ in laid)
    listed = all(len(row) == 1 for row in rows)  # one number below the other
    if listed and not in_cells:  # a list of equal boxes, one number in each
        laid = [(widest, glyphs, [(-pad, widest)]) for _, glyphs, _ in laid]

    placed, frames = [], []
    for index, (width, glyphs, boxes) in enumerate(laid):
        base, slope = index * pitch, climb + (rng.normal(0, 0.004) if paper == "plain" else 0.0)
        indent = (widest - width) * (align if listed else 0)
        indent += rng.uniform(-0.15, 0.15) * height if paper != "form" else 0
        for left, glyph in glyphs:
            bottom = base - slope * left + rng.uniform(-0.05, 0.06) * height
            placed.append((left + indent, bottom, glyph))
        if paper == "form":
            frames += [(left + indent, base - 1.1 * height - pad, right + indent, base + pad) for left, right in boxes]
    return placed, frames


def _advance(before: Cover, after: Cover, gap: float, height: float) -> float:
    """From the left of one digit to the left of the next, for a gap between their ink. Slanted digits may overlap."""
    tall, reach = max(len(before), len(after)), max(1, round(0.1 * height))
    ends, starts = np.full(tall + 2 * reach, -1e9), np.full(tall, 1e9)
    inked = before > 0.2
    ends[reach + tall - len(before) : reach + tall] = np.where(
        inked.any(axis=1), before.shape[1] - inked[:, ::-1].argmax(axis=1), -1e9
    )
    inked = after > 0.2
    starts[tall - len(after) :] = np.where(inked.any(axis=1), inked.argmax(axis=1), 1e9)
    nearest = np.lib.stride_tricks.sliding_window_view(ends, 2 * reach + 1).max(axis=1)
    return float(max(np.max(nearest - starts) + gap, before.shape[1] - 0.15 * height))


# --- writers


def _generated_writer(rng: np.random.Generator, height: float) -> Write:
    writer, pressing = any_writer(rng), bool(rng.random() < 0.4)
    hands = {digit: HANDS[digit][str(rng.choice(list(HANDS[digit])))] for digit in HANDS}
    pen = max(2.0, height * _log_uniform(rng, 0.04, 0.14))

    def write(digit: int, size: float) -> Cover:
        turned = writer._replace(slant=writer.slant + rng.normal(0, 0.04), turn=writer.turn + rng.normal(0, 0.04))
        paths = [path * (size - pen) for path in write_strokes(hands[digit], turned, rng)]
        return _crop(_ink(paths, pen, rng, pressing))

    return write


def _ink(paths: list[Points], pen: float, rng: np.random.Generator, pressing: bool) -> Cover:
    low, high = (pick(np.concatenate(paths), axis=0) for pick in (np.min, np.max))
    width, height = np.ceil(high - low + pen + 3).astype(int)
    paths = [path - low + pen / 2 + 1 for path in paths]
    return np.asarray(ink_strokes(paths, (width, height), pen, rng, pressing=pressing), np.float32) / 255


def _mnist_writer(rng: np.random.Generator, images: Tensor, labels: Tensor, height: float) -> Write:
    """MNIST's digits, chosen among a few so that a page has one pen and one slant."""
    known, pixels = labels.numpy(), images.numpy()
    model, sharpness = _style(pixels[rng.integers(len(pixels))]), rng.uniform(1, 4)

    def write(digit: int, size: float) -> Cover:
        candidates = pixels[rng.choice(np.flatnonzero(known == digit), 12)]
        image = min(candidates, key=lambda candidate: float(np.abs(_style(candidate) - model) @ [1.0, 3.0]))
        cover = np.pad(_crop(image.astype(np.float32) / 255), 2)
        scale = size / (max(cover.shape[0], 0.9 * cover.shape[1]) - 4)
        width, height = round(cover.shape[1] * scale), round(cover.shape[0] * scale)
        large = Image.fromarray((255 * cover).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        large = large.filter(ImageFilter.GaussianBlur(0.5 * scale))  # without it, the steps of the pixels are seen
        steep = 5 + sharpness * scale  # a pen's edge stays as sharp on a larger digit
        cover = 1 / (1 + np.exp(-steep * (np.asarray(large) / 255 - 0.4)))
        return _crop((cover - cover.min()) / (cover.max() - cover.min()))

    return write


def _style(image: NDArray[np.uint8]) -> Points:
    """The width of the strokes in pixels and the slant of an image of MNIST."""
    inked = np.pad(image > 100, 1)
    y, x = np.nonzero(inked)
    edges = np.count_nonzero(np.diff(inked, axis=0)) + np.count_nonzero(np.diff(inked, axis=1))
    return np.array([2 * len(y) / edges, -np.mean((x - x.mean()) * (y - y.mean())) / (np.var(y) + 1)])


def _crop(cover: Cover) -> Cover:
    rows, columns = (np.flatnonzero((cover > 0.1).any(axis=axis)) for axis in (1, 0))
    return cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _vary(rng: np.random.Generator, value: float, share: float = 0.15) -> float:
    return value * rng.uniform(1 - share, 1 + share)


# --- paper and camera


def _paper_of(ground: str) -> str:
    paper = ground.removeprefix("photo of ")
    return paper if paper in PAPERS else "plain"


def _mix(one: Color, other: Color, share: float) -> Color:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


BLACK, BLUE, RED = (35, 35, 38), (40, 70, 170), (200, 60, 55)
PENS: tuple[Color, ...] = (BLACK, (15, 15, 18), (30, 50, 130), (20, 30, 90), (85, 85, 90), (170, 35, 40))
COLORED_PAPER: tuple[Color, ...] = ((245, 236, 205), (205, 225, 240), (250, 215, 220), (200, 170, 130), (225, 235, 200))


class Sheet:
    """Paper of a size in pixels [width, height], on which lines and ink are put before it is scanned or photographed.

    A photo is rotated by up to 3 degrees. `cut` and the same again lie around the sheet, so that no corner is empty.
    """

    def __init__(self, rng: np.random.Generator, ground: str, size: Points) -> None:
        self.paper_kind, self.photographed = _paper_of(ground), ground.startswith("photo")
        self.angle = math.radians(rng.uniform(-3, 3)) if self.photographed else 0.0
        self.cut = math.ceil(abs(math.sin(self.angle)) * max(size) / 2)
        shade = int(rng.integers(235, 256)) if rng.random() < 0.6 else 255
        self.paper: Color = (shade, shade, shade)
        if self.photographed and rng.random() < 0.5:
            self.paper = COLORED_PAPER[rng.integers(len(COLORED_PAPER))]
        self.pen = PENS[rng.integers(len(PENS))]
        line = (self.pen, BLACK, BLUE, BLUE, RED)[rng.integers(5 if self.paper_kind == "form" else 4)]
        self.line = line if rng.random() < 0.25 else _mix(self.paper, line, rng.uniform(0.25, 0.9))
        if ground == "black":
            self.paper, self.pen = _mix((0, 0, 0), BLACK, rng.random()), _mix((255, 255, 255), BLUE, 0.2 * rng.random())
        width, height = (math.ceil(side) + 4 * self.cut for side in size)
        self.image = Image.new("RGB", (width, height), self.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.ink = np.zeros((height, width), np.float32)
        self.thick = rng.uniform(0.6, 1.0)

    def rule(self, rng: np.random.Generator, spacing: float, origin: Points) -> None:
        """Print the lines of ruled or squared paper, one of each direction through a point."""
        if self.paper_kind not in ("ruled", "squared"):
            return
        (width, height), (x, y) = self.image.size, origin + 2 * self.cut + rng.uniform(-0.1, 0.1) * spacing
        thick = max(1, round(spacing * rng.uniform(0.01, 0.035)))
        for place in np.arange(y % spacing, height, spacing):
            self.draw.line((0, place, width, place), self.line, thick)
        if self.paper_kind == "squared":
            for place in np.arange((x + rng.uniform(0, spacing)) % spacing, width, spacing):
                self.draw.line((place, 0, place, height), self.line, thick)
        elif rng.random() < 0.35:
            place = x - rng.uniform(0.15, 0.5) * spacing
            self.draw.line((place, 0, place, height), _mix(self.paper, RED, rng.uniform(0.4, 1)), thick)

    def frame(self, box: Points) -> None:
        """Print a box of a form: left, top, right, bottom."""
        thick = max(1, round((box[3] - box[1]) * 0.03 * self.thick))
        self.draw.rectangle(tuple((box + 2 * self.cut).round()), outline=self.line, width=thick)

    def write(self, cover: Cover, left: float, bottom: float) -> Box:
        """Put ink on the paper. Returns the ink's box in the image that `finish` returns."""
        x, y = round(left) + 2 * self.cut, round(bottom) - len(cover) + 2 * self.cut
        place = self.ink[y : y + len(cover), x : x + cover.shape[1]]
        np.maximum(place, cover, out=place)
        rows, columns = np.nonzero(cover > 0.3)
        points = np.stack([columns + x, rows + y], axis=1) + 0.5
        cos, sin, center = math.cos(self.angle), math.sin(self.angle), np.array(self.image.size) / 2
        points = (points - center) @ np.array([[cos, -sin], [sin, cos]]) + center - self.cut
        (left, top), (right, bottom) = points.min(axis=0) - 0.5, points.max(axis=0) + 0.5
        return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)

    def finish(self, rng: np.random.Generator, table: bool = False) -> Image.Image:
        """The image that a scanner or a camera takes of the sheet, with a table beyond one edge if asked for."""
        width, height = self.image.size
        grain = rng.random((height // 2 + 1, width // 2 + 1), np.float32) * rng.choice([0, rng.uniform(0.1, 0.5)])
        dry = np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BILINEAR))
        mask = Image.fromarray((255 * self.ink * (1 - dry)).astype(np.uint8))
        self.image.paste(self.pen, mask=mask)
        if not self.photographed:
            image = self.image
            if rng.random() < 0.4:
                image = _scan(image.filter(ImageFilter.BoxBlur(rng.uniform(0, 0.6))), 1.0, rng.uniform(0, 3), rng)
            return image.convert("L") if rng.random() < 0.4 else image
        image = self.image.rotate(math.degrees(self.angle), Image.Resampling.BILINEAR, fillcolor=self.paper)
        image = image.crop((self.cut, self.cut, width - self.cut, height - self.cut))
        width, height = image.size
        if table:
            place, lean = rng.uniform(0.05, 0.25) * width, rng.uniform(-0.05, 0.05) * height
            image = image.rotate(90 * rng.integers(4), expand=True)
            ImageDraw.Draw(image).polygon(
                [(0, 0), (place + lean, 0), (place - lean, image.height), (0, image.height)],
                fill=_mix((120, 80, 50), (40, 40, 45), rng.random()),
            )
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1.0)))
        light = shadow(image.height // 8, image.width // 8, rng).astype(np.float32)  # smooth: enlarged afterwards
        light = np.asarray(Image.fromarray(light).resize(image.size, Image.Resampling.BICUBIC))[:, :, None]
        return _scan(image, light, rng.uniform(0.5, 5), rng)


def _scan(image: Image.Image, light: Cover | float, noise: float, rng: np.random.Generator) -> Image.Image:
    colors = np.asarray(image, np.float32) * light
    colors += rng.standard_normal((*colors.shape[:2], 1), np.float32) * noise
    return through_jpeg(colors, int(rng.integers(45, 96)))


# --- drawings of other things

# Letters that nobody takes for a digit in any hand. Left out, with what they may be read as: C D O Q U a c o u (0),
# I J L T f i j l r t (1, 7), N Z n z (2, 7), H Y h y (4), S s (5), G b d e (6), V v (7, as in Arabic), B (8),
# P g p q (9).
LETTERS = "AEFKMRWXkmwx"
FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif DejaVuSerif-Italic "
    "STIXGeneral STIXGeneralItalic STIXGeneralBol cmr10 cmss10 cmtt10"
).split()

# Control points as in HANDS: a repeated point is a corner. " / " lifts the pen.
DRAWINGS = {
    "heart": "50,30 50,30 38,8 14,6 2,28 14,58 50,98 50,98 86,58 98,28 86,6 62,8 50,30 50,30",
    "right arrow": "0,50 50,49 100,50 / 70,22 70,22 100,50 100,50 72,80",
    "left arrow": "100,46 50,50 0,52 / 28,26 28,26 0,52 0,52 32,76",
    "question mark": "12,24 18,6 40,0 62,10 64,30 46,46 38,58 38,72 / 38,94 38,97 39,94",
    "star": "50,0 50,0 80,100 80,100 0,36 0,36 100,36 100,36 20,100 20,100 50,0",
    "asterisk": "50,0 50,100 / 6,25 94,76 / 94,24 6,76",
    "cross": "0,0 50,50 100,100 / 100,2 50,48 2,100",
    "plus": "50,0 50,100 / 0,50 100,50",
    "house": "10,99 10,99 10,45 10,45 50,5 50,5 90,45 90,45 90,99 90,99 10,99 / 40,99 40,70 40,70 60,70 60,70 60,99",
    "smile": "50,0 10,15 0,50 15,88 50,99 86,86 99,50 88,14 50,0 / 32,30 32,38 / 66,30 66,38 / 24,62 36,78 52,82 76,62",
    "man": "50,0 38,8 40,22 52,26 62,14 50,0 / 50,26 50,64 / 20,36 50,42 80,34 / 24,100 50,64 50,64 76,100",
    "flower": "50,30 30,5 70,5 50,30 85,12 90,45 50,30 75,65 35,65 50,30 10,50 12,12 50,30 / 50,34 52,70 48,100",
    "tree": "44,100 44,70 44,70 10,70 10,70 50,0 50,0 90,70 90,70 56,70 56,70 56,100 / 36,38 64,38",
    "fish": "100,50 70,25 35,30 0,70 0,70 4,50 0,30 0,30 35,70 70,75 100,50 / 80,44 81,46",
    "waves": "0,30 12,15 25,30 37,45 50,30 62,15 75,30 88,45 100,30 / 0,70 12,55 25,70 37,85 50,70 62,55 75,70",
    "envelope": "0,20 0,20 100,20 100,20 100,80 100,80 0,80 0,80 0,20 / 0,20 50,56 50,56 100,20",
}
SCRIBBLES = (*DRAWINGS, "tangle", "coil", "spiral", "zigzag", "hatching", "cross-hatching")


def make_non_digit(rng: np.random.Generator, kind: str) -> Image.Image:
    """A printed "letter" or a "scribble", black on white or white on black, as `draw_digit` gives a digit."""
    image = Image.new("L", (int(rng.integers(MIN_SIDE, 600)), int(rng.integers(MIN_SIDE, 600))))
    size = min(image.size) * rng.uniform(0.3, 0.8)
    if kind == "letter":
        cover = _print_letter(rng, size)
    else:
        writer = any_writer(rng)._replace(steady=0.01, stretch=1.0)
        paths = write_strokes(_scribble(rng, str(rng.choice(SCRIBBLES))), writer, rng)
        scale = size / max(np.ptp(np.concatenate(paths), axis=0))
        pen = max(2.5, size * _log_uniform(rng, 0.02, 0.08))
        cover = _ink([path * scale for path in paths], pen, rng, bool(rng.random() < 0.3))
    room = np.array(image.size) - cover.shape[::-1]
    image.paste(Image.fromarray((255 * cover).astype(np.uint8)), tuple(rng.integers(0, room + 1)))
    if rng.random() < 0.5:
        image = image.point(lambda value: 255 - value)
    return image.convert("RGB") if rng.random() < 0.5 else image


def _print_letter(rng: np.random.Generator, size: float) -> Cover:
    font = Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{rng.choice(FONTS)}.ttf"
    image = Image.new("L", (round(2.5 * size),) * 2)
    place, letter = (1.25 * size,) * 2, str(rng.choice(list(LETTERS)))
    ImageDraw.Draw(image).text(place, letter, 255, ImageFont.truetype(str(font), round(size)), "mm")
    return _crop(np.asarray(image.rotate(rng.normal(0, 4), Image.Resampling.BICUBIC), np.float32) / 255)


def _scribble(rng: np.random.Generator, name: str) -> list[Stroke]:
    if name in DRAWINGS:
        return _hand(*DRAWINGS[name].split(" / "))
    if name.endswith("hatching"):
        lines = [[(x, 1.0), (x + 0.8, 0.0)] for x in np.linspace(0, 0.6, int(rng.integers(7, 13)))]
        return lines + ([[(1.4 - x, y) for x, y in line] for line in lines] if name == "cross-hatching" else [])
    along = np.linspace(0, 1, 60)
    if name == "tangle":
        points = rng.uniform(0, 1, (rng.integers(12, 22), 2))
    elif name == "zigzag":
        corners = int(rng.integers(6, 12))
        points = np.stack([np.linspace(0, 1, corners), np.arange(corners) % 2 * rng.uniform(0.3, 0.8)], axis=1)
        points = np.repeat(points, 2, axis=0)
    else:
        turns = 2 * math.pi * rng.uniform(3, 6) * along
        circles = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        points = along[:, None] * circles / 2 if name == "spiral" else circles * [0.2, 0.4] + along[:, None] * [1.5, 0]
    return [[(float(x), float(y)) for x, y in points]]
