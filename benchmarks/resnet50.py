"""ResNet-50 on a folder of images, beside the same network on a batch that never changes: does it wait for data?

    python benchmarks/resnet50.py --device cuda                     # in bf16; float32 on a CPU
    python benchmarks/resnet50.py --device cuda --only cache timm
    python benchmarks/resnet50.py --model cnn-quick --image-size 28 --batch-size 8     # to try it on a CPU

cache    train.py on a generated folder, from the cache of decoded images, which are copied to a GPU if they fit
host     the same, but the images stay in the cache, as those of a folder do that does not fit
fixed    a loop in plain PyTorch with the same network, optimizer, precision and layout, on one batch on the device
timm     the loop of timm's train script, which its package lacks, with timm's network and its loader on all cores: it
         decodes and augments the images in every epoch

Each has a process for all rounds and warms up in it. Of train.py and timm, the last epoch counts.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from folder import make_folder
from measure import Figures, now

CONTESTANTS = ("cache", "host", "fixed", "timm")
RATE = "images/s"
WARM_UP = 5  # steps


def train_ours(options: argparse.Namespace, folder: Path, images_on_host: bool, seed: int) -> Figures:
    flags = {"dataset": folder, "data-dir": folder, "model": options.model, "image-size": options.image_size}
    flags |= {"batch-size": options.batch_size, "epochs": 2, "compile": False}
    flags |= {"mixed-precision": "bf16" if options.device == "cuda" else "no", "trackers": "none", "seed": seed}
    if images_on_host:
        torch.cuda.mem_get_info = lambda device=None: (0, 0)  # no image fits
    record = measure.train_warm(folder, *(f"--{name}={value}" for name, value in flags.items()))
    return {RATE: record.last["perf/images_per_second"]}


def train_fixed(options: argparse.Namespace, seed: int) -> Figures:
    from mnist.models.by_name import build_model
    from mnist.training.optimizers import build_optimizer

    torch.manual_seed(seed)
    shape = (3, options.image_size, options.image_size)
    net = build_model(options.model, 2, shape).to(options.device)
    X = torch.rand(options.batch_size, *shape, device=options.device)
    y = torch.arange(options.batch_size, device=options.device) % 2

    layout = torch.channels_last if options.device == "cuda" else torch.contiguous_format
    net, X = net.to(memory_format=layout), X.to(memory_format=layout)
    optimizer = build_optimizer("adam", net.parameters(), 1e-3)
    for step in range(WARM_UP + options.steps):
        if step == WARM_UP:
            started = now(options.device)
        optimizer.zero_grad()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            outputs = net(X)
        F.nll_loss(outputs.float(), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {RATE: options.steps * options.batch_size / (now(options.device) - started)}


def train_timm(options: argparse.Namespace, folder: Path, seed: int) -> Figures:
    import timm
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2

    torch.manual_seed(seed)
    device = torch.device(options.device)
    loader = create_loader(
        create_dataset("", str(folder / "train")),
        (3, options.image_size, options.image_size),
        options.batch_size,
        is_training=True,
        num_workers=len(os.sched_getaffinity(0)),
        device=device,
    )
    net = timm.create_model(options.model, num_classes=2).to(device)
    optimizer = create_optimizer_v2(net, "sgd", lr=0.05, momentum=0.9)
    for _ in range(2):
        started, images = now(options.device), 0
        for X, y in loader:
            optimizer.zero_grad()
            with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
                loss = F.cross_entropy(net(X), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            images += len(X)
        seconds = now(options.device) - started
    return {RATE: images / seconds}


def main() -> None:
    parser = measure.command_line(__doc__, rounds=3, on_gpus=True)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS[:3], help="default: all but timm")
    parser.add_argument("--model", default="resnet50", help="default: resnet50")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--steps", type=int, default=32, help="batches per epoch (default: 32)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_folder(folder / "train", options.steps * options.batch_size)
        make_folder(folder / "test", options.batch_size)
        calls: dict[str, tuple[Any, ...]] = {
            "cache": (train_ours, options, folder, False),
            "host": (train_ours, options, folder, True),
            "fixed": (train_fixed, options),
            "timm": (train_timm, options, folder),
        }
        contestants = {name: measure.in_one_process(*calls[name]) for name in options.only}
        results = measure.interleave(contestants, options.rounds, options.log)
    print(measure.header("torch", "torchvision", "accelerate", "timm", device=options.device))
    measure.print_table(results, options.only[-1], RATE)


if __name__ == "__main__":
    main()
