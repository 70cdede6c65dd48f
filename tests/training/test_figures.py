"""Figures of a classifier are those of scikit-learn, and their own definitions where it has none."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from sklearn import metrics  # type: ignore[import-untyped]
from torch import nn

from mnist.data.loader import build_loader
from mnist.data.splits import Split
from mnist.training.evaluate import Result, evaluate_split
from mnist.training.losses import LOSSES


class Table(nn.Module):
    """Looks up the log-probabilities of an image, whose first pixel is its number."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.outputs[(255 * X[:, 0, 0, 0]).round().long()]


def evaluated(outputs: torch.Tensor, y: torch.Tensor, split: str = "test") -> Result:
    images = torch.arange(len(y), dtype=torch.uint8)[:, None, None].expand(-1, 4, 4).contiguous()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    loader = accelerator.prepare(build_loader(Split(images, y), 64))
    return evaluate_split(Table(outputs), loader, LOSSES["nll"], accelerator, split=split)


@pytest.mark.parametrize("classes", [2, 5, 8])
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_figures_are_those_of_scikit_learn(classes: int, absent: bool, fresh_accelerate: None) -> None:
    generator = torch.Generator().manual_seed(classes)
    outputs = torch.randn(250, classes, generator=generator).log_softmax(dim=1)
    y = torch.randint(classes - absent, (250,), generator=generator)  # without an image of the last class
    result, prediction = evaluated(outputs, y), outputs.argmax(dim=1)
    figures = result.figures()
    assert figures["macro_f1"] == pytest.approx(metrics.f1_score(y, prediction, average="macro"))
    assert figures["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(y, prediction))
    assert ("top5_accuracy" in figures) == (classes >= 6)
    if classes >= 6:
        expected = metrics.top_k_accuracy_score(y, outputs, k=5, labels=range(classes))
        assert figures["top5_accuracy"] == pytest.approx(expected)


def test_precision_recall_and_f1_per_class_are_those_of_scikit_learn(fresh_accelerate: None) -> None:
    from mnist.training.figures import per_class

    outputs = torch.randn(250, 6, generator=torch.Generator().manual_seed(0)).log_softmax(dim=1)
    outputs[:, 5] = -100  # never predicted
    y = torch.arange(250) % 5
    expected = metrics.precision_recall_fscore_support(y, outputs.argmax(dim=1), labels=range(6), zero_division=np.nan)
    for ours, theirs in zip(per_class(evaluated(outputs, y).confusion), expected, strict=False):
        np.testing.assert_allclose(ours.numpy(), theirs)


def test_the_calibration_error_is_the_mean_difference_of_confidence_and_accuracy(fresh_accelerate: None) -> None:
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.7, 0.7])
    outputs = torch.stack([confidence, 1 - confidence], dim=1).log()
    y = torch.tensor([0, 0, 0, 1, 0, 1])  # 3 of 4 right at 95 %, 1 of 2 at 70 %
    error = evaluated(outputs, y).figures()["calibration_error"]
    assert error == pytest.approx((4 * (0.95 - 0.75) + 2 * (0.7 - 0.5)) / 6)


@pytest.mark.parametrize("split", ["val", "test"])
def test_outputs_that_are_not_numbers_give_a_loss_that_says_so(split: str, fresh_accelerate: None) -> None:
    assert math.isnan(evaluated(torch.full((40, 10), torch.nan), torch.arange(40) % 10, split).loss)
