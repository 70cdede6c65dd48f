"""Logs a made-up run to W&B without training: three rows of metrics and the results.

python -m tests.support.track FOLDER        # prints "ready", then the outcome as JSON
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mnist.data.splits import ImageData, Split
from mnist.tracking.trackers import Tracking
from tests.support.made_up import make_run


def prepare(folder: Path, classes: int = 10, epochs: int = 3) -> ImageData:
    """Write the files of a run, without metrics; returns its dataset."""
    make_run(folder, classes, epochs)
    (folder / "metrics.jsonl").unlink()
    for name in ("model", "best"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"weights" * 1000)
    images = Split(torch.zeros(5, 28, 28, dtype=torch.uint8), torch.zeros(5, dtype=torch.long))
    return ImageData("made-up", ("0",), images, None, images, files={folder / "config.yaml": "0123"})


def track(folder: Path, data: ImageData, error: BaseException | None = None, pause: float = 0.0) -> dict[str, Any]:
    """Log three rows, `pause` seconds apart, then the results, or raise the error; returns the outcome."""
    began = time.monotonic()
    with Tracking(True, folder, "7f3e", {"learning_rate": 0.5}, ["wandb"]) as tracking:
        tracking.start(0)
        assert tracking.wandb is not None
        outcome = {"seconds_to_start": time.monotonic() - began, "warning_at_start": tracking.wandb.warning}
        for step in range(1, 4):
            tracking.log({"step": step, "epoch": 1, "train/loss": 1 / step})
            time.sleep(pause)
        if error is not None:
            raise error
        outcome["ending_since"] = time.monotonic()
        tracking.log_results(data)
    return outcome | {"warnings": tracking.warnings, "sync": tracking.sync_command}


if __name__ == "__main__":
    import wandb  # noqa: F401  # slow, and not to be timed

    run_folder = Path(sys.argv[1])
    dataset = prepare(run_folder)
    print("ready", flush=True)
    print(json.dumps(track(run_folder, dataset, pause=0.7)))
