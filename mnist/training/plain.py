"""The training loop in plain PyTorch, to compare speed with: images in memory, no logging, no checkpoints.

python -m mnist.training.plain train.py --recipe cnn --epochs 2     # prints the images per second of the last epoch
"""

import sys
import time

import torch

from mnist.config.command_line import parse_command_line
from mnist.config.recipes import RECIPES
from mnist.config.settings import TrainConfig
from mnist.data.datasets import load_dataset
from mnist.data.transforms import scale_pixels
from mnist.launch.hardware import choose_threads, has_bf16
from mnist.launch.processes import resolve_precision, training_device
from mnist.models.by_name import build_model
from mnist.training.losses import LOSSES
from mnist.training.optimizers import build_optimizer


def images_per_second(config: TrainConfig) -> float:
    """Train for --epochs on this machine's accelerator, otherwise the CPU; returns the speed of the last epoch."""
    device = training_device()
    precision = resolve_precision(config.mixed_precision, device.type, has_bf16(device))
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    torch.manual_seed(config.seed)
    data = load_dataset(config.dataset, config.data_dir, config.data_options)
    model = build_model(config.model, len(data.class_names), data.image_shape, normalization=data.normalization)
    model.to(device)
    images, labels = data.train.images[:].to(device), data.train.labels.to(device)
    batch_size = config.batch_sizes(1).global_batch_size
    choose_threads(model, scale_pixels(images[:batch_size]))
    optimizer = build_optimizer(config.optimizer, model.parameters(), config.learning_rate, config.weight_decay)
    loss_function = LOSSES[config.loss]
    seconds = 0.0
    for _ in range(config.epochs or 1):
        started = time.perf_counter()
        for index in torch.randperm(len(images), device=device).split(batch_size):  # type: ignore[no-untyped-call]
            sample_weight = torch.full((len(index),), 1 / len(index), device=device)
            optimizer.zero_grad()
            with torch.autocast(device.type, low, enabled=low is not None):
                output = model(scale_pixels(images[index]))
            loss = loss_function(output.float(), labels[index], sample_weight)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - started
    return len(images) / seconds


if __name__ == "__main__":
    print(images_per_second(parse_command_line(RECIPES, sys.argv[2:])))
