"""Images per second of 1, 2 and 4 processes that train one model, beside as many independent runs.

    python benchmarks/scaling.py                                # three rounds, about 12 minutes on two cores
    python benchmarks/scaling.py --rounds 5 --picture docs/scaling.png

together  torchrun --nproc-per-node n train.py, which averages the gradients at every step
alone     n times python train.py at the same time, with the same batch per process and the same number of threads:
          what the machine itself allows if nothing is exchanged

Each of n processes has cores / n threads, in both cases (mnist/launch/hardware.py), and the same number of images
whatever n is. The figures are those of the epochs in the middle of a run, when all processes are busy. Efficiency is
together / alone within a round.
"""

import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from measure import Figures, column, command_line, header, interleave, run_train, spread

PROCESSES = (1, 2, 4)
EPOCHS = 6
WORKLOADS = {  # flags, and images per epoch and process
    "mlp, batches of 10": ((), 10_000),
    "cnn, batches of 64": (("--recipe=cnn",), 4_096),
    "cnn, batches of 256": (("--recipe=cnn", "--batch-size=256"), 5_120),
}


def images_per_second(workload: str, count: int, together: bool, scratch: Path) -> float:
    """The sum over `count` processes, averaged over the epochs between the first and the last."""
    flags, images = WORKLOADS[workload]
    limits = ("--limit-test-images=100", f"--limit-train-images={images * (count if together else 1)}")
    launcher = ("-m", "torch.distributed.run", f"--nproc-per-node={count}") if together else ()
    settings = (*flags, *limits, f"--epochs={EPOCHS}", "--trackers=none")
    script, environment = (*launcher, "train.py"), {} if together else {"LOCAL_WORLD_SIZE": str(count)}
    with ThreadPoolExecutor(count) as pool:
        train = partial(run_train, scratch, *settings, script=script, environment=environment)
        jobs = [pool.submit(train) for _ in range(1 if together else count)]
    epochs = [column(job.result().evaluations, "perf/images_per_second") for job in jobs]
    return sum(statistics.mean(speeds[1:-1]) for speeds in epochs)


def measure_both(workload: str, count: int, scratch: Path, number: int) -> Figures:
    order = (True, False) if number % 2 == 0 else (False, True)
    speeds = {together: images_per_second(workload, count, together, scratch) for together in order}
    return {"together": speeds[True], "alone": speeds[False], "efficiency": speeds[True] / speeds[False]}


def median(runs: list[Figures], figure: str) -> float:
    return statistics.median(column(runs, figure))


def draw(results: dict[tuple[str, int], list[Figures]], path: Path) -> None:
    """Images per second over the number of processes, a panel per workload."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(workload for workload, _ in results))
    figure = Figure(figsize=(4.4 * len(workloads), 3.6), layout="constrained")
    for panel, workload in zip(figure.subplots(1, len(workloads), squeeze=False)[0], workloads, strict=True):
        places = range(len(PROCESSES))
        for name, shift, color in (("alone", -0.2, "#c8ccd4"), ("together", 0.2, "#2a6fdb")):
            heights = [median(results[workload, count], name) for count in PROCESSES]
            bars = panel.bar([place + shift for place in places], heights, 0.4, color=color, label=name)
        efficiencies = [median(results[workload, count], "efficiency") for count in PROCESSES]
        panel.bar_label(bars, [f"{100 * efficiency:.0f} %" for efficiency in efficiencies], padding=2)
        panel.set_xticks(places, [str(count) for count in PROCESSES])
        panel.set(title=workload, xlabel="processes", ylabel="images per second")
        panel.margins(y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--only", default="", help="workloads whose name starts with this: mlp, cnn (default: all)")
    parser.add_argument("--picture", type=Path, help="file to draw the medians into, .png or .svg")
    arguments = parser.parse_args()
    cases = [(name, count) for name in WORKLOADS if name.startswith(arguments.only) for count in PROCESSES]
    with tempfile.TemporaryDirectory() as scratch:
        contestants = {f"{case[0]}, {case[1]} processes": partial(measure_both, *case, Path(scratch)) for case in cases}
        results = dict(zip(cases, interleave(contestants, arguments.rounds).values(), strict=True))

    print(header("torch", "accelerate"))
    row = "{:20} {:>9} {:>10} {:>10} {:>24} {:>12}"
    print(row.format("images per second", "processes", "together", "alone", "efficiency", "to 1 process"))
    for (workload, count), runs in results.items():
        together, alone = median(runs, "together"), median(runs, "alone")
        gain = f"{together / median(results[workload, 1], 'together'):.2f}"
        efficiency = spread(column(runs, "efficiency"))
        print(row.format(workload, count, f"{together:,.0f}", f"{alone:,.0f}", efficiency, gain))
    if arguments.picture:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
