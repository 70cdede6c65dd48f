"""train.py with a network that draws from every random generator there is: dropout, and images moved and dimmed.

Started by tests/launched/test_resume.py, with train.py's own flags.
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mnist.models.networks
import train
from mnist.launch.main import end_process


class RandomNet(mnist.models.networks.Net):
    """Augments whole batches while it is in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x.roll(random.randint(-2, 2), dims=-1) * np.random.uniform(0.8, 1.0)
            x = F.dropout(x, 0.1)
        return super().forward(x)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    mnist.models.networks.MODELS["mlp"] = RandomNet
    end_process(train.main())
