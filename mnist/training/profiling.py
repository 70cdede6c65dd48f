"""Where the time of a training step goes: `--profile`.

    Profile(run.folder, accelerator, terminal.print).watch(progress, model, optimizer, scheduler, checkpoints)

After a warm-up, TIMED batches are timed part by part; then TRACED batches are recorded by torch's profiler, operation
by operation, in `profile/trace-0.json`, a file for https://ui.perfetto.dev or chrome://tracing.
"""

import contextlib
import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, record_function

from mnist.training.progress import Progress

WARM_UP, TIMED, TRACED = 50, 200, 20  # batches


class Profile:
    """Adds up the seconds of the parts of a step; a part inside of another counts for itself only.

    On an accelerator each part is waited for, for otherwise the last one would be charged with all: such steps are
    slower than those that nobody watches.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        """The table is said by the main process and written to `folder`/profile/, the traces of all too."""
        self.folder = folder / "profile"
        self.accelerator = accelerator
        self.say = say
        self.waits = accelerator.device.type != "cpu"
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]  # seconds of what was watched inside of each part that is going on
        self.batches, self.traced, self.whole = 0, 0, 0.0

    def watch(self, progress: Progress, model: Any, optimizer: Any, scheduler: Any, checkpoints: Any) -> None:
        """Watch the first batches that `progress.rest` gives, and what the loop calls for each of them.

        `model` is what has the forward pass as its method `forward`: with --compile the loss, whose gradients count as
        a part of it.
        """
        parts: dict[str, tuple[Any, str]] = {
            "zero_grad": (optimizer, "zero_grad"),
            "forward": (model, "forward"),
            "backward": (self.accelerator, "backward"),
            "optimizer": (optimizer, "step"),
            "schedule": (scheduler, "step"),
            "logging": (progress, "update"),
            "checkpoints": (checkpoints, "after_step"),
        }
        names = ["data", *parts]
        rest, methods = progress.rest, {name: getattr(place, method) for name, (place, method) in parts.items()}

        def put(watched: bool) -> None:
            for name, (place, method) in parts.items():
                setattr(place, method, self._around(name, methods[name]) if watched else methods[name])

        def watched_rest(batches: Any) -> Iterator[Any]:
            progress.rest = rest  # type: ignore[method-assign] # the next epoch is as ever
            iterator, started = iter(rest(batches)), time.perf_counter()
            try:
                yield from self._take(iterator, WARM_UP)
                self.seconds.clear()
                put(True)
                started = time.perf_counter()
                for batch in self._take(iterator, TIMED):
                    self.batches += 1
                    yield batch
                self.whole = time.perf_counter() - started
                with self._tracing():
                    for batch in self._take(iterator, TRACED):
                        self.traced += 1
                        yield batch
            finally:  # also where the epoch or the run is over before
                put(False)
                self.whole = self.whole or time.perf_counter() - started
                self._report(names)
            yield from iterator

        progress.rest = watched_rest  # type: ignore[method-assign]

    def _take(self, iterator: Iterator[Any], count: int) -> Iterator[Any]:
        for _ in range(count):
            with self._part("data"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self.inner.append(0.0)
        started = time.perf_counter()
        with record_function(name):
            yield
            if self.waits:
                torch.accelerator.synchronize()
        taken = time.perf_counter() - started
        self.seconds[name] += taken - self.inner.pop()
        self.inner[-1] += taken

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*arguments: Any, **keywords: Any) -> Any:
            with self._part(name):
                return function(*arguments, **keywords)

        return watched

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        timed = dict(self.seconds)  # what is traced is slower, and does not count
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.accelerator.device.type == "cuda" else [])]
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else its library tells when it starts, and of a missing GPU
        recorder = profile(activities=kinds)
        try:
            with recorder:
                yield
        finally:  # also where the run is over before
            self.seconds = defaultdict(float, timed)
            if self.traced:
                self.folder.mkdir(exist_ok=True)
                recorder.export_chrome_trace(str(self.folder / f"trace-{self.accelerator.process_index}.json"))

    def _report(self, names: list[str]) -> None:
        if not self.accelerator.is_main_process:
            return
        if self.batches == 0:
            self.say(f"--profile: nothing was timed, for that begins after {WARM_UP} batches of the first epoch.")
            return
        each = {name: 1e6 * self.seconds[name] / self.batches for name in names}  # microseconds
        whole = 1e6 * self.whole / self.batches
        each["the rest"] = whole - sum(each.values())
        rows = [f"  {name:<11} {value:>9,.0f} us {100 * value / whole:>6.1f} %" for name, value in each.items()]
        table = "\n".join(
            [f"Where a step's time goes ({self.batches} batches)", *rows, f"  {'a step':<11} {whole:>9,.0f} us"]
        )
        self.folder.mkdir(exist_ok=True)
        (self.folder / "steps.txt").write_text(f"{table}\n", encoding="utf-8")
        trace = ", and a trace of some more for https://ui.perfetto.dev" if self.traced else ""
        self.say(f"{table}\n  {self.folder}/ has it{trace}")
