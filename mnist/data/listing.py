"""The files of a folder of images, and what is suspicious about them.

listing = load_dataset("PetImages", "data").listing
listing.notes()                  # ["2 images are in several classes: Cat/7.jpg is like Dog/3.jpg, ...", ...]
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mnist.data.cache import Cache
from mnist.data.folders import File
from mnist.data.splits import MappedImages
from mnist.launch.streams import printable


class Listing(NamedTuple):
    """The readable images of a folder; all arrays are in the order of its files."""

    images: MappedImages
    names: list[str]
    labels: NDArray[np.int64]
    parts: NDArray[np.str_]  # "train", "val" or "test"
    sides: NDArray[np.int64]  # [N, 2]: width and height
    contrast: NDArray[np.float64]  # [N]: standard deviation of the pixels, of 255
    equal: NDArray[np.int64]  # [N]: images with the same number are equal pixel for pixel, after resizing
    alike: NDArray[np.int64]  # [N]: those with the same number are equal or nearly so

    @classmethod
    def of(cls, cache: Cache, files: Sequence[File], parts: NDArray[np.str_]) -> "Listing":
        labels = np.array([file.label for file in files], np.int64)
        _, equal = np.unique(np.ascontiguousarray(cache.digests).view("V16").ravel(), return_inverse=True)
        one, other = equal[cache.alike].T
        count = int(equal.max()) + 1
        _, number = connected_components(coo_array((np.ones(len(one)), (one, other)), (count, count)), directed=False)
        names = [printable(file.name) for file in files]
        total, squares = np.split(cache.sums / math.prod(cache.images.shape[1:3]), 2, axis=1)  # [N, channels] each
        contrast = np.sqrt(np.maximum(squares - total**2, 0).mean(axis=1))
        return cls(cache.images, names, labels, parts, cache.sides, contrast, equal, number[equal].astype(np.int64))

    def groups(self) -> list[NDArray[np.int64]]:
        """The indices of images that are alike, for each group of at least two; those in several classes come first."""
        order = np.argsort(self.alike, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(self.alike[order])) + 1)
        rank = {"classes": 0, "splits": 1, "": 2}
        return sorted((group for group in groups if len(group) > 1), key=lambda group: rank[self.problem(group)])

    def problem(self, group: NDArray[np.int64]) -> str:
        """What is wrong with images that are alike: in several `classes`, or else in several `splits`; or nothing."""
        if len(np.unique(self.labels[group])) > 1:
            return "classes"
        return "splits" if len(np.unique(self.parts[group])) > 1 else ""

    def notes(self) -> list[str]:
        """Lines for the header of a run: test images in the training images, the same image in two classes, and all."""
        notes, groups = [], self.groups()
        leaked = [[self._first(group, self.parts, part) for part in ("test", "train")] for group in groups]
        if leaks := [(tested, trained) for tested, trained in leaked if tested is not None and trained is not None]:
            count = sum(int((self.parts[self.alike == self.alike[tested]] == "test").sum()) for tested, _ in leaks)
            notes.append(
                f"{count:,} of {int((self.parts == 'test').sum()):,} test images are duplicates of training images and"
                f" inflate the accuracy: {self._pair(*leaks[0], len(leaks))}"
            )
        if torn := [group for group in groups if self.problem(group) == "classes"]:
            one, other = (int(torn[0][index]) for index in np.unique(self.labels[torn[0]], return_index=True)[1][:2])
            those = "1 image is" if len(torn) == 1 else f"{len(torn):,} images are"
            notes.append(f"{those} in several classes: {self._pair(one, other, len(torn))}")
        if groups:
            exact, all_of_them = (len(column) - len(np.unique(column)) for column in (self.equal, self.alike))
            notes.append(f"repeated images: {exact:,} exactly, {all_of_them - exact:,} nearly; see data.html")
        return notes

    def _first(self, group: NDArray[np.int64], column: NDArray[Any], value: Any) -> int | None:
        """The first image of the group with the value, if any."""
        return next((index for index in group.tolist() if column[index] == value), None)

    def _pair(self, one: int, other: int, count: int) -> str:
        verb = "is" if self.equal[one] == self.equal[other] else "is like"
        return f"{self.names[one]} {verb} {self.names[other]}{', ...' if count > 1 else ''}"
