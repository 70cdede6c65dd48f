"""Strong augmentation: digits in other hands, and images that are not digits."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mnist.data.splits import ImageData
from mnist.data.transforms import scale_pixels
from mnist.data.writing import COLUMNS, NOT_DIGITS, SQUARED, UNIFORM, rewrite, shapes, writing_parameters

FIRST = COLUMNS - UNIFORM  # of the uniform numbers: whether it is a digit, whether it gets a stroke, ...


def of_class(digits: ImageData, digit: int, count: int = 200) -> tuple[Tensor, Tensor]:
    index = (digits.train.labels == digit).nonzero()[:count, 0]
    return scale_pixels(digits.train.images[index]), digits.train.labels[index]


def unmoved(count: int, chance: float) -> Tensor:
    """Parameters of digits that stay where they are; all get a stroke or none."""
    parameters = torch.zeros(count, COLUMNS)
    parameters[:, FIRST:] = 0.5
    parameters[:, FIRST + 1] = chance
    return parameters


def test_zeros_without_strokes_change_no_digit(digits: ImageData) -> None:
    X, y = scale_pixels(digits.train.images[:300]), digits.train.labels[:300]
    Z, same = rewrite(X, y, unmoved(300, chance=1.0))
    torch.testing.assert_close(Z, X, atol=1e-5, rtol=0)
    assert torch.equal(same, y)


@pytest.mark.parametrize(("digit", "where"), [(1, "left"), (7, "both"), (9, "left"), (4, "top")])
def test_ones_get_flags_sevens_bars_nines_hooks_and_fours_are_closed(digit: int, where: str, digits: ImageData) -> None:
    X, y = of_class(digits, digit)
    Z, _ = rewrite(X, y, unmoved(len(X), chance=0.2))
    added = (Z - X).clamp(min=0)
    has_more = added.sum((1, 2, 3)) > 2
    assert has_more.double().mean() > (0.2 if digit == 4 else 0.8)  # open fours, if they are wide, would be nines
    middle = (X * torch.arange(28.0)).sum((1, 2, 3)) / X.sum((1, 2, 3))
    left = (added * (torch.arange(28.0) < middle[:, None, None, None])).sum((1, 2, 3)) / added.sum((1, 2, 3))
    share = float(left[has_more].mean())
    assert {"left": share > 0.6, "both": 0.2 < share < 0.8, "top": True}[where]
    if where == "top":
        assert added[has_more, :, :14].sum() > added[has_more, :, 14:].sum()


def aspects(X: Tensor) -> Tensor:
    """The width of digits [B, 1, 28, 28], relative to their height."""
    ink = X[:, 0] > 0.4
    return ink.any(1).sum(1) / ink.any(2).sum(1)


@pytest.mark.parametrize("digit", [0, 1, 2])
def test_a_share_of_the_digits_is_stretched_towards_a_square(digit: int, digits: ImageData) -> None:
    X, y = of_class(digits, digit)
    parameters = unmoved(len(X), chance=1.0)
    parameters[:, -1] = torch.linspace(0, 0.99, len(X))
    Z, _ = rewrite(X, y, parameters)
    unchanged, fully = parameters[:, -1] <= 1 - SQUARED, parameters[:, -1] >= 1 - SQUARED / 2
    torch.testing.assert_close(Z[unchanged], X[unchanged], atol=1e-5, rtol=0)
    before, after = aspects(X), aspects(Z)
    assert ((after - 1).abs() <= (before - 1).abs() + 0.1).all()
    reached = after[fully].clamp(max=1) / (before[fully] * 2.2).clamp(max=1)
    assert reached.min() > 0.8
    assert reached.max() < 1.25


def test_other_digits_get_no_strokes(digits: ImageData) -> None:
    for digit in (0, 2, 3, 5, 6, 8):
        X, y = of_class(digits, digit, 50)
        torch.testing.assert_close(rewrite(X, y, unmoved(50, chance=0.2))[0], X, atol=1e-5, rtol=0)


def test_a_share_of_the_images_are_not_digits_and_have_random_classes(digits: ImageData) -> None:
    X, y = of_class(digits, 3, 4000)
    Z, classes = rewrite(X, y, writing_parameters(4000, seed=0, epoch=1))
    other = classes != 3
    assert float(other.double().mean()) == pytest.approx(0.9 * NOT_DIGITS, abs=0.02)
    counts = torch.bincount(classes[other], minlength=10)
    assert counts[[0, 1, 2, 4, 5, 6, 7, 8, 9]].min() > 0.6 * other.sum() / 9
    assert Z.min() >= 0
    assert Z.max() <= 1


def test_strong_augmentation_treats_each_image_by_itself(digits: ImageData) -> None:
    X, y = scale_pixels(digits.train.images[:60]), digits.train.labels[:60]
    parameters = writing_parameters(60, seed=0, epoch=0)
    together = rewrite(X, y, parameters)
    for size in (1, 7):
        parts = [rewrite(*part) for part in zip(X.split(size), y.split(size), parameters.split(size), strict=True)]
        for index in (0, 1):
            assert torch.equal(together[index], torch.cat([part[index] for part in parts]))


def test_strong_augmentation_depends_on_seed_and_epoch() -> None:
    parameters = writing_parameters(100, seed=3, epoch=2)
    torch.rand(5)
    assert torch.equal(parameters, writing_parameters(100, seed=3, epoch=2))
    assert not torch.equal(parameters, writing_parameters(100, seed=3, epoch=1))
    assert not torch.equal(parameters, writing_parameters(100, seed=2, epoch=3))
    assert parameters[:, 0].abs().max() <= math.radians(12)


def test_shapes_have_the_size_of_mnists_digits() -> None:
    for image in shapes(torch.device("cpu"))[:500]:
        rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
        sides = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert max(sides) <= 20
        assert image.max() > 60


def test_an_image_does_not_depend_on_the_others(digits: ImageData) -> None:
    X, y = scale_pixels(digits.train.images[:3000]), digits.train.labels[:3000]
    parameters = writing_parameters(len(X), seed=0, epoch=0)
    together, _ = rewrite(X, y, parameters)
    for size in (7, 100):
        parts = [rewrite(*part)[0] for part in zip(*(each.split(size) for each in (X, y, parameters)), strict=True)]
        assert torch.equal(torch.cat(parts), together)


def test_choices_stay_below_1_where_float32_would_round_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest:
        """A generator whose numbers in [0, 1) are the largest."""

        def __init__(self, seed: object) -> None:
            self.random = lambda shape: np.full(shape, np.nextafter(1, 0))
            self.uniform = lambda low, high, shape: np.zeros(shape)
            self.normal = self.uniform

    with monkeypatch.context() as patched:
        patched.setattr(np.random, "default_rng", Largest)
        parameters = writing_parameters(1, seed=0, epoch=0)
    assert parameters[0, -1] < 1
    parameters[0, -UNIFORM] = 0  # not a digit: the next numbers choose a shape and a class
    _, classes = rewrite(torch.zeros(1, 1, 28, 28), torch.tensor([8]), parameters)
    assert classes.tolist() == [9]
