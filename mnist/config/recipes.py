"""Presets for `--recipe NAME`; other flags override their settings.

accelerate launch train.py                      # tutorial
accelerate launch train.py --recipe cnn --epochs 10
accelerate launch train.py --recipe fast        # 99 % test accuracy in the shortest time
accelerate launch train.py --recipe best        # the highest test accuracy of a single network
accelerate launch train.py --recipe photos --dataset PetImages      # a folder of photographs
accelerate launch train.py --recipe photos --dataset PetImages --pretrained none      # photos-scratch
"""

import dataclasses

from mnist.config.settings import TrainConfig

RECIPES = {
    # the PyTorch MNIST tutorial's settings: 96 to 97 % test accuracy
    "tutorial": TrainConfig(),
    "cnn": TrainConfig(recipe="cnn", model="cnn", batch_size=64, epochs=5, learning_rate=3e-3, schedule="one-cycle"),
    "fast": TrainConfig(
        recipe="fast",
        model="cnn-quick",
        batch_size=128,
        epochs=3,
        optimizer="adamw",
        learning_rate=1e-2,
        weight_decay=0.05,
        schedule="one-cycle",
    ),
    "best": TrainConfig(
        recipe="best",
        model="cnn-deep",
        augment="light",
        batch_size=128,
        epochs=45,
        optimizer="adamw",
        learning_rate=3e-3,
        weight_decay=0.05,
        schedule="one-cycle",
    ),
    # a pretrained network without BatchNorm, so that n processes equal one
    "photos": TrainConfig(
        recipe="photos",
        image_size=224,
        augment="strong",
        model="convnext_tiny",
        pretrained="all",
        optimizer="adamw",
        learning_rate=2e-4,
        weight_decay=0.05,
        schedule="one-cycle",
        max_grad_norm=1.0,
        epochs=None,
        global_batch_size=64,
        mixed_precision="auto",
    ),
}
# without pretrained weights, a network that learns from few images: docs/your-data.md compares it with ConvNeXt
RECIPES["photos-scratch"] = dataclasses.replace(
    RECIPES["photos"],
    recipe="photos-scratch",
    image_size=64,
    model="cnn-deep",
    pretrained="none",
    learning_rate=3e-3,
)
WITHOUT_WEIGHTS = {"photos": "photos-scratch"}
"""What a recipe becomes with `--pretrained none`."""
