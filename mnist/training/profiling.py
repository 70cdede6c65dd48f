"""Where the time of a training step goes: `--profile`.

    profile = Profile(run.folder, accelerator, print, {"optimizer": (optimizer, "step")})
    for batch in profile.watch(train_loader): ...

After a warm-up, TIMED batches are timed part by part; then TRACED batches are recorded by torch's profiler, operation
by operation, in `profile/trace-0.json`, a file for https://ui.perfetto.dev or chrome://tracing.
"""

import contextlib
import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, record_function

WARM_UP, TIMED, TRACED = 50, 200, 20  # batches


class Profile:
    """Adds up the seconds of the parts of a step; a part inside of another counts for itself only.

    On an accelerator each part is waited for, for otherwise the last one would be charged with all: such steps are
    slower than those that nobody watches.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        say: Callable[[str], None],
        parts: Mapping[str, tuple[Any, str]],
    ) -> None:
        """`parts` are what the loop calls for each batch: an object and the name of its method.

        The main process says the table and writes it to `folder`/profile/; all processes write their traces there.
        """
        self.folder = folder / "profile"
        self.accelerator = accelerator
        self.say = say
        self.methods = {name: (place, method, getattr(place, method)) for name, (place, method) in parts.items()}
        self.waits = accelerator.device.type != "cpu"
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]  # seconds of what was watched inside each part that is running
        self.batches, self.traced, self.whole = 0, 0, 0.0

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches themselves; the first of them are timed, and what the loop calls for each."""
        iterator, started = iter(batches), time.perf_counter()
        try:
            yield from self._take(iterator, WARM_UP)
            self.seconds.clear()
            self._patch(watched=True)
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
            self._patch(watched=False)
            self.whole = self.whole or time.perf_counter() - started
            self._report(["data", *self.methods])
        yield from iterator

    def _patch(self, watched: bool) -> None:
        for name, (place, method, function) in self.methods.items():
            setattr(place, method, self._around(name, function) if watched else function)

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
