"""A folder of images: decoding it on all cores and on one, reading an epoch from the cache, and memory.

    python benchmarks/folder.py                 # 20,000 JPEGs, five rounds: a few minutes on two cores
    python benchmarks/folder.py --images 4000 --rounds 3 --gibibytes 1

decode    seconds of load_dataset without a cache, in a new process; excludes its imports, includes its workers'
batches   CPU time per image of 64 x 64, in us, to make the batches of 64 of a shuffled epoch: from the cache, mapped
          (up to 512 MiB) and read (above that), beside the same images in memory
memory    peak of a process that reads a generated cache in a random order, beside its peak before
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure import Figures, command_line, header, in_fresh_process, interleave, print_table
from PIL import Image


def make_folder(folder: Path, images: int) -> None:
    """JPEGs in color, of 100 x 80 to 200 x 160 pixels, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(images):
        path = folder / ("cat", "dog")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(100, 201), rng.integers(80, 161)
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path)


def decode(folder: Path, cache: Path, cores: int) -> Figures:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    from mnist.data.datasets import load_dataset

    shutil.rmtree(cache, ignore_errors=True)
    started = time.perf_counter()
    load_dataset(str(folder), cache)
    return {"seconds": time.perf_counter() - started}


def read_all(file: Path) -> tuple[float, float]:
    """Peak memory in MiB before and after reading the images, uint8 [N, 64, 64, 3], in `file`."""
    import torch

    from mnist.data.loader import Training, build_loader
    from mnist.data.splits import MappedImages, Split
    from mnist.launch.hardware import peak_memory

    count = file.stat().st_size // 12288
    split = Split(MappedImages(file, (count, 64, 64, 3)), torch.zeros(count, dtype=torch.int64))
    before = peak_memory(torch.device("cpu"))
    for _ in build_loader(split, 64, training=Training(seed=0)):
        pass
    return before / 2**20, peak_memory(torch.device("cpu")) / 2**20


def measure_batches(folder: Path, cache: Path, rounds: int) -> dict[str, list[Figures]]:
    import torch

    from mnist.data.datasets import load_dataset
    from mnist.data.loader import Training, build_loader
    from mnist.data.splits import MappedImages, Split

    torch.set_num_threads(1)

    def epoch_of(split: Split) -> Callable[[int], Figures]:
        batches = build_loader(split, 64, training=Training(seed=0))

        def run_epoch(number: int) -> Figures:
            started = time.process_time()
            for _ in batches:
                pass
            return {"us per image": (time.process_time() - started) / len(split) * 1e6}

        run_epoch(0)  # brings the file into memory
        return run_epoch

    splits = {}
    for name, most in (("mapped", MappedImages.MAPPED), ("read", 0)):
        MappedImages.MAPPED = most
        splits[name] = load_dataset(str(folder), cache).train
        assert (vars(splits[name].images)["pixels"] is None) == (name == "read")
    splits["in memory"] = Split(splits["mapped"].images[:], splits["mapped"].labels)
    return interleave({name: epoch_of(split) for name, split in splits.items()}, rounds)


def main() -> None:
    from mnist.launch.hardware import available_cores

    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=20_000, help="JPEGs in the folder (default: 20000)")
    parser.add_argument("--gibibytes", type=float, default=4, help="size of the cache for `memory` (default: 4)")
    options = parser.parse_args()
    print(header("torch", "pillow"))
    with tempfile.TemporaryDirectory() as name:
        folder, cache, file = Path(name, "images"), Path(name, "cache"), Path(name, "cache.u8")
        make_folder(folder, options.images)

        def decode_on(cores: int) -> Callable[[int], Figures]:
            return lambda _: in_fresh_process(decode, folder, cache, cores)

        cores = available_cores()
        print_table(interleave({"all cores": decode_on(cores), "one core": decode_on(1)}, options.rounds), "all cores")
        print_table(measure_batches(folder, cache, options.rounds), "in memory", "us per image")

        size = int(options.gibibytes * 2**30) // 12288 * 12288
        block = np.random.default_rng(0).bytes(1 << 20)
        with file.open("wb") as opened:  # written, because holes in a file are not mapped as data is
            for start in range(0, size, len(block)):
                opened.write(block[: size - start])
        started = time.perf_counter()
        before, peak = in_fresh_process(read_all, file)
        seconds = time.perf_counter() - started
    print(f"\nmemory for {size / 2**30:.1f} GiB: {peak:,.0f} MiB at most, {before:,.0f} before; {seconds:.0f} s")


if __name__ == "__main__":
    main()
