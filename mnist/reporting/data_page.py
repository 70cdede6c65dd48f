"""The page about a folder of images, data.html: what to look at before the first step.

write_data_page(load_dataset("PetImages", "data"), Path("data.html"))
"""

import base64
import io
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mnist.data.duplicates import EMPTY
from mnist.data.listing import Listing
from mnist.data.splits import ImageData
from mnist.files import write_file
from mnist.reporting.report import fill_template

THUMBNAIL = 112  # pixels
MAX_SAMPLES, MAX_PER_CLASS = 400, 8  # thumbnails of the classes, in all and each
MAX_CLASSES = 100  # with samples
MAX_GROUPS, MAX_IN_GROUP = 24, 6  # of images that are alike, of each kind
MAX_UNUSUAL = 12  # images of each kind
ELONGATED = 2.5  # ratio of the sides above which an image counts as elongated
TITLES = {
    "classes": "The same image in several classes",
    "splits": "The same image in several splits",
    "other": "Other duplicates",
}
ADVICE = {
    "classes": "Probably a wrong label, unless a small detail decides the class: compare the images.",
    "splits": "A network that has seen an image knows its class: accuracy on the other split is too high.",
    "other": "Each counts several times. Usually harmless.",
}


def write_data_page(data: ImageData, path: Path) -> None:
    """Write the page of a dataset that was loaded from a folder."""
    assert data.listing is not None
    write_file(path, render(data, data.listing).encode(errors="backslashreplace"))


def render(data: ImageData, listing: Listing) -> str:
    """The page as HTML."""
    shorter = listing.sides.min(axis=1)
    return fill_template(
        "data.html",
        data=data,
        images=len(listing.names),
        parts={part: int((listing.parts == part).sum()) for part in ("train", "val", "test")},
        problems=[
            {
                "title": TITLES[kind],
                "advice": ADVICE[kind],
                "count": len(found),
                "groups": [_shown(listing, data, group[:MAX_IN_GROUP]) for group in found[:MAX_GROUPS]],
                "more": [max(0, len(group) - MAX_IN_GROUP) for group in found[:MAX_GROUPS]],
            }
            for kind, found in listing.groups.items()
            if found
        ],
        unusual=[row for row in _unusual(listing, data) if row["count"]],
        classes=_classes(listing, data),
        shorter=np.quantile(shorter, (0, 0.5, 1), method="nearest").tolist(),
        histogram=_histogram(shorter),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def _shown(listing: Listing, data: ImageData, indices: Iterable[Any]) -> list[dict[str, Any]]:
    """What the page shows of some images."""
    return [
        {
            "image": thumbnail(listing.images[int(index)].numpy()),
            "name": listing.names[index],
            "class": data.class_names[listing.labels[index]],
            "part": str(listing.parts[index]),
            "sides": listing.sides[index].tolist(),
        }
        for index in indices
    ]


def _unusual(listing: Listing, data: ImageData) -> list[dict[str, Any]]:
    """Images that are nearly empty, much longer than wide, or far smaller than the network's input."""
    longer, shorter = listing.sides.max(axis=1), listing.sides.min(axis=1)
    size, crops = data.image_shape[1], data.preparation == "crop"
    kinds = {
        ("Nearly empty", "All pixels are nearly the same."): listing.contrast < EMPTY,
        ("Elongated", f"One side is over {ELONGATED} times the other: with --fit crop most of the image is cut off."): (
            crops & (longer > ELONGATED * shorter)
        ),
        ("Small", f"Enlarged more than twice, to {size} x {size}: blurred."): (
            2 * (shorter if crops else longer) < size
        ),
    }
    return [
        {
            "title": title,
            "advice": advice,
            "count": int(found.sum()),
            "images": _shown(listing, data, np.flatnonzero(found)[:MAX_UNUSUAL]),
        }
        for (title, advice), found in kinds.items()
    ]


def _classes(listing: Listing, data: ImageData) -> list[dict[str, Any]]:
    """Each class with its number of images per split, their median size and some of them."""
    each = min(MAX_PER_CLASS, max(1, MAX_SAMPLES // len(data.class_names)))
    rows: list[dict[str, Any]] = []
    for label, name in enumerate(data.class_names):
        members = np.flatnonzero(listing.labels == label)
        chosen = members[np.linspace(0, len(members) - 1, min(each, len(members))).astype(int)]
        rows.append(
            {
                "name": name,
                "count": len(members),
                "parts": {part: int((listing.parts[members] == part).sum()) for part in ("train", "val", "test")},
                "sides": np.median(listing.sides[members], axis=0).astype(int).tolist() if len(members) else None,
                "images": _shown(listing, data, chosen) if label < MAX_CLASSES else [],
            }
        )
    largest = max(row["count"] for row in rows)
    return [row | {"share": row["count"] / largest} for row in rows]


def _histogram(shorter: NDArray[np.int64]) -> list[dict[str, Any]]:
    """How many images have a shorter side of 1 to 31, 32 to 63, 64 to 127 ... pixels."""
    octave = np.log2(np.maximum(shorter, 16)).astype(int)
    counts = np.bincount(octave)
    first = int(np.flatnonzero(counts)[0])
    return [
        {"from": 2**place, "to": 2 ** (place + 1) - 1, "count": int(count), "share": int(count) / int(counts.max())}
        for place, count in enumerate(counts)
        if place >= first
    ]


def thumbnail(pixels: NDArray[np.uint8]) -> str:
    """A data URL of a small JPEG of an image, uint8 [height, width] or [height, width, 3]."""
    small, buffer = Image.fromarray(pixels), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(buffer, format="jpeg", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
