"""`mnist verify`: its checks pass here, and each finds its kind of fault."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mnist import verify
from mnist.cli import main
from mnist.config.settings import PROJECT_FOLDER, TrainConfig
from mnist.runs import launched
from mnist.runs.launched import LaunchedRuns
from mnist.verify import Row, check, interrupted, machine, precision, repeatable, several

Group = Callable[[LaunchedRuns], Iterator[Row]]
FAULTY = PROJECT_FOLDER / "tests" / "support" / "faulty.py"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "SECONDS", 0.5)
    monkeypatch.setattr(verify, "GRACE_SECONDS", 60)  # this machine may be busy


def failed(rows: Iterator[Row]) -> list[str]:
    return [row.check for row in rows if row.result == "fail"]


def test_a_figure_passes_up_to_its_limit_and_nan_never_does() -> None:
    results = [check("x", value, 1.0, "Mend it.") for value in (0.5, 1.0, 1.1, float("nan"))]
    assert [row.result for row in results] == ["pass", "pass", "fail", "fail"]
    assert [row.note for row in results] == ["", "", "Mend it.", "Mend it."]


def test_the_facts_of_the_machine_are_shown(tmp_path: Path) -> None:
    rows = list(machine(LaunchedRuns(TrainConfig(), 1, tmp_path)))
    assert {row.check for row in rows} >= {"device", "Python, torch", "writing 1 MiB to --output-dir"}
    assert failed(machine(LaunchedRuns(TrainConfig(), 10_000, tmp_path))) == ["processes per core"]


def test_settings_that_train_py_refuses_end_with_its_message_and_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "--epoch", "3"])
    assert main(["verify", "--learning-rate", "-1"]) == 2
    assert "--learning-rate -1.0: must be" in capsys.readouterr().err
    assert main(["verify", "--dataset", str(tmp_path / "no"), "--output-dir", str(tmp_path)]) == 2
    assert f"{tmp_path / 'no'}: no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # cleaned up


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--recipe=cnn", "--processes=2"]])
def test_verify_passes_here_and_leaves_only_its_json_file(
    flags: list[str], small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "verify.json"
    exit_code = main(["verify", *flags, "--output", str(output), "--output-dir", str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    failures = [row["check"] for row in rows if row["result"] == "fail"]
    assert set(failures) <= {"time, relative to a loop in plain PyTorch"}, printed  # depends on the machine's load
    assert exit_code == (1 if failures else 0)
    assert sum(row["result"] == "pass" for row in rows) >= 8
    assert all(row["check"] in printed for row in rows)
    assert list((tmp_path / "runs").iterdir()) == []
    assert psutil.Process().children(recursive=True) == []


FAULTS: dict[str, tuple[Group, int, list[str]]] = {
    "seed_changes": (repeatable, 1, ["weights", "differing lines in metrics.jsonl"]),
    "last_batch_weighs_too_little": (
        *(several, 2),
        ["2 processes and 1: weights", "2 processes and 1, accumulating 4 batches: weights"],
    ),
    "generators_are_not_restored": (
        *(interrupted, 1),
        ["SIGKILL: final weights", "SIGKILL: differing lines in metrics.jsonl"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_makes_the_right_rows_fail(
    fault: str, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", fault)
    group, processes, rows = FAULTS[fault]
    runs = LaunchedRuns(TrainConfig(), processes, tmp_path, script=FAULTY)
    assert failed(group(runs)) == rows


@pytest.mark.slow
def test_what_a_network_cannot_do_is_not_possible_and_says_why(small: None, tmp_path: Path) -> None:
    runs = LaunchedRuns(TrainConfig(model="resnet18", batch_size=4), 2, tmp_path)
    rows = [*several(runs), *precision(runs)]
    assert [row.check for row in rows if row.result == "not possible"] == [
        *("2 processes and 1", "fp16: mean training loss", "compiled and eager")
    ]
    assert "BatchNorm" in rows[0].note
    assert "BatchNorm" in rows[-1].note
