"""Probabilities that can be trusted, from the validation images.

calibrator = Calibrator(device, torch.float64)
calibrator.add(output, y, sample_weight)                  # per batch: log-probabilities [B, classes], [B], [B]
calibration = calibrator.result(accelerator.reduce(calibrator.sums))

A network's probabilities are often too high or too low. Divided by one temperature, its log-probabilities have the
lowest loss (Guo et al., "On calibration of modern neural networks", 2017). With it, 99 % of the validation images reach
the threshold; predictions below it are reported as not confident.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURES = 31  # tried, from 0.25 to 4
BINS = 1000  # of the probability, for the threshold
KEPT = 0.99  # share of the validation images that are confident
MIN_IMAGES = 500  # with fewer, a share of 1 % is not known


class Calibration(NamedTuple):
    temperature: float
    threshold: float  # a prediction is confident from this probability on


class Calibrator:
    """Loss and histogram of the predictions' probabilities for each temperature, as sums over images."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.temperatures = torch.logspace(math.log2(0.25), math.log2(4), TEMPERATURES, 2, dtype=dtype, device=device)
        self.sums = torch.zeros(TEMPERATURES, 1 + BINS, dtype=dtype, device=device)

    def add(self, output: Tensor, y: Tensor, sample_weight: Tensor) -> None:
        output, sample_weight = output.to(self.sums.dtype), sample_weight.to(self.sums.dtype)
        highest, truth = output.amax(dim=1), output.gather(1, y[:, None])[:, 0]  # [B]
        for sums, temperature in zip(self.sums, self.temperatures, strict=True):
            total = (output / temperature).logsumexp(dim=1)
            sums[0] += ((total - truth / temperature) * sample_weight).sum()
            confidence = (highest / temperature - total).exp()
            sums.index_add_(0, 1 + (confidence * BINS).long().clamp(0, BINS - 1), sample_weight)  # 0 also of NaN

    def result(self, sums: Tensor) -> Calibration | None:
        """The calibration from the sums of all processes; None if there are too few images."""
        images = float(sums[0, 1:].sum())
        if images < MIN_IMAGES:
            return None
        best = int(sums[:, 0].argmin())
        below = sums[best, 1:].cumsum(0)  # images with a probability in this bin or a lower one
        threshold = int((below <= (1 - KEPT) * images).sum()) / BINS
        return Calibration(float(self.temperatures[best]), threshold)
