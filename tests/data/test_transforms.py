"""Scaling pixels and augmenting images."""

import math
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from mnist.data.transforms import augment, augmentation_parameters, eval_batch_size, scale_pixels
from mnist.launch import hardware
from mnist.launch.hardware import eval_memory


def parameters(**values: float) -> Tensor:
    """Those of one image, which leave it as it is but for what is named."""
    return torch.tensor([[values.get(name, 0.0) for name in ("angle", "zoom", "right", "down", "mirrored")]])


def test_pixels_are_scaled_and_laid_out_like_to_tensor() -> None:
    images = torch.randint(0, 256, (4, 2, 9, 12, 3), dtype=torch.uint8)
    X = scale_pixels(images)
    assert X.shape == (4, 2, 3, 9, 12)
    assert X.is_contiguous()
    to_tensor = torchvision.transforms.ToTensor()
    assert torch.equal(X[2, 1], to_tensor(images[2, 1].numpy()))
    assert torch.equal(scale_pixels(images[2, 1]), X[2, 1])
    gray = images[..., 0]
    assert torch.equal(scale_pixels(gray)[2, 1], to_tensor(gray[2, 1].numpy()))


def test_parameters_depend_on_seed_and_epoch_and_mirror_half_of_the_images() -> None:
    drawn = augmentation_parameters(1000, seed=3, epoch=2, flip=True)
    torch.rand(5)
    assert torch.equal(drawn, augmentation_parameters(1000, seed=3, epoch=2, flip=True))
    assert not torch.equal(drawn, augmentation_parameters(1000, seed=3, epoch=1, flip=True))
    assert not torch.equal(drawn, augmentation_parameters(1000, seed=2, epoch=3, flip=True))
    assert 400 < drawn[:, 4].sum() < 600
    unmirrored = augmentation_parameters(1000, seed=3, epoch=2, flip=False)
    assert torch.equal(unmirrored[:, :4], drawn[:, :4])
    assert not unmirrored[:, 4].any()


@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (5, 3, 64, 48), (5, 3, 31, 9)])
def test_zeros_do_not_change_an_image(shape: tuple[int, ...]) -> None:
    X = torch.rand(shape)
    torch.testing.assert_close(augment(X, torch.zeros(5, 5)), X, atol=1e-5, rtol=0)


def test_each_parameter_does_what_its_name_says() -> None:
    X = torch.rand(1, 3, 20, 40)
    close: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
    torch.testing.assert_close(augment(X, parameters(mirrored=1)), X.flip(3), **close)
    torch.testing.assert_close(augment(X, parameters(right=0.1))[..., 4:], X[..., :-4], **close)
    torch.testing.assert_close(augment(X, parameters(down=0.1))[:, :, 2:], X[:, :, :-2], **close)
    # a turn by 90 degrees, clockwise, of the square in the middle: in pixels, though the image is twice as wide as high
    turned = augment(X, parameters(angle=math.pi / 2))
    torch.testing.assert_close(turned[..., 10:30], X[..., 10:30].rot90(-1, dims=(2, 3)), **close)
    larger = augment(X, parameters(zoom=1))  # pixels twice as large: the middle fills the image
    torch.testing.assert_close(larger.mean(), X[..., 5:15, 10:30].mean(), atol=0.03, rtol=0)
    torch.testing.assert_close(augment(X, parameters(right=1))[..., 0], X[..., 0], **close)  # the edge goes on outside


@pytest.mark.parametrize("shape", [(1024, 1, 28, 28), (60, 3, 64, 48)])
def test_augmentation_does_not_depend_on_the_batch_size(shape: tuple[int, ...]) -> None:
    X, drawn = torch.rand(shape), augmentation_parameters(shape[0], seed=0, epoch=0, flip=True)
    together = augment(X, drawn)
    for size in (1, 7):
        parts = zip(X.split(size), drawn.split(size), strict=True)
        assert torch.equal(together, torch.cat([augment(*part) for part in parts]))
    assert not any(torch.allclose(after, before) for after, before in zip(together, X, strict=True))
    assert together.min() >= 0
    assert together.max() <= 1 + 1e-6


def test_evaluation_batches_of_large_images_are_smaller() -> None:
    assert eval_batch_size((28, 28)) == 500
    assert eval_batch_size((224, 224, 3)) == 13
    assert eval_batch_size((3000, 3000, 3)) == 1


def test_evaluation_batches_on_a_gpu_fit_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, images in ((80, 83), (20, 83), (4, 16), (1, 13)):  # GB of 80
        monkeypatch.setattr(hardware, "device_memory", lambda device, free=free: (free * 10**9, 80 * 10**9))
        assert eval_batch_size((224, 224, 3), eval_memory(torch.device("cuda"))) == images
    monkeypatch.undo()
    assert eval_memory(torch.device("cpu")) == 0
