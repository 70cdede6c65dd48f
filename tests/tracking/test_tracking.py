"""metrics.jsonl and W&B: its log file, and misbehaving servers on loopback."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import wandb

from mnist.config.settings import PROJECT_FOLDER, TrainConfig
from mnist.errors import ConfigError, DivergedError
from mnist.launch.signals import Interrupted
from mnist.tracking.trackers import Tracking
from mnist.tracking.wandb_run import artifact_name
from tests.conftest import Launch, MainHere, ResumeHere, RunHere, SetEnvironment, metrics_of, state_of, user_environment
from tests.support import wandb_log
from tests.support.track import prepare, track
from tests.support.wandb_server import Stalling, Vanishing, answering, http_server, refusing_server, silent_server
from train import train

TrackHere = Callable[..., dict[str, Any]]

KEY = "0123456789" * 4
SMALL = ("--limit-train-images=2000", "--limit-test-images=500", "--epochs=2", "--log-every=50")


def log_of(folder: Path) -> Path:
    """The W&B log with the history of a run."""
    logs = [path for path in folder.glob("wandb/*run-*/run-*.wandb") if wandb_log.history(path)]
    assert len(logs) == 1
    return logs[0]


def logged_by_wandb(path: Path) -> list[dict[str, Any]]:
    """The rows of W&B's history, without W&B's own keys."""
    return [{key: value for key, value in row.items() if key[0] != "_"} for row in wandb_log.history(path)]


def test_without_an_account_wandb_logs_offline_what_metrics_jsonl_holds(main_here: MainHere, tmp_path: Path) -> None:
    done = main_here(*SMALL, f"--output-dir={tmp_path}", "--run-name=x")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "x"
    log, lines = log_of(folder), metrics_of(folder)
    assert len(lines) == 400 // 50 + 2
    assert logged_by_wandb(log)[: len(lines)] == lines

    config = wandb_log.config(log)
    environment = json.loads((folder / "environment.json").read_text())
    logged = dataclasses.asdict(TrainConfig.load(folder / "config.yaml")) | environment
    assert {name: config[name] for name in logged} == logged
    assert (config["num_processes"], config["global_batch_size"], config["parameters"]) == (1, 10, 59_210)
    assert {"torch", "accelerate", "cuda", "device", "git_commit", "git_dirty", "dataset_md5"} <= environment.keys()

    axes, summary = wandb_log.metrics(log), wandb_log.summary(log)
    assert {axes[name].step_metric for name in axes if "/" in name} == {"step"}
    for key, best in (("test/accuracy", max), ("test/loss", min), ("train/loss", min), ("test/class_accuracy/7", max)):
        values = [line[key] for line in lines if key in line]
        assert summary[key] == {best.__name__: best(values), "last": values[-1]}, key
    assert summary["optim/learning_rate"]["last"] == 1e-3
    assert wandb_log.exit_code(log) == 0
    assert state_of(folder)["status"] == "finished"

    assert "offline (not logged in)" in done.stdout
    (sync,) = [line for line in done.stdout.splitlines() if "wandb sync" in line]
    assert Path(sync.split("wandb sync ")[1].split()[0]).resolve() == log.parent


def test_a_run_without_trackers_writes_nothing_for_wandb(run_here: RunHere) -> None:
    folder = run_here("x", trackers="none")
    assert not (folder / "wandb").exists()
    assert metrics_of(folder)[-1]["epoch"] == 1


@pytest.mark.slow
def test_a_run_with_wandb_disabled_writes_nothing_for_wandb(launch: Launch, tmp_path: Path) -> None:
    small = ("--limit-train-images=200", "--limit-test-images=100", "--epochs=1")
    done = launch(*small, f"--output-dir={tmp_path}", "--run-name=x", command=("train.py",), WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "x" / "wandb").exists()
    assert metrics_of(tmp_path / "x")[-1]["epoch"] == 1
    assert "wandb sync" not in done.stdout
    assert "warning" not in done.stdout


def track_in_process(folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start a process that logs three rows with Tracking and prints the outcome; returns after its imports."""
    job = subprocess.Popen(
        [sys.executable, "-m", "tests.support.track", str(folder)],
        cwd=PROJECT_FOLDER,
        env=user_environment(folder.parent, **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    return job


def wait_for(job: "subprocess.Popen[str]") -> tuple[str, str, float]:
    """The stdout and stderr of a successful job, and when it had exited."""
    stdout, stderr = job.communicate(timeout=120)
    gone = time.monotonic()
    assert job.returncode == 0, stderr
    return stdout, stderr, gone


@pytest.mark.slow
def test_a_misbehaving_server_costs_ten_seconds_at_start_and_end_and_one_warning(tmp_path: Path) -> None:
    servers: dict[str, AbstractContextManager[str]] = {
        "refuses": refusing_server(),
        "never answers": silent_server(),
        "fails": http_server(answering(500)),
        "denies": http_server(answering(401)),
        "vanishes": http_server(Vanishing),
        "stalls": http_server(Stalling),
    }
    with ThreadPoolExecutor(len(servers)) as pool, ExitStack() as stack:
        waits = {}
        for name, server in servers.items():
            job = track_in_process(tmp_path / name, WANDB_BASE_URL=stack.enter_context(server), WANDB_API_KEY=KEY)
            waits[name] = pool.submit(wait_for, job)  # at once, to time its exit
        outputs = {name: wait.result() for name, wait in waits.items()}
    for name, (stdout, stderr, gone) in outputs.items():
        assert stderr == "", name
        outcome = json.loads(stdout)
        assert outcome["seconds_to_start"] < 10, name
        assert gone - outcome["ending_since"] < 10, name  # all processes share the clock
        assert len(outcome["warnings"]) == 1, name
        assert outcome["warning_at_start"] == (None if name in ("vanishes", "stalls") else outcome["warnings"][0]), name

        log = log_of(tmp_path / name)
        assert log.parent.name.startswith("run-" if name in ("vanishes", "stalls") else "offline-run-")
        assert logged_by_wandb(log)[:3] == metrics_of(tmp_path / name)
        assert len(metrics_of(tmp_path / name)) == 3
        *command, synced = shlex.split(outcome["sync"])
        assert (command, Path(synced)) == (["wandb", "sync"], log.parent)


@pytest.mark.slow
def test_a_run_with_a_server_that_never_answers_succeeds_with_one_warning(launch: Launch, tmp_path: Path) -> None:
    with silent_server() as url:
        done = launch(*SMALL, f"--output-dir={tmp_path}", "--run-name=x", WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.split()[:1] == ["warning"]]) == 1
    assert "wandb" not in done.stderr.lower()
    lines = metrics_of(tmp_path / "x")
    assert logged_by_wandb(log_of(tmp_path / "x"))[: len(lines)] == lines


@pytest.mark.slow
def test_a_run_continues_if_wandbs_process_is_killed(tmp_path: Path) -> None:
    job = track_in_process(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and metrics.read_text()):  # until the first line is logged
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(job.pid), "wandb-core"], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout), signal.SIGKILL)
    stdout, _, _ = wait_for(job)
    assert len(json.loads(stdout)["warnings"]) == 1
    assert len(metrics_of(tmp_path / "run")) == 3


