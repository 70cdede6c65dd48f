"""train.py with a fault that `mnist verify` must find, named by the variable FAULT."""

import os
import runpy
import secrets
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import accelerate.utils

import mnist.data.loader
import mnist.models.networks
import mnist.session
import mnist.training.checkpoint
from mnist.config.settings import PROJECT_FOLDER
from tests.support.augmented import RandomNet


def seed_changes() -> Any:
    """Every process start has another seed."""
    return mnist.session, "set_seed", lambda seed: accelerate.utils.set_seed(secrets.randbelow(2**31))


def last_batch_weighs_too_little() -> Any:
    """Its weights lack the factor that DistributedDataParallel divides by."""
    build_loader = mnist.data.loader.build_loader

    def faulty(split: Any, global_batch_size: int, num_processes: int = 1, *others: Any) -> Any:
        loader: Any = build_loader(split, global_batch_size, num_processes, *others)
        loader.dataset.sample_weight[-loader.dataset.size :] /= num_processes
        return loader

    return mnist.data.loader, "build_loader", faulty


def generators_are_not_restored() -> Any:
    """A resumed run with dropout draws other random numbers than it would have."""
    mnist.models.networks.MODELS["mlp"] = RandomNet
    return mnist.training.checkpoint.RandomState, "load_state_dict", lambda self, state: None


if __name__ == "__main__":
    setattr(*globals()[os.environ["FAULT"]]())
    sys.argv[0] = str(PROJECT_FOLDER / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
