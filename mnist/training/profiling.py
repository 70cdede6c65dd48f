"""Measures where the time of a training step goes: `--profile`.

    profile = Profile(run.folder, accelerator, print, {"optimizer": (optimizer, "step")})
    for batch in profile.watch(train_loader): ...

After WARM_UP batches, TIMED batches are timed part by part. Then torch's profiler records TRACED batches in
`profile/trace-0.json`, for https://ui.perfetto.dev or chrome://tracing.
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
    """Adds up the seconds of each part of a step, excluding the parts nested in it.

    On a GPU, each part is synchronized, which makes profiled steps slower: otherwise the last part would get all time.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        output: Callable[[str], None],
        parts: Mapping[str, tuple[Any, str]],
    ) -> None:
        """`parts` are the calls of the training loop per batch: an object and the name of its method.

        The main process passes the table to `output`, and writes it to `folder`/profile/. All processes write traces.
        """
        self.folder = folder / "profile"
        self.accelerator = accelerator
        self.output = output
        self.methods = {name: (owner, method, getattr(owner, method)) for name, (owner, method) in parts.items()}
        self.waits = accelerator.device.type != "cpu"
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]  # seconds of the parts nested in each running part
        self.batches, self.traced, self.whole = 0, 0, 0.0

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches and profile the first of them."""
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
        finally:  # also if the epoch or the run ends early
            self._patch(watched=False)
            self.whole = self.whole or time.perf_counter() - started
            self._report(["data", *self.methods])
        yield from iterator

    def _patch(self, watched: bool) -> None:
        for name, (owner, method, function) in self.methods.items():
            setattr(owner, method, self._timed(name, function) if watched else function)

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

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*arguments: Any, **keywords: Any) -> Any:
            with self._part(name):
                return function(*arguments, **keywords)

        return watched

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        timed = dict(self.seconds)  # traced batches are slower and do not count
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.accelerator.device.type == "cuda" else [])]
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it logs its start and a missing GPU
        recorder = profile(activities=kinds)
        try:
            with recorder:
                yield
        finally:  # also if the run ends early
            self.seconds = defaultdict(float, timed)
            if self.traced:
                self.folder.mkdir(exist_ok=True)
                recorder.export_chrome_trace(str(self.folder / f"trace-{self.accelerator.process_index}.json"))

    def _report(self, names: list[str]) -> None:
        if not self.accelerator.is_main_process:
            return
        if self.batches == 0:
            self.output(f"--profile: no timings, the first epoch ended within the {WARM_UP} warm-up batches.")
            return
        microseconds = {name: 1e6 * self.seconds[name] / self.batches for name in names}
        step = 1e6 * self.whole / self.batches
        microseconds["other"] = step - sum(microseconds.values())
        rows = [f"  {name:<11} {value:>9,.0f} us {100 * value / step:>6.1f} %" for name, value in microseconds.items()]
        table = "\n".join([f"Time per step ({self.batches} batches)", *rows, f"  {'step':<11} {step:>9,.0f} us"])
        self.folder.mkdir(exist_ok=True)
        (self.folder / "steps.txt").write_text(f"{table}\n", encoding="utf-8")
        trace = " and a trace for https://ui.perfetto.dev" if self.traced else ""
        self.output(f"{table}\n  saved in {self.folder}/: steps.txt{trace}")
