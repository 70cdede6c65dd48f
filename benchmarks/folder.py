"""A folder of pictures: decoding it once on all cores and on one, an epoch's images from the cache, and their memory.

    python benchmarks/folder.py                 # 20,000 JPEGs, five rounds: some minutes on two cores
    python benchmarks/folder.py --images 4000 --rounds 3 --gibibytes 1

decode    load_dataset, from nothing, in a process of its own: its start and torch's are not counted, its workers' are
batches   all batches of 64 of an epoch in a random order, per image, in time of the one core that makes them: from
          the cache, mapped (up to 512 MiB) and read (above that), beside the same images in memory
memory    the most that a process has needed, over what it needed before, to read a made-up cache in a random order

Rounds are interleaved, each begins with another contestant, and a ratio is taken within a round: these machines are
shared, and their speed drifts.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DECODE = """
import os, sys, time
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[3])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[4])])
    from mnist.data.datasets import load_dataset
    started = time.perf_counter()
    load_dataset(sys.argv[1], sys.argv[2])
    print(time.perf_counter() - started)
"""
MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from mnist.data.loader import Training, build_loader
from mnist.data.splits import MappedImages, Split
count = Path(sys.argv[1]).stat().st_size // 12288
split = Split(MappedImages(Path(sys.argv[1]), (count, 64, 64, 3)), torch.zeros(count, dtype=torch.int64))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
for X, y, weight in build_loader(split, 64, training=Training(seed=0)): pass
print(before, peak())
"""


def make_folder(folder: Path, images: int) -> None:
    """JPEGs in colour, of 100 x 80 to 200 x 160 pixels, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(images):
        place = folder / ("cat", "dog")[number % 2] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(100, 201), rng.integers(80, 161)
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(place)


def run(script: str, scratch: Path, *arguments: object) -> list[str]:
    """The words that a process of its own prints last."""
    (scratch / "script.py").write_text(script)
    command = [sys.executable, str(scratch / "script.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout.splitlines()[-1].split()


def show(title: str, unit: str, rounds: list[dict[str, float]]) -> None:
    """Medians, and the medians of the ratios to the first contestant."""
    print(f"\n{title:32}{unit:>12}{'ratio':>8}")
    first = next(iter(rounds[0]))
    for name in rounds[0]:
        value = statistics.median(it[name] for it in rounds)
        print(f"{name:32}{value:12.2f}{statistics.median(it[name] / it[first] for it in rounds):8.2f}", flush=True)


def measure(contestants: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """Each of them once a round."""
    results = []
    for number in range(rounds):
        names = list(contestants)
        order = names[number % len(names) :] + names[: number % len(names)]
        found = {name: contestants[name]() for name in order}
        results.append({name: found[name] for name in names})
    return results


def measure_decoding(folder: Path, scratch: Path, rounds: int) -> None:
    from mnist.launch.hardware import available_cores

    def decode(cores: int) -> float:
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        return float(run(DECODE, scratch, folder, scratch / "cache", ROOT, cores)[0])

    names = {f"on {cores} core{'s' * (cores > 1)}": cores for cores in dict.fromkeys((available_cores(), 1))}
    show(
        "decode",
        "seconds",
        measure({name: lambda cores=cores: decode(cores) for name, cores in names.items()}, rounds),  # type: ignore[misc]
    )


def measure_batches(folder: Path, scratch: Path, rounds: int) -> None:
    import torch

    from mnist.config.settings import DataOptions
    from mnist.data.datasets import load_dataset
    from mnist.data.loader import Training, build_loader
    from mnist.data.splits import MappedImages, Split

    torch.set_num_threads(1)

    def epoch_of(split: Split) -> Callable[[], float]:
        batches = build_loader(split, 64, training=Training(seed=0))

        def run_epoch() -> float:
            started = time.process_time()  # the file is in memory, so that nothing is waited for
            for _ in batches:
                pass
            return (time.process_time() - started) / len(split) * 1e6

        run_epoch()  # the first has the file brought into memory
        return run_epoch

    for title, size in (("64 x 64 in colour", None), ("16 x 16: as many bytes as MNIST", 16)):
        contestants = {}
        mapped = load_dataset(str(folder), scratch, DataOptions(image_size=size)).train
        contestants["in memory"] = epoch_of(Split(mapped.images[:], mapped.labels))
        contestants["mapped"] = epoch_of(mapped)
        most, MappedImages.MAPPED = MappedImages.MAPPED, 0
        contestants["read"] = epoch_of(load_dataset(str(folder), scratch, DataOptions(image_size=size)).train)
        MappedImages.MAPPED = most
        show(title, "us an image", measure(contestants, rounds))


def measure_memory(scratch: Path, gibibytes: float) -> None:
    size = int(gibibytes * 2**30) // 12288 * 12288
    with (scratch / "cache.u8").open("wb") as file:  # written, for holes in a file are not mapped as data are
        block = np.random.default_rng(0).bytes(1 << 20)
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
    started = time.perf_counter()
    before, peak = map(float, run(MEMORY, scratch, scratch / "cache.u8", ROOT))
    seconds = time.perf_counter() - started
    print(f"\nmemory for {size / 2**30:.1f} GiB: {peak:,.0f} MiB at most, {before:,.0f} before; {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gibibytes", type=float, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        make_folder(scratch / "pictures", options.images)
        measure_decoding(scratch / "pictures", scratch, options.rounds)
        measure_batches(scratch / "pictures", scratch, options.rounds)
        measure_memory(scratch, options.gibibytes)


if __name__ == "__main__":
    main()
