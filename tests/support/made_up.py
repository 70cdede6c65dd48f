"""A run folder with random metrics, of any size."""

import json
from pathlib import Path

import torch

from mnist.config.settings import TrainConfig
from mnist.data.splits import ImageData, Split
from mnist.reporting.snapshots import Evaluation
from mnist.runs.record import Record
from mnist.training.evaluate import Mistake, Result


def make_run(folder: Path, classes: int = 10, epochs: int = 3, names: tuple[str, ...] = ()) -> Record:
    """Write settings, state, metrics and an evaluation of two images per class."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(TrainConfig(epochs=epochs, run_name="made-up").to_yaml())
    (folder / "state.json").write_text(json.dumps({"status": "finished", "commands": ["python train.py"]}))
    names = names or tuple(f"class {number}" for number in range(classes))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2 * classes, 28, 28), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(2 * classes) % classes)
    evaluation = Evaluation(folder, ImageData("made-up", names, split, None, split))
    lines = []
    for epoch in range(1, epochs + 1):
        confusion = torch.randint(3, (classes, classes), generator=generator) + 50 * torch.eye(classes).long()
        mistakes = tuple(Mistake(index, 0, 1, 0.9, 2, 0.1) for index in range(min(40, 2 * classes)))
        bins = torch.tensor([[number, number * (number + 0.5) / 15, number // 2] for number in range(15)]).double()
        result = Result(1 / epoch, confusion, bins, int(confusion.sum()), mistakes)
        values = {"step": 1000 * epoch, "epoch": epoch, "optim/learning_rate": 1e-3, "perf/epoch_seconds": 1.0}
        values |= {"perf/images_per_second": 1234.5, "perf/evaluation_seconds": 0.5}
        steps = range(1000 * (epoch - 1) + 10, 1000 * (epoch - 1) + 200, 10)
        lines += [{"step": step, "epoch": epoch, "train/loss": 1 / epoch} for step in steps]
        lines.append(values | result.values("train") | result.values("test", names))
        answers = torch.rand(len(evaluation.examples), classes, generator=generator).softmax(dim=1)
        evaluation.update({"step": 1000 * epoch, "epoch": epoch}, result, answers)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Record.read(folder)
