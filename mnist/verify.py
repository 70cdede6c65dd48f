"""Check that training works correctly on this machine: reproducible, the same on every device and number of processes,
safe to interrupt, and fast. Everything is measured on real runs of train.py.

    for title, rows in verify(LaunchedRuns(config, processes=2, folder=folder)): ...    # mnist verify --processes 2
"""

import itertools
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from mnist.config.settings import CHOICES
from mnist.errors import ConfigError
from mnist.launch.hardware import available_cores, check_kernels, device_memory, device_name
from mnist.runs.launched import IN_FLOAT64, STEPS, LaunchedRuns, RunError, killed_at_the_end
from mnist.runs.record import Record, read_state

GRACE_SECONDS = 10  # between SIGTERM and SIGKILL: Docker's default; Kubernetes and Slurm wait 30
BUSY = "import torch; a = torch.rand(2000, 2000, device={device!r})\nwhile True: a @ a"  # another program


class Row(NamedTuple):
    """A check or a fact."""

    check: str
    figure: str
    limit: str
    result: str  # pass, fail, not possible; info for a fact
    note: str = ""  # the likely cause of a failure and what to do; why a check is not possible


def check(name: str, value: float, limit: float, advice: str, unit: str = "") -> Row:
    """A row that passes if `value` is at most `limit`; `advice` is its note if it fails."""
    passed = value <= limit  # False for NaN
    return Row(name, f"{value:.3g}{unit}", f"{limit:g}{unit}", "pass" if passed else "fail", "" if passed else advice)


def fact(name: str, figure: str) -> Row:
    return Row(name, figure, "", "info")


def not_possible(name: str, reason: str) -> Row:
    return Row(name, "", "", "not possible", reason)


# --- comparisons


