"""--profile shows where the time of a step goes and changes nothing."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Launch, RunHere
from tests.training.test_checkpoint import end_of

PARTS = ["data", "zero_grad", "forward", "backward", "optimizer", "schedule", "logging", "checkpoints"]


def test_profiling_writes_a_table_and_a_trace_and_the_run_is_the_same(
    run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run_here("plain", limit_train_images=4000, checkpoint_every=400)
    capsys.readouterr()
    profiled = run_here("profiled", limit_train_images=4000, checkpoint_every=400, profile=True)
    printed = capsys.readouterr().out
    assert end_of(profiled) == end_of(plain)
    table = (profiled / "profile" / "steps.txt").read_text()
    assert table in printed
    microseconds = {
        name: int(value.replace(",", "")) for name, value in re.findall(r"^  (.+?) +([\d,]+) us", table, re.MULTILINE)
    }
    assert list(microseconds) == [*PARTS, "other", "step"]
    assert sum(microseconds.values()) - microseconds["step"] == pytest.approx(microseconds["step"], abs=10)
    assert all(microseconds[name] > 0 for name in PARTS)
    events = json.loads((profiled / "profile" / "trace-0.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in PARTS} == dict.fromkeys(PARTS, 20)
    assert any("addmm" in str(event.get("name")) for event in events)
    assert not (plain / "profile").exists()


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_first_epoch_that_is_too_short_to_profile_is_reported_once(
    epochs: int, run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_here("short", limit_train_images=400, epochs=epochs, profile=True)
    assert capsys.readouterr().out.count("--profile: no timings, the first epoch ended within the 50 warm-up") == 1
    assert not (folder / "profile").exists()


@pytest.mark.parametrize(
    ("batches", "epochs", "timed", "traced"), [(70, 1, 20, 0), (70, 2, 20, 0), (255, 1, 200, 5), (255, 2, 200, 5)]
)
def test_a_run_or_epoch_that_ends_early_is_profiled_up_to_there(
    batches: int, epochs: int, timed: int, traced: int, run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_here("short", limit_train_images=10 * batches, epochs=epochs, profile=True) / "profile"
    table = (folder / "steps.txt").read_text()
    assert f"({timed} batches)" in table
    shares = [float(share) for share in re.findall(r"([-\d.]+) %$", table, re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert shares[-1] >= 0  # no slower traced batches in the parts
    assert (folder / "trace-0.json").exists() == (traced > 0)
    assert ("and a trace for" in capsys.readouterr().out) == (traced > 0)
    if traced:
        events = json.loads((folder / "trace-0.json").read_text())["traceEvents"]
        assert [it.get("name") for it in events if it.get("cat") == "user_annotation"].count("backward") == traced


@pytest.mark.slow
def test_every_process_writes_a_trace_and_one_a_table(launch: Launch, tmp_path: Path) -> None:
    flags = (
        "--nproc-per-node=2",
        "train.py",
        "--profile",
        "--epochs=1",
        "--limit-train-images=6000",
        "--trackers=none",
    )
    done = launch(*flags, f"--output-dir={tmp_path}", "--run-name=x", command=("-m", "torch.distributed.run"))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "x" / "profile").iterdir()}
    assert names == {"steps.txt", "trace-0.json", "trace-1.json"}
    assert done.stdout.count("Time per step") == 1
    assert "USDT" not in done.stdout + done.stderr
