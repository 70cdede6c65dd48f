"""Train image classifiers with one visible loop, on any hardware. `accelerate launch train.py` starts here."""

__version__ = "0.1.0"
