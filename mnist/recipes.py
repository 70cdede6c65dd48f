"""Named settings to start from: `--recipe NAME`. Every other flag changes one of the recipe's settings.

accelerate launch train.py                      # tutorial
accelerate launch train.py --recipe cnn --epochs 10
"""

from mnist.config import TrainConfig

RECIPES = {
    # The PyTorch MNIST tutorial's settings are TrainConfig's defaults: 96 to 97 % of the test images.
    "tutorial": TrainConfig(),
    "cnn": TrainConfig(
        recipe="cnn",
        model="cnn",
        batch_size=64,
        epochs=5,
        learning_rate=3e-3,
        schedule="one-cycle",
    ),
}
