"""Metrics are the true means, whatever the batches."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from mnist.data.loader import build_loader
from mnist.data.splits import ImageData
from mnist.data.transforms import scale_pixels
from mnist.models.networks import Net
from mnist.training.evaluate import evaluate_split
from mnist.training.losses import LOSSES
from tests.conftest import RunHere, metrics_of


@pytest.mark.parametrize("count", [1, 499, 500, 1007])
def test_evaluation_is_the_mean_over_the_images_and_counts_no_padding(
    count: int, digits: ImageData, fresh_accelerate: None
) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    images = digits.test.take(slice(0, count))
    torch.manual_seed(0)
    model = Net()
    result = evaluate_split(model, accelerator.prepare(build_loader(images, 500)), LOSSES["nll"], accelerator)
    with torch.no_grad():
        output = model(scale_pixels(images.images[:]))
    assert result.images == count
    assert result.correct == int((output.argmax(dim=1) == images.labels).sum())
    assert result.accuracy == result.correct / count
    assert result.loss == pytest.approx(F.nll_loss(output, images.labels).item(), rel=1e-5)
    assert model.training


def test_the_logged_training_loss_is_the_mean_over_the_images_of_each_step(run_here: RunHere) -> None:
    # with a tiny learning rate the weights stay the same, so the losses of all steps can be compared
    settings = {"optimizer": "sgd", "learning_rate": 1e-12, "limit_train_images": 127, "batch_size": 10}
    every = metrics_of(run_here("every", gradient_accumulation_steps=5, log_every=1, **settings))
    windows = [line["train/loss"] for line in every if "test/loss" not in line]
    assert len(windows) == 3
    whole = every[-1]["train/loss"]  # of all 127 images, by evaluation
    assert (50 * windows[0] + 50 * windows[1] + 27 * windows[2]) / 127 == pytest.approx(whole, rel=1e-5)
    some = metrics_of(run_here("some", gradient_accumulation_steps=5, log_every=3, **settings))
    assert some[0]["step"] == 3
    assert some[0]["train/loss"] == pytest.approx(sum(windows) / 3, rel=1e-5)
