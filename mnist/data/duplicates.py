"""Find images that are nearly the same: recompressed, resized, brightened, or taken a moment later.

likeness = likeness_of(pixels)                                  # 16 bytes, while an image is decoded
pairs = find_alike(images, digests, likenesses)                 # [[0, 17], [3, 4], ...]

Two steps: hashes that differ in few bits give candidates (a difference hash along rows and columns: Krawetz, "Kind of
like that", 2013), and the candidates' pixels decide. Must not import torch, like images.py.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LIKENESS = 16  # bytes
MAX_BITS = 9  # of the 128 of two candidates that differ
NEIGHBORS = 30  # of an image, among those with the same 16 bits of the hash, with which it is compared
MAX_CANDIDATES = 200_000  # pairs whose pixels are compared: 4 seconds
THUMBNAIL = 16  # pixels per side, of the comparison
MIN_CORRELATION = 0.99  # between thumbnails
ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)  # in each byte
EMPTY = 4.0  # standard deviation of the pixels, of 255, below which an image is nearly uniform


def likeness_of(pixels: NDArray[np.uint8]) -> bytes:
    """A hash of an image, uint8 [height, width] or [height, width, 3], that differs in few bits between alike images.

    Of a gray image of 9 x 9: whether each pixel is clearly brighter than the one before it, in its row and its column.
    """
    small = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 9), Image.Resampling.BOX), np.int16)
    right, down = np.diff(small[:8], axis=1), np.diff(small[:, :8], axis=0)  # [8, 8] each
    return np.packbits(np.stack([right, down]) > 1).tobytes()


def find_alike(
    images: NDArray[np.uint8], digests: NDArray[np.uint8], likenesses: NDArray[np.uint8]
) -> NDArray[np.int64]:
    """Pairs [pairs, 2] of images that are alike, but not equal pixel for pixel; sorted, the lower index first.

    images uint8 [N, height, width] or [N, height, width, 3], digests [N, 16] of their pixels, likenesses [N, LIKENESS].
    """
    _, first = np.unique(np.ascontiguousarray(digests).view("V16").ravel(), return_index=True)
    first = np.sort(first)  # of equal images one is enough
    pairs = first[_candidates(likenesses[first])]
    return pairs[_same(images, pairs)]


def _candidates(hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pairs [pairs, 2] of hashes that agree in at least one of 8 parts of 16 bits, and differ in at most MAX_BITS.

    With MAX_BITS = 9, two hashes may differ in all 8 parts, but then in 1 or 2 bits of each: rare, and lost.
    """
    found = np.empty((0, 2), np.int64)
    for part in np.ascontiguousarray(hashes).view("<u2").T:  # [N]
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.diff(part[order], prepend=-1))
        sizes = np.diff(starts, append=len(order))
        behind = np.repeat(starts + sizes, sizes) - np.arange(len(order))  # images of the bucket from each one on
        for distance in range(1, min(NEIGHBORS, int(sizes.max(initial=0)))):
            lower = np.flatnonzero(behind > distance)
            pairs = np.sort(np.stack([order[lower], order[lower + distance]], axis=1), axis=1)
            bits = ONES[hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]].sum(axis=1)
            found = np.concatenate([found, pairs[bits <= MAX_BITS]])
    return np.unique(found, axis=0)[:MAX_CANDIDATES]


def _same(images: NDArray[np.uint8], pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[pairs]: whether two images have nearly the same pixels, apart from brightness and contrast."""
    small = {index: _thumbnail(images[index]) for index in np.unique(pairs).tolist()}
    return np.array([bool(small[one] @ small[other] >= MIN_CORRELATION) for one, other in pairs.tolist()], bool)


def _thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A small copy with mean 0 and length 1: the product of two is their correlation. Zeros for an empty image."""
    small = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).ravel()
    values = values - values.mean()
    return values / np.linalg.norm(values) if values.std() >= EMPTY else np.zeros_like(values)
