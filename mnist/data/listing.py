"""The files of a folder of images, and what is suspicious about them.

listing = load_dataset("PetImages", "data").listing
listing.notes()          # ["2 images have duplicates in another class: Cat/7.jpg looks like Dog/3.jpg, ...", ...]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mnist.data.cache import Cache
from mnist.data.folders import File
from mnist.data.splits import MappedImages
from mnist.launch.streams import printable

PROBLEMS = ("classes", "splits", "other")  # of images that are alike: in several classes, in several splits, neither


@dataclass(frozen=True, eq=False)
class Listing:
    """The readable images of a folder; all arrays are in the order of its files."""

    images: MappedImages
    names: list[str]
    labels: NDArray[np.int64]
    parts: NDArray[np.str_]  # "train", "val" or "test"
    sides: NDArray[np.int64]  # [N, 2]: width and height
    contrast: NDArray[np.float64]  # [N]: standard deviation of the pixels, of 255
    equal: NDArray[np.int64]  # [N]: images with the same number are equal pixel for pixel, after resizing
    alike: NDArray[np.int64]  # [N]: those with the same number, from 0 on, are equal or nearly so

    @classmethod
    def of(cls, cache: Cache, files: Sequence[File], parts: NDArray[np.str_]) -> "Listing":
        """Of a decoded folder, its readable files and the split of each."""
        labels = np.array([file.label for file in files], np.int64)
        _, equal = np.unique(np.ascontiguousarray(cache.digests).view("V16").ravel(), return_inverse=True)
        names = [printable(file.name) for file in files]
        total, squares = np.split(cache.sums / math.prod(cache.images.shape[1:3]), 2, axis=1)  # [N, channels] each
        contrast = np.sqrt(np.maximum(squares - total**2, 0).mean(axis=1))
        return cls(cache.images, names, labels, parts, cache.sides, contrast, equal, _connected(equal, cache.alike))

    @cached_property
    def groups(self) -> dict[str, list[NDArray[np.int64]]]:
        """The indices of images that are alike, for each group of at least two, by problem: PROBLEMS; some have two."""
        order = np.argsort(self.alike, kind="stable")
        starts = np.flatnonzero(np.diff(self.alike[order], prepend=-1))
        found: dict[str, list[NDArray[np.int64]]] = {problem: [] for problem in PROBLEMS}
        for start, size in zip(starts, np.diff(starts, append=len(order)), strict=True):
            if size > 1:
                group = order[start : start + size]
                columns = {"classes": self.labels, "splits": self.parts}
                problems = [name for name, column in columns.items() if len(np.unique(column[group])) > 1]
                for problem in problems or ["other"]:
                    found[problem].append(group)
        return found

    def notes(self) -> list[str]:
        """Lines for the header of a run: test images in the training images, the same image in two classes, and all."""
        notes, conflicting = [], self.groups["classes"]
        is_trained = np.bincount(self.alike, self.parts == "train") > 0
        for part, name in (("test", "test"), ("val", "validation")):
            leaked = np.flatnonzero((self.parts == part) & is_trained[self.alike])
            if len(leaked):
                equal = leaked[np.isin(self.equal[leaked], self.equal[self.parts == "train"])]
                one = equal[0] if len(equal) else leaked[0]  # an exact duplicate is the better example
                number = self.equal if len(equal) else self.alike
                other = np.flatnonzero((self.parts == "train") & (number == number[one]))[0]
                notes.append(
                    f"{len(leaked):,} of {(self.parts == part).sum():,} {name} images are duplicates of training images"
                    f" and inflate the accuracy: {self._pair(one, other, len(leaked))}"
                )
        if conflicting:
            pairs = [self._in_two_classes(group) for group in conflicting]
            (first, second), count = min(pairs, key=lambda pair: bool(np.diff(self.equal[pair])[0])), len(pairs)
            those = "1 image has" if count == 1 else f"{count:,} images have"
            notes.append(f"{those} duplicates in another class: {self._pair(first, second, count)}")
        exact, all_of_them = (len(column) - len(np.unique(column)) for column in (self.equal, self.alike))
        if all_of_them:
            notes.append(f"repeated images: {exact:,} exactly, {all_of_them - exact:,} nearly; see data.html")
        return notes

    def _in_two_classes(self, group: NDArray[np.int64]) -> NDArray[np.int64]:
        """Two images of a group with different classes; equal pixel for pixel, if there are such."""
        for number in np.unique(self.equal[group]):
            equal = group[self.equal[group] == number]
            if len(np.unique(self.labels[equal])) > 1:
                group = equal
                break
        return group[np.unique(self.labels[group], return_index=True)[1][:2]]

    def _pair(self, one: int, other: int, count: int) -> str:
        verb = "is" if self.equal[one] == self.equal[other] else "looks like"
        return f"{self.names[one]} {verb} {self.names[other]}{', ...' if count > 1 else ''}"


def _connected(equal: NDArray[np.int64], alike: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N]: the number of each image's group, given that of its equal ones [N] and pairs that are alike [pairs, 2]."""
    if not len(alike):
        return equal
    from scipy.sparse import coo_array  # takes 20 MB
    from scipy.sparse.csgraph import connected_components

    count, (one, other) = int(equal.max()) + 1, equal[alike].T.astype(np.int32)  # scipy 1.11 takes no other type
    _, number = connected_components(coo_array((np.ones(len(one)), (one, other)), (count, count)), directed=False)
    return np.asarray(number[equal], np.int64)
