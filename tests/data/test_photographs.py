"""Strong augmentation of photographs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as T

from mnist.data.photographs import JITTER, MAX_RATIO, MIN_AREA, photo_parameters, vary

UNCHANGED = torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 1])


def photographs(count: int = 12, channels: int = 3) -> torch.Tensor:
    """Smooth images of 32 x 32, whose pixels are multiples of 1 / 255."""
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(count, channels, 5, 5), (32, 32), mode="bicubic", align_corners=True)
    return (smooth.clamp(0, 1) * 255).round() / 255


@pytest.mark.parametrize("channels", [1, 3])
def test_the_whole_image_in_its_own_light_is_unchanged(channels: int) -> None:
    X = photographs(channels=channels)
    torch.testing.assert_close(vary(X, UNCHANGED.expand(len(X), -1)), X, atol=2e-6, rtol=0)


def test_a_crop_is_the_part_of_the_image_that_is_asked_for_and_may_be_mirrored() -> None:
    X = photographs(1)
    quarter = UNCHANGED.clone()
    quarter[:4] = torch.tensor([0.5, 0.5, 0.5, -0.5])  # the upper right quarter
    expected = F.interpolate(X[..., :16, 16:], (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(vary(X, quarter[None])[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-5, rtol=0)
    mirrored = quarter.clone()
    mirrored[4] = -1
    torch.testing.assert_close(vary(X, mirrored[None]), vary(X, quarter[None]).flip(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("column", "expected"), [(5, T.adjust_brightness), (6, T.adjust_contrast), (7, T.adjust_saturation)]
)
@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_light_and_colors_change_like_torchvisions(
    column: int, expected: Callable[[torch.Tensor, float], torch.Tensor], factor: float
) -> None:
    X, parameters = photographs(), UNCHANGED.expand(12, -1).clone()
    parameters[:, column] = factor
    changed = vary(X, parameters)
    # torchvision's contrast is around the mean of the gray image, this one around that of all values
    atol = 0.03 if column == 6 else 1e-3
    torch.testing.assert_close(changed, expected(X, factor), atol=atol, rtol=0)
    assert (changed - X).abs().max() > 0.02


def test_strong_augmentation_treats_each_photograph_by_itself_to_the_bit() -> None:
    X, parameters = photographs(60), photo_parameters(60, seed=0, epoch=0)
    together = vary(X, parameters)
    for size in (1, 7):
        parts = [vary(*part) for part in zip(X.split(size), parameters.split(size), strict=True)]
        assert torch.equal(together, torch.cat(parts))


def test_crops_lie_in_the_image_and_have_the_stated_area_and_ratio() -> None:
    parameters = photo_parameters(5000, seed=3, epoch=2).double()
    sides, center, mirrored, jitter = parameters[:, :2], parameters[:, 2:4], parameters[:, 4], parameters[:, 5:]
    assert bool((sides + center.abs() <= 1 + 1e-6).all())
    assert sides.prod(dim=1).min() >= MIN_AREA - 1e-6
    ratio = sides[:, 0] / sides[:, 1]
    assert bool(((ratio < MAX_RATIO + 1e-6) & (ratio > 1 / MAX_RATIO - 1e-6)).all())
    assert 0.45 < (mirrored < 0).double().mean() < 0.55
    assert bool(((jitter - 1).abs() <= JITTER).all())
    assert torch.equal(photo_parameters(5000, 3, 2).double(), parameters)
    assert not torch.equal(photo_parameters(5000, 3, 3).double(), parameters)