@pytest.fixture
def track_here(clean_environment: SetEnvironment) -> TrackHere:
    """Log a made-up run to W&B in this process, as a user without an account; see tests/support/track.py."""

    def run(
        folder: Path, error: BaseException | None = None, classes: int = 10, epochs: int = 3, **variables: str
    ) -> dict[str, Any]:
        clean_environment(**variables)
        try:
            return track(folder, prepare(folder, classes, epochs), error)
        finally:
            wandb.teardown()  # it has read the environment

    return run


def test_wandbs_environment_variables_apply(track_here: TrackHere, tmp_path: Path) -> None:
    variables = {"PROJECT": "ours", "ENTITY": "team", "NAME": "nice name", "TAGS": "a,b", "RUN_GROUP": "folds"}
    variables |= {"JOB_TYPE": "train", "NOTES": "a note", "RUN_ID": "chosen1", "MODE": "offline"}
    track_here(tmp_path / "run", **{f"WANDB_{name}": value for name, value in variables.items()})
    (run,) = (record.run for record in wandb_log.read_records(log_of(tmp_path / "run")) if record.HasField("run"))
    assert (run.project, run.entity, run.display_name, run.run_id) == ("ours", "team", "nice name", "chosen1")
    assert sorted(run.tags) == ["a", "b"]
    assert (run.run_group, run.job_type, run.notes) == ("folds", "train", "a note")


