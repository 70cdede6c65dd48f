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
NEIGHBORS = 30  # following images with the same 16 bits of the hash, with which an image is compared
MAX_CANDIDATES = 1_000_000  # pairs whose pixels are compared
PAIRS_AT_ONCE = 10_000
THUMBNAIL = 16  # pixels per side, of the comparison
MIN_CORRELATION = 0.99  # between thumbnails
ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # in each byte
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

    Pairs are lost if they differ in all 8 parts, which 8 or 9 bits can do; if over NEIGHBORS hashes with the same part
    lie between them in the order of hashes; and those with the most different bits beyond MAX_CANDIDATES.
    """
    whole = np.ascontiguousarray(hashes).view("<u8").T  # [2, N]
    found: list[NDArray[np.int64]] = [np.empty((0, 3), np.int64)]
    for part in np.ascontiguousarray(hashes).view("<u2").T:  # [N]
        order = np.lexsort((*whole, part))
        starts = np.flatnonzero(np.diff(part[order], prepend=-1))
        sizes = np.diff(starts, append=len(order))
        behind = np.repeat(starts + sizes, sizes) - np.arange(len(order))  # images of the bucket from each one on
        for distance in range(1, min(NEIGHBORS + 1, int(sizes.max(initial=0)))):
            lower = np.flatnonzero(behind > distance)
            pairs = np.sort(np.stack([order[lower], order[lower + distance]], axis=1), axis=1)
            bits = ONES[hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]].sum(axis=1, dtype=np.int64)
            found.append(np.column_stack([bits, pairs])[bits <= MAX_BITS])
    best = np.unique(np.concatenate(found), axis=0)[:MAX_CANDIDATES, 1:]  # fewest bits first
    return best[np.lexsort(best.T[::-1])]


def _same(images: NDArray[np.uint8], pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[pairs]: whether two images have nearly the same pixels, apart from brightness and contrast."""
    needed, place = np.unique(pairs, return_inverse=True)
    if not len(needed):
        return np.empty(0, bool)
    small = np.stack([_thumbnail(images[index]) for index in needed.tolist()])
    parts = np.split(place.reshape(-1, 2), range(PAIRS_AT_ONCE, len(pairs), PAIRS_AT_ONCE))
    return np.concatenate([_correlation(small[part[:, 0]], small[part[:, 1]]) >= MIN_CORRELATION for part in parts])


def _thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[values] of a small copy."""
    small = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small).ravel()


def _correlation(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[pairs]: the correlation of the values of two images, [pairs, values] each; 0 if one is nearly uniform."""
    first, second = (values - values.mean(axis=1, keepdims=True) for values in map(np.float32, (one, other)))
    spreads = [np.sqrt(np.square(values).mean(axis=1)) for values in (first, second)]
    correlation = (first * second).mean(axis=1) / np.maximum(spreads[0] * spreads[1], 1e-9)
    return np.where(np.minimum(*spreads) >= EMPTY, correlation, 0)
