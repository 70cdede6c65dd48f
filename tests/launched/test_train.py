"""Whole runs."""

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest

from mnist.config.settings import PROJECT_FOLDER
from tests.conftest import Launch, MainHere, ResumeHere, RunHere, metrics_of, state_of


@pytest.mark.parametrize(
    ("images", "floor", "settings"),
    [
        (6000, 0.8, {}),  # usually 0.90
        (1500, 0.7, {"model": "cnn"}),
        (3000, 0.7, {"loss": "mse"}),
        (4000, 0.7, {"schedule": "cosine", "optimizer": "radam"}),
    ],
)
def test_models_losses_and_optimizers_learn(
    images: int, floor: float, settings: dict[str, str], run_here: RunHere
) -> None:
    folder = run_here("learns", limit_train_images=images, limit_test_images=1000, epochs=2, **settings)
    first, last = (line for line in metrics_of(folder) if "test/loss" in line)
    assert last["train/loss"] < first["train/loss"]
    assert min(last["train/accuracy"], last["test/accuracy"]) > floor


def test_the_readme_shows_the_loop_of_train_py() -> None:
    loop = (PROJECT_FOLDER / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert textwrap.indent(loop, "    ") in (PROJECT_FOLDER / "train.py").read_text()


def test_the_seed_determines_weights_and_metrics_to_the_bit(run_here: RunHere) -> None:
    folders = [run_here(name, seed=seed, log_every=1) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    a, b = ([{k: line[k] for k in line if k[:5] != "perf/"} for line in metrics_of(run)] for run in folders[:2])
    assert a == b


def test_the_files_and_metric_keys_of_a_run(run_here: RunHere) -> None:
    folder = run_here("whole", report=True, limit_train_images=1000, epochs=2, log_every=40, validation_size=100)
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", "config.yaml", "environment.json", "evaluation.json", "metrics.jsonl", "state.json"),
        *("best", "checkpoints", "model"),
        *("report.html", "curves.png", "confusion.png", "mistakes.png", "prediction.png"),
    }
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [40, 80, 100, 120, 160, 200, 200]
    assert set(lines[0]) == {"step", "epoch", "train/loss", "optim/learning_rate", "optim/gradient_norm"}
    assert set(lines[2]) == {
        *("step", "epoch", "optim/learning_rate"),
        *("perf/images_per_second", "perf/epoch_seconds", "perf/evaluation_seconds", "perf/peak_memory_mib"),
        *("train/loss", "train/accuracy", "val/loss", "val/accuracy", "test/loss", "test/accuracy"),
        *(f"{part}/class_accuracy/{digit}" for part in ("val", "test") for digit in range(10)),
        *(f"{part}/{name}" for part in ("val", "test") for name in ("macro_f1", "balanced_accuracy", "top5_accuracy")),
        *("val/calibration_error", "test/calibration_error"),
    }
    state = state_of(folder)
    assert (state["status"], state["step"], state["epoch"], state["error"]) == ("finished", 200, 2, None)


def test_max_steps_ends_a_run_in_mid_epoch_with_one_evaluation(
    run_here: RunHere, resume_here: ResumeHere, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_here("short", max_steps=7, gradient_accumulation_steps=2, epochs=5)
    lines = metrics_of(run)
    assert [line["step"] for line in lines if "test/accuracy" in line] == [7] == [lines[-1]["step"]]
    printed = capsys.readouterr().out
    assert "epoch 1/1 " in printed
    assert "no steps are left" not in printed
    resume_here(run)
    assert "  finished    no steps are left; to train on, add --epochs N or --max-steps N" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run_without_a_model(main_here: MainHere, tmp_path: Path) -> None:
    done = main_here(
        *("--optimizer=sgd", "--learning-rate=1e30", "--log-every=20", "--limit-train-images=1000"),
        *("--trackers=none", f"--output-dir={tmp_path / 'runs'}", "--run-name=diverged"),
    )
    assert done.returncode == 1
    assert "step 20 (epoch 1)" in done.stderr
    assert "--learning-rate" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "runs" / "diverged"
    assert not (folder / "model").exists()
    assert metrics_of(folder) == []
    assert state_of(folder)["status"] == "failed"
    assert "step 20" in state_of(folder)["error"]


def test_a_terminal_shows_a_progress_bar_and_a_digit(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # rows, columns
    process = subprocess.Popen(
        [sys.executable, "train.py", "--trackers=none", "--limit-train-images=3000", "--limit-test-images=100"]
        + ["--epochs=1", "--log-every=10", f"--output-dir={tmp_path}"],
        cwd=PROJECT_FOLDER,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # on Linux: the other end is closed
        os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "/300 steps" in text
    assert "images/s:" in text or "images/s  " in text
    assert "█" in text
    assert "Predicted " in text
    assert "true class 0" in text
    assert "/report.html" in text


def test_training_imports_neither_torchs_compiler_nor_torchvision(launch: Launch, tmp_path: Path) -> None:
    script = """if True:
        import os, sys, train
        from mnist.session import Session
        after_step = Session.after_step
        def stop_after_a_logged_step(self, loss):
            after_step(self, loss)
            if self.progress.step == 2:
                print(*sys.modules, flush=True)
                os._exit(0)
        Session.after_step = stop_after_a_logged_step
        train.main()
    """
    flags = "--trackers=none", f"--output-dir={tmp_path}", "--log-every=1", "--max-grad-norm=1"
    done = launch("-c", script, *flags, command=())
    loaded = set(done.stdout.split())
    assert "accelerate" in loaded, done.stderr
    assert not loaded & {"torch._dynamo", "torch.distributed.tensor", "torchvision", "wandb"}


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux's namespaces")
def test_training_needs_no_network_no_home_and_no_writable_checkout(tmp_path: Path) -> None:
    script = """
        mount --bind "$CHECKOUT" "$CHECKOUT" && mount -o remount,ro,bind "$CHECKOUT"
        if touch "$CHECKOUT/x" 2>/dev/null; then echo "still writable"; exit 9; fi
        exec "$PYTHON" -m accelerate.commands.launch train.py --limit-train-images=1000 --limit-test-images=200 \
            --epochs=1 --output-dir="$OUTPUT" --run-name=frugal
    """
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "--net", "sh", "-c", script],
        cwd=PROJECT_FOLDER,
        env={"PATH": os.environ["PATH"], "HOME": "/proc/nowhere", "CUDA_VISIBLE_DEVICES": ""}
        | {"CHECKOUT": str(PROJECT_FOLDER), "PYTHON": sys.executable, "OUTPUT": str(tmp_path / "runs")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "frugal"
    assert state_of(folder)["status"] == "finished"
    assert (folder / "prediction.png").is_file()
    assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert "rror" not in done.stderr, done.stderr
    assert "atplotlib" not in done.stderr, done.stderr


@pytest.mark.slow
def test_tutorial_reaches_95_percent_accuracy_cnn_and_fast_99(launch: Launch, tmp_path: Path) -> None:
    for recipe, floor in (("tutorial", 0.95), ("cnn", 0.99), ("fast", 0.99)):
        done = launch("--recipe", recipe, f"--output-dir={tmp_path}", f"--run-name={recipe}", "--trackers=none")
        assert done.returncode == 0, done.stderr
        assert metrics_of(tmp_path / recipe)[-1]["test/accuracy"] >= floor
        assert json.loads((tmp_path / recipe / "model" / "config.json").read_text())["dataset"] == "mnist"