@pytest.mark.parametrize(
    ("error", "exit_code", "preempting", "alerts"),
    [
        (RuntimeError("out of luck"), 1, False, []),
        (Interrupted(15), 143, True, []),
        (DivergedError("test/loss is nan at step 7"), 1, False, ["test/loss is nan at step 7"]),
    ],
)
def test_a_run_that_ends_early_is_marked_as_failed_or_preempted(
    error: BaseException, exit_code: int, preempting: bool, alerts: list[str], track_here: TrackHere, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        track_here(tmp_path / "run", error)
    log = log_of(tmp_path / "run")
    records = list(wandb_log.read_records(log))
    assert wandb_log.exit_code(log) == exit_code
    assert any(record.HasField("preempting") for record in records) == preempting
    assert [record.alert.text for record in records if record.HasField("alert")] == alerts


def test_models_and_dataset_are_small_artifacts_with_metadata(
    track_here: TrackHere, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    track_here(tmp_path / "run", classes=1000, epochs=20)
    assert capfd.readouterr().err == ""
    records = wandb_log.read_records(log_of(tmp_path / "run"))
    artifacts = [record.artifact for record in records if record.HasField("artifact")]
    best, last, data = (it for it in artifacts if it.type != "run_table")  # which W&B adds
    assert (data.type, data.name, data.use_after_commit) == ("dataset", "made-up", True)
    assert json.loads(data.metadata) == {"md5": hashlib.md5(b"0123").hexdigest(), "train_images": 5, "test_images": 5}
    (reference,) = data.manifest.contents
    assert reference.ref == (tmp_path / "run" / "config.yaml").as_uri()
    assert (best.type, last.type) == ("model", "model")
    assert "best" in best.aliases
    assert list(last.aliases) == ["latest"]  # logged last, so W&B moves the alias to it
    assert best.name == last.name == "model-7f3e"
    assert json.loads(last.metadata)["learning_rate"] == 0.5
    assert [it.path for it in last.manifest.contents] == ["model.safetensors"]

    files = [path.stat().st_size for path in (tmp_path / "run" / "wandb").rglob("media/**/*") if path.is_file()]
    assert len(files) == 5  # tables: of both charts, classes, mistakes, examples
    tables = [it for it in artifacts if it.type == "run_table"]
    images = [it.size for table in tables for it in table.manifest.contents if it.path.endswith(".png")]
    assert len(images) == 40 + 10  # mistakes and examples
    assert sum(files) + sum(it.size for table in tables for it in table.manifest.contents) < 1_000_000


@pytest.mark.parametrize(
    ("name", "artifact"),
    [
        ("my pets", "my-pets"),
        ("Übung v1.2", "Ubung-v1.2"),
        ("猫", "dataset"),
        ("a/b:c", "a-b-c"),
        ("x" * 200, "x" * 128),
    ],
)
def test_a_dataset_with_any_name_becomes_an_artifact(name: str, artifact: str) -> None:
    assert artifact_name(name) == artifact
    wandb.Artifact(artifact, type="dataset")


def test_models_are_sent_whatever_the_runs_id_and_whatever_else_fails(
    clean_environment: SetEnvironment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.teardown()
    clean_environment(WANDB_MODE="offline", WANDB_RUN_ID="my pets")

    def fail(*_: object) -> None:
        raise ValueError("no table")

    log_artifact = wandb.Run._log_artifact

    def without_such_arguments(run: Any, artifact: Any, type: Any = None, **others: Any) -> Any:
        if "use_after_commit" in others:  # as a wandb that has renamed it
            raise TypeError("unexpected keyword argument")
        return log_artifact(run, artifact, type=type, **others)

    monkeypatch.setattr("mnist.tracking.wandb_run._media", fail)
    monkeypatch.setattr(wandb.Run, "_log_artifact", without_such_arguments)
    told = track(tmp_path / "run", prepare(tmp_path / "run", classes=3, epochs=1))
    wandb.teardown()
    sent = [it.artifact.name for it in wandb_log.read_records(log_of(tmp_path / "run")) if it.HasField("artifact")]
    assert sent == ["model-my-pets", "model-my-pets", "made-up"]  # the best and the last, the dataset
    assert told["warnings"] == ["W&B did not receive all results (no table); they are on disk."]


def test_a_class_with_a_dot_in_its_name_has_an_axis_and_a_best_value(
    clean_environment: SetEnvironment, tmp_path: Path
) -> None:
    clean_environment(WANDB_MODE="offline")
    key = "test/class_accuracy/St. Bernard"
    with Tracking(True, tmp_path, "7f3e", {}, ["wandb"]) as tracking:
        tracking.start(0)
        for step, accuracy in enumerate((0.5, 0.9, 0.7)):
            tracking.log({"step": step, "epoch": 1, key: accuracy})
    wandb.teardown()
    assert wandb_log.summary(log_of(tmp_path))[key] == {"max": 0.9, "last": 0.7}


def test_a_foreign_line_in_the_metrics_does_not_fail_a_finished_run(
    run_here: RunHere,
    resume_here: ResumeHere,
    clean_environment: SetEnvironment,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wandb.teardown()
    clean_environment(WANDB_MODE="offline")
    run = run_here("x", epochs=1, trackers="wandb")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("somebody's note\n")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(["a note", *lines[:-1]]) + "\n")
    resume_here(run, epochs=2)
    assert state_of(run)["status"] == "finished"
    assert "W&B did not receive the results: " in capsys.readouterr().out
    assert (run / "model" / "model.safetensors").is_file()
    wandb.teardown()


def test_a_tracker_that_is_not_installed_is_an_error_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, missing = importlib.util.find_spec, ("aim", "comet_ml")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    with pytest.raises(ConfigError, match=r"aim, comet_ml not installed. Run: pip install aim comet-ml \(or"):
        train(TrainConfig(trackers="wandb,aim,comet_ml", output_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_a_tracker_that_fails_is_dropped_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = Tracking(True, tmp_path, "7f3e", {}, ["tensorboard"])
    (tmp_path / "tensorboard").write_text("no folder")
    with tracking:
        assert tracking.start(0) == "tensorboard (failed)"
        tracking.log({"step": 1, "epoch": 1, "train/loss": 0.5})
    assert len(tracking.warnings) == 1
    assert "tensorboard stopped (" in tracking.warnings[0]
    assert len(metrics_of(tmp_path)) == 1


def test_a_resumed_run_has_each_step_once_in_tensorboard(run_here: RunHere, resume_here: ResumeHere) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_here("x", trackers="tensorboard", log_every=5, checkpoint_every=10, max_steps=18)
    for newest in sorted((folder / "checkpoints").glob("step-*"))[-1:]:
        shutil.rmtree(newest)
    resume_here(folder)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [it.step for it in events.Scalars("train/loss")] == [line["step"] for line in metrics_of(folder)]


@pytest.mark.slow
def test_with_a_read_only_home_wandbs_folders_are_in_the_run(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="/proc/nowhere"):  # root cannot write there either
        Path("/proc/nowhere").mkdir()
    job = track_in_process(tmp_path / "run", HOME="/proc/nowhere")
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 0, stderr
    assert stderr == ""
    assert (tmp_path / "run" / "wandb" / "cache").is_dir()
    assert [line["step"] for line in logged_by_wandb(log_of(tmp_path / "run")) if "train/loss" in line] == [1, 2, 3]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("WANDB_MODE", "sometimes", "WANDB_MODE=sometimes: Input should be"),
        ("WANDB_PROJECT", "a/b", "project name 'a/b'"),
    ],
)
def test_an_invalid_wandb_variable_is_an_error_before_training(
    variable: str, value: str, words: str, main_here: MainHere, tmp_path: Path
) -> None:
    done = main_here(f"--output-dir={tmp_path}", "--run-name=x", **{variable: value})
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert state_of(tmp_path / "x")["status"] == "failed"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metrics_jsonl_refuses_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    with Tracking(True, tmp_path, "7f3e", {}, []) as tracking:
        tracking.log({"step": 1, "train/loss": 0.5})
        with pytest.raises(ValueError, match="not JSON compliant"):
            tracking.log({"step": 2, "train/loss": value})
        # flushed row by row
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 0.5}
