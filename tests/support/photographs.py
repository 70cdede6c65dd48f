"""A folder of pictures as a person has it: three kinds of things, photographed at any size, and what lies there too."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("ball", "box", "tent")


def take_photograph(kind: str, rng: np.random.Generator) -> Image.Image:
    """A thing of any color before a wall of any two, in mode RGB; 50 to 160 pixels a side."""
    width, height = (int(side) for side in rng.integers(50, 160, 2))
    left, right = rng.uniform(60, 200, (2, 1, 1, 3))
    across = np.linspace(0, 1, width)[None, :, None]
    wall = left * (1 - across) + right * across + rng.normal(0, 10, (height, width, 3))
    picture = Image.fromarray(np.clip(wall, 0, 255).astype(np.uint8))
    draw, color = ImageDraw.Draw(picture), tuple(int(value) for value in rng.choice([20, 235], 3))
    half = min(width, height) * rng.uniform(0.28, 0.42)
    x, y = width / 2 + rng.uniform(-4, 4), height / 2 + rng.uniform(-4, 4)
    if kind == "ball":
        draw.ellipse((x - half, y - half, x + half, y + half), fill=color)
    elif kind == "box":
        draw.rectangle((x - half, y - half, x + half, y + half), fill=color)
    else:
        draw.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=color)
    return picture


def fill_folder(folder: Path, count: int, seed: int = 0) -> Path:
    """So many JPEGs of each kind, and two files that are broken, as in the well-known PetImages."""
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            take_photograph(kind, rng).save(folder / kind / f"{number}.jpg", quality=90)
        (folder / kind / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / "ball" / "666.jpg").touch()
    content = (folder / "box" / "0.jpg").read_bytes()
    (folder / "box" / "11702.jpg").write_bytes(content[: len(content) // 2])
    return folder
