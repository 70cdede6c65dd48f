"""The benchmarks' own code; their figures depend on the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mnist.config.settings import PROJECT_FOLDER


def read(output: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows and the Markdown that benchmarks/gpu.py has written."""
    return json.loads(Path(f"{output}.json").read_text())["rows"], Path(f"{output}.md").read_text()


def test_a_contestant_that_fails_is_logged_and_the_others_are_measured(tmp_path: Path) -> None:
    from measure import interleave, read_log

    def fail(number: int) -> dict[str, float]:
        if number == 1:
            raise ValueError("lost")
        return {"seconds": 1.0}

    log = tmp_path / "log"
    with pytest.raises(SystemExit, match="failed: b"):
        interleave({"a": lambda number: {"seconds": float(number)}, "b": fail}, 3, log)
    assert read_log(log) == ({"a": [{"seconds": 0.0}, {"seconds": 1.0}, {"seconds": 2.0}]}, {"b": "ValueError: lost"})


def test_a_round_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    from measure import interleave, read_log

    def end(number: int) -> dict[str, float]:
        if number == 1:
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        interleave({"b": end, "a": lambda number: {"seconds": 2.0}}, 2, log)
    assert read_log(log) == ({"b": [{"seconds": 1.0}], "a": [{"seconds": 2.0}]}, {})


def test_goals_are_judged_by_the_rounds_that_ran() -> None:
    from gpu import Goal, Outcome, judge

    outcome = Outcome(problem="stopped", results={"a": [{"s": 1.0}, {"s": 3.0}], "b": [{"s": 2.0}, {"s": 3.0}]})
    row = judge(Goal("peers", "work", ("a", "b"), "s", 0.75), outcome, 2)
    assert row == ("work", "0.7500 [0.5000, 1.000]", "at most 0.75", "met", "")
    row = judge(Goal("peers", "work", ("a",), "s", 2.5, at_least=True), outcome, 3)
    assert row[2:] == ("at least 2.5", "not met", "2 of 3 rounds: stopped")
    assert judge(Goal("peers", "work", ("a", "c"), "s", 1), outcome, 2)[3:] == ("not measured", "stopped")


@pytest.mark.parametrize(
    ("body", "counts"), [("pass", {"passed": 1, "failed": 1, "skipped": 0}), ("pytest.skip()", None)]
)
def test_tests_that_fail_are_named_and_none_that_ran_is_no_success(
    body: str, counts: dict[str, int] | None, tmp_path: Path
) -> None:
    from gpu import Outcome, read_tests

    (tmp_path / "test_it.py").write_text(
        f"import pytest\ndef test_a():\n    {body}\ndef test_b():\n    {body}\n    assert {counts is None}\n"
    )
    command = [sys.executable, "-m", "pytest", "--junitxml=log"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    outcome = Outcome()
    read_tests(tmp_path / "log", outcome)
    assert outcome.results == ({"pytest": [counts]} if counts else {})
    assert outcome.notes["pytest"] == ("test_it::test_b" if counts else "no test passed: 0 failed, 2 skipped")


def test_every_goal_has_a_row_even_without_time_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device=cpu", "--minutes=0", f"--output={tmp_path / 'check'}"])
    assert gpu.main() == 1
    rows, text = read(tmp_path / "check")
    assert len(rows) == len([goal for goal in gpu.GOALS if goal.part in gpu.CHECK])
    assert {row["result"] for row in rows} == {"not measured"}
    assert all(row["work"] in text and row["note"] == "skipped: the 0 minutes are over" for row in rows)


@pytest.mark.slow
def test_the_gpu_benchmarks_run_on_a_cpu_with_tiny_sizes(tmp_path: Path) -> None:
    flags = ["--device=cpu", "--quick", f"--output={tmp_path / 'check'}", "--only", "peers", "fast", "epochs"]
    command = [sys.executable, "benchmarks/gpu.py", *flags, "resnet50"]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, text = read(tmp_path / "check")
    assert len(rows) == 12
    for row in rows:
        assert row["work"] in text
        assert row["figure"] or "is not installed" in row["note"], row
        assert (row["result"] in ("met", "not met")) == bool(row["figure"] and row["goal"])
