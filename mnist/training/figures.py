"""Figures of a classifier beyond its accuracy, from counts over all images.

classes = per_class(confusion)                    # int64 [classes, classes], true class by prediction
classes.precision, classes.recall, classes.f1     # [classes], NaN without images
error = calibration_error(bins)                   # [BINS, 3]: images, sum of confidences, images that are right
"""

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15  # of confidence, equally wide (Guo et al., "On calibration of modern neural networks", 2017)
TOP = 5  # classes of top-5 accuracy
LEAST_CLASSES = TOP + 1  # for top-5 accuracy


class PerClass(NamedTuple):
    """Of each class [classes]: NaN if it has no image, and for precision if it is never predicted."""

    precision: Tensor  # share of the images predicted as the class that are of it
    recall: Tensor  # share of its images that are predicted as the class: its accuracy
    f1: Tensor  # harmonic mean of both, 0 for a class that is never right; NaN only if neither occurs


def per_class(confusion: Tensor) -> PerClass:
    right, images, predicted = confusion.diagonal().double(), confusion.sum(dim=1), confusion.sum(dim=0)
    return PerClass(right / predicted, right / images, 2 * right / (images + predicted))


def calibration_error(bins: Tensor) -> float:
    """Expected calibration error: the mean difference between confidence and accuracy of a bin, over images."""
    return float((bins[:, 1] - bins[:, 2]).abs().sum() / bins[:, 0].sum())


def add_to_bins(bins: Tensor, confidence: Tensor, right: Tensor, weight: Tensor) -> None:
    """Count a batch: the probability of each prediction, whether it is right, and the image's weight, all [B]."""
    confidence, weight = confidence.to(bins.dtype), weight.to(bins.dtype)
    place = (confidence * BINS).long().clamp(0, BINS - 1)  # NaN, too, has a bin: the loss reports it
    bins.index_add_(0, place, torch.stack([weight, confidence * weight, right * weight], dim=1))


def count_in_top(output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The weights of the images whose class is among the TOP with the largest output [B, classes]."""
    larger = (output > output.gather(1, y[:, None])).sum(dim=1)
    return ((larger < TOP) * weight).sum()
