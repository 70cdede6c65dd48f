"""Train image classifiers on any hardware with the loop in train.py, and apply the trained models.

from mnist import load
load("runs/latest").predict("seven.png").label
"""

from typing import Any

__version__ = "0.1.0"


def load(source: Any) -> Any:
    """Load the trained model of a run, a folder or the Hugging Face Hub: see mnist.inference.predict.load."""
    from mnist.inference.predict import load

    return load(source)