def largest_difference(a: Path, b: Path) -> float:
    """The largest absolute difference between the weights of the models in two run folders."""
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    if first.keys() != second.keys():
        return math.inf
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def without_times(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl without speed and memory, which differ between equal runs."""
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def count_different_lines(a: Record, b: Record) -> int:
    """Lines of metrics.jsonl that differ, apart from speed and memory."""
    return sum(mine != other for mine, other in itertools.zip_longest(without_times(a.lines), without_times(b.lines)))


def compare(name: str, runs: LaunchedRuns, options: Sequence[dict[str, Any]], advice: str) -> Callable[[], Row]:
    """Compare two runs in float64: final weights for the project's own networks, otherwise first loss and gradient.

    In a deep network, Adam turns rounding errors of near-zero gradients into large differences within a few steps.
    The runs start now, if this machine can do several at the same time; the function returned waits for them.
    """
    shared: dict[str, Any] = {"before": IN_FLOAT64, "mixed_precision": "no", "compile": None}
    is_own = runs.config.model in CHOICES["model"]
    if not is_own:  # the first step of plain SGD is the gradient
        shared |= {"max_steps": 1, "optimizer": "sgd", "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
        shared |= {"max_grad_norm": None}
    folder = name.replace(" ", "-").replace(",", "")
    ahead = [runs.train_ahead(f"{folder}-{number}", **(shared | each)) for number, each in enumerate(options)]

    def row() -> Row:
        a, b = (record() for record in ahead)
        difference = largest_difference(a.folder, b.folder)
        if is_own:
            return check(f"{name}: weights", difference, 1e-10, advice)
        loss, other_loss = (run.lines[0]["train/loss"] for run in (a, b))
        scale = runs.config.learning_rate * a.lines[0]["optim/gradient_norm"]
        return check(f"{name}: loss and gradient", max(abs(other_loss / loss - 1), difference / scale), 1e-8, advice)

    return row


def why_incomparable(runs: LaunchedRuns, processes: int = 1) -> str:
    """Why this network's weights depend on the device, or on the number of processes if these are several; or empty."""
    from mnist.models.saved import load_model

    if runs.config.pretrained == "head":  # all other layers compute as in evaluation
        return ""
    net, config = load_model(runs.short.folder / "model")
    X = torch.rand(4, *config.image_shape)
    with torch.no_grad():
        if not torch.equal(net.train()(X), net(X)):
            return "it draws random numbers (dropout), which differ between devices and processes"
    if processes > 1 and any(getattr(module, "track_running_stats", False) for module in net.modules()):
        return "its BatchNorm normalizes over the images of each process"
    return ""


# --- the checks


def machine(runs: LaunchedRuns) -> Iterator[Row]:
    """Devices, versions, memory, cores and storage."""
    count = 1 if runs.device.type == "cpu" else torch.accelerator.device_count()
    yield fact("device", f"{count} x {device_name(runs.device)}" if count > 1 else device_name(runs.device))
    yield fact("Python, torch", f"{platform.python_version()}, {torch.__version__}")
    if runs.device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.split() if shutil.which(asked[0]) else []
        yield fact("CUDA, driver", f"{torch.version.cuda}, {driver[0] if driver else 'unknown'}")
        capability, architectures = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
        check_kernels(torch.cuda.get_device_name(), capability, architectures)
        yield Row("kernels for the GPU", "sm_{}{}".format(*capability), " ".join(architectures), "pass")
        yield fact("free GPU memory", f"{device_memory(runs.device)[0] / 2**30:.1f} GiB")
    if (shared := Path("/dev/shm")).is_dir():
        yield fact("free in /dev/shm", f"{shutil.disk_usage(shared).free / 2**30:.2f} GiB")
    advice = "Processes share a core. Start fewer, or give the container more cores (docker run --cpus)."
    yield check("processes per core", runs.processes / available_cores(), 1, advice)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        with (runs.folder / "written").open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        seconds.append(time.perf_counter() - started)
    advice = "Storage is slow, and so are checkpoints. Choose another --output-dir."
    yield check("writing 1 MiB to --output-dir", statistics.median(seconds), 1, advice, " s")


def repeatable(runs: LaunchedRuns) -> Iterator[Row]:
    """Two equal runs; during the second one, another program keeps the device busy."""
    first = runs.whole  # before the other program starts
    busy = subprocess.Popen([sys.executable, "-c", BUSY.format(device=str(runs.device))])
    with killed_at_the_end(busy):
        again = runs.train("again", runs.processes, **runs.longer)
    advice = "Something draws random numbers that --seed does not seed, or a kernel is nondeterministic."
    yield check("weights", largest_difference(first.folder, again.folder), 0, advice)
    yield check("differing lines in metrics.jsonl", count_different_lines(first, again), 0, advice)


def interrupted(runs: LaunchedRuns) -> Iterator[Row]:
    """A run ended by SIGTERM, then by SIGKILL, and resumed each time. Compared with one that is not."""
    settings, folder = runs.longer | {"resume": "auto"}, runs.folder / "interrupted"
    process = runs.start("interrupted", runs.processes, **settings)
    with killed_at_the_end(process):
        runs.wait_for_step(settings["max_steps"] // 4, "interrupted", process)
        asked = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.wait()
        seconds = time.perf_counter() - asked
    state = read_state(folder / "state.json")
    advice = "A step or a checkpoint takes long. Allow more time between SIGTERM and SIGKILL."
    yield check("SIGTERM: time to exit", seconds, GRACE_SECONDS, advice, " s")
    lost = state["step"] - (state["checkpoint"] or 0) if state["exit_code"] == 143 else math.inf
    yield check("SIGTERM: steps lost", lost, 0, f"It ended as {state['status']}: {state['error']}.")
    process = runs.start("interrupted", runs.processes, **settings)
    runs.kill_at_step(settings["max_steps"] // 2, "interrupted", process)
    resumed = runs.train("interrupted", runs.processes, **settings)
    advice = "A checkpoint lacks some state, e.g. of a random generator, or of a network or optimizer of your own."
    yield check("SIGKILL: final weights", largest_difference(runs.whole.folder, folder), 0, advice)
    yield check("SIGKILL: differing lines in metrics.jsonl", count_different_lines(runs.whole, resumed), 0, advice)


def devices(runs: LaunchedRuns) -> Iterator[Row]:
    """The same run on the accelerator and on the CPU."""
    name = "GPU and CPU"
    if runs.device.type == "cpu":
        yield not_possible(name, "torch sees no GPU")
    elif reason := why_incomparable(runs):
        yield not_possible(name, reason)
    else:
        variable = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
        tf32 = [runs.train_ahead(f"tf32-{on}", mixed_precision="no", environment={variable: on}) for on in "01"]
        advice = "This GPU computes wrong results. Try another driver, or another version of torch."
        yield compare(name, runs, ({"environment": {"ACCELERATE_USE_CPU": "true"}}, {}), advice)()
        exact, rounded = (record() for record in tf32)
        yield fact("with TF32, weights would differ by", f"{largest_difference(exact.folder, rounded.folder):.1e}")


def several(runs: LaunchedRuns) -> Iterator[Row]:
    """One process and several, with a smaller last batch and last accumulation window."""
    name = f"{runs.processes} processes and 1"
    reason = why_incomparable(runs, runs.processes) if runs.processes > 1 else "add --processes 2, or more"
    if reason:
        yield not_possible(name, reason)
        return
    advice = "Gradients are averaged wrongly. Try NCCL_P2P_DISABLE=1; NCCL_DEBUG=INFO shows what it does."
    for title, steps in ((name, 1), (f"{name}, accumulating 4 batches", 4)):
        one = {"gradient_accumulation_steps": steps}
        yield compare(title, runs, (one, one | {"processes": runs.processes}), advice)()


def speed(runs: LaunchedRuns) -> Iterator[Row]:
    """Images per second, where the time goes, and what several processes lose."""
    settings = runs.longer | {"epochs": 2, "max_steps": None, "checkpoint_every": None, "log_every": None}
    rate = runs.train("speed", **settings).last["perf/images_per_second"]
    yield fact("images per second", f"{rate:,.0f}")
    advice = "Other programs use this machine, or logging or storage is slow. --profile shows where the time goes."
    yield check("time, relative to a loop in plain PyTorch", runs.plain_rate(**settings) / rate, 1.5, advice)
    profiled = runs.train("profile", **settings, profile=True)
    folder = profiled.folder / "profile"
    table = [line.split() for line in (folder / "steps.txt").read_text().splitlines()[1:-1]] if folder.is_dir() else []
    shares = sorted(((float(line[-2]), line[0]) for line in table), reverse=True)[:4]
    if shares:
        yield fact("parts of a step", ", ".join(f"{name} {share:.0f} %" for share, name in shares))
    if runs.device.type == "cuda" and (trace := folder / "trace-0.json").is_file():
        events = json.loads(trace.read_text())["traceEvents"]
        kernels = sum(event["dur"] for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
        steps = sum(event.get("name") == "optimizer" and event.get("cat") == "user_annotation" for event in events)
        busy = kernels / 1e6 / max(1, steps) * rate / runs.global_batch_size  # of a step without profiling
        yield fact("GPU busy", f"{100 * busy:.0f} % of a step")
    if runs.processes > 1:
        together = runs.train("together", runs.processes, **settings).last["perf/images_per_second"]
        alone = runs.rate_alone(**settings)
        if runs.device.type == "cpu":
            yield fact(f"speed of {runs.processes} processes / separate runs", f"{together / alone:.2f}")
        else:
            advice = "Averaging gradients is slow. Use larger batches; NCCL_DEBUG=INFO shows which links it uses."
            yield check(f"time lost to averaging over {runs.processes} processes", 1 - together / alone, 0.5, advice)


def precision(runs: LaunchedRuns) -> Iterator[Row]:
    """bf16, fp16 and --compile."""
    ahead = {kind: runs.train_ahead(kind, mixed_precision=kind, compile=False) for kind in ("no", "bf16", "fp16")}
    name = "compiled and eager"
    advice = "The compiled code is wrong. Train without --compile, or try another version of torch."
    compiled = compare(name, runs, ({"compile": False}, {"compile": True}), advice)
    exact = ahead.pop("no")()
    for kind, record in ahead.items():
        try:
            lower = record()
        except ConfigError as error:
            yield not_possible(f"{kind}: mean training loss", str(error))
            continue
        means = [statistics.mean(line["train/loss"] for line in run.losses) for run in (exact, lower)]
        advice = "A layer needs float32, or training is barely stable: try a lower --learning-rate."
        yield check(f"{kind}: mean training loss", abs(means[1] / means[0] - 1), 0.05, advice)
        if "optim/skipped_steps" in lower.losses[-1]:
            yield fact(f"{kind}: skipped steps", f"{lower.losses[-1]['optim/skipped_steps']} of {STEPS}")
    try:
        row = compiled()
        reason = Record.read(runs.folder / "compiled-and-eager-1").environment.get("not_compiled")
    except ConfigError as error:
        reason = str(error)
    yield not_possible(name, reason) if reason else row


GROUPS = {
    "This machine": machine,
    "The same seed twice, the second time next to another program": repeatable,
    "Interrupted twice and resumed, compared with an uninterrupted run": interrupted,
    "GPU compared with CPU, in float64": devices,
    "Several processes compared with one, with the same global batch, in float64": several,
    "Speed": speed,
    "Lower precision and --compile, compared with float32 and eager": precision,
}


def verify(runs: LaunchedRuns) -> Iterator[tuple[str, Iterator[Row]]]:
    """The title and rows of each group. Reading a row measures it; a run that fails becomes a row.

    Raises ConfigError for settings that train.py refuses.
    """

    def rows_of(group: Callable[[LaunchedRuns], Iterator[Row]]) -> Iterator[Row]:
        try:
            yield from group(runs)
        except (RunError, ConfigError) as error:
            yield Row("a run", "", "", "fail", str(error))
        finally:
            runs.end()

    for title, group in GROUPS.items():
        yield title, rows_of(group)
        if group is machine:
            runs.short  # noqa: B018 (run it now: if it fails, no other check is possible)
