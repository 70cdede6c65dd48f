"""Losses by name.

loss = LOSSES["nll"](model(X), y, sample_weight)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def nll_loss(output: Tensor, y: Tensor, sample_weight: Tensor) -> Tensor:
    """Negative log-likelihood: cross-entropy, because `output` holds log-probabilities.

    output [batch, classes], y [batch] class indices, sample_weight [batch] weight of each image -> scalar
    """
    return torch.dot(F.nll_loss(output, y, reduction="none"), sample_weight)


def smoothed(loss: Loss, smoothing: float) -> Loss:
    """nll_loss against labels of which `smoothing` is spread over all classes; with 0, the loss itself.

    Szegedy et al., "Rethinking the inception architecture", 2016.
    """
    if smoothing == 0:
        return loss
    assert loss is nll_loss  # TrainConfig.label_smoothing

    def smoothed_loss(output: Tensor, y: Tensor, sample_weight: Tensor) -> Tensor:
        spread = -torch.dot(output.mean(dim=1), sample_weight)
        return (1 - smoothing) * nll_loss(output, y, sample_weight) + smoothing * spread

    return smoothed_loss


def mse_loss(output: Tensor, y: Tensor, sample_weight: Tensor) -> Tensor:
    """Mean squared error between probabilities and one-hot targets, averaged over classes; shapes as in nll_loss."""
    one_hot = torch.zeros_like(output).scatter(1, y[:, None], 1)  # F.one_hot would wait for the GPU
    return torch.dot((output.exp() - one_hot).square().mean(dim=1), sample_weight)


# nll-balanced: the loader weights images so that every class counts the same (data/loader.py)
LOSSES: dict[str, Loss] = {"nll": nll_loss, "nll-balanced": nll_loss, "mse": mse_loss}
