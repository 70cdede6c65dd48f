"""Checkpoints: written atomically, resumed from the newest intact one, and free of code."""

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mnist import files
from mnist.config.settings import TrainConfig
from mnist.errors import ConfigError, UserError
from mnist.files import new_folder, remove_folder, remove_leftovers, write_file
from mnist.models.saved import load_model
from mnist.session import Session
from mnist.training import checkpoint
from mnist.training.checkpoint import (
    Checkpoints,
    DamagedError,
    RandomState,
    bit_identity,
    checksum,
    flatten,
    read_whole,
    unflatten,
)
from mnist.training.evaluate import Result, evaluate_split
from mnist.training.lean import LeanAccelerator
from tests.conftest import ResumeHere, RunHere, metrics_of, state_of


def checkpoints_of(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def end_of(folder: Path) -> tuple[Any, ...]:
    """The result of a run, without times."""
    newest = checkpoints_of(folder)[-1]
    state = json.loads((newest / "state.json").read_text())
    del state["essence"], state["launch"], state["progress"]["seconds"], state["tracking"]
    for values in (state["progress"]["results"], lines := metrics_of(folder)):
        for line in [values] if isinstance(values, dict) else lines:
            for key in [key for key in line if key.startswith("perf/")]:
                del line[key]
    files = ["model.safetensors", "optimizer.safetensors"]
    sums = [hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in files]
    model = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    return state, sums, model, lines


def test_checkpoints_are_saved_every_n_steps_and_at_the_end_and_three_are_kept(run_here: RunHere) -> None:
    folder = run_here("x", checkpoint_every=4, max_steps=14)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())  # and nothing else
    assert names == ["step-0000000008", "step-0000000012", "step-0000000014-evaluated"]
    assert state_of(folder)["checkpoint"] == 14


def test_by_default_checkpoints_are_per_epoch_unless_they_take_over_5_percent(
    run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Any = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)  # a real one depends on the machine's load
    is_due = Checkpoints.is_due

    def is_due_after_ten_seconds(checkpoints: Checkpoints) -> bool:
        clock.now += 10
        return is_due(checkpoints)

    monkeypatch.setattr(checkpoint, "time", clock)
    monkeypatch.setattr(Checkpoints, "is_due", is_due_after_ten_seconds)
    for name, seconds_per_file, steps in (("cheap", 0.05, (20, 40, 60)), ("expensive", 0.5, (20, 60))):
        monkeypatch.setattr(files, "flush", lambda path, cost=seconds_per_file: setattr(clock, "now", clock.now + cost))
        folder = run_here(name, epochs=3)
        assert [path.name for path in checkpoints_of(folder)] == [f"step-{step:010}-evaluated" for step in steps]


def test_progress_is_read_from_the_checkpoint_not_from_its_name(run_here: RunHere, resume_here: ResumeHere) -> None:
    folder = run_here("x", checkpoint_every=7, max_steps=7, epochs=9)
    (newest,) = checkpoints_of(folder)[-1:]
    state = json.loads((newest / "state.json").read_text())["progress"]
    assert (state["step"], state["epoch"], state["batch"], state["images_seen"]) == (7, 1, 7, 70)
    for path in checkpoints_of(folder)[:-1]:
        shutil.rmtree(path)
    newest.rename(newest.with_name("step-0000009999"))
    resume_here(folder, max_steps=9)
    assert metrics_of(folder)[-1]["step"] == 9


@pytest.mark.parametrize(
    "settings",
    [
        {
            "model": "cnn",
            "augment": "strong",
            "optimizer": "sgd",
            "schedule": "one-cycle",
            "gradient_accumulation_steps": 3,
        },
        {"optimizer": "radam", "schedule": "cosine", "warmup_steps": 5, "validation_size": 50, "loss": "mse"},
        {"loss": "nll-balanced", "augment": "light", "gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16", "optimizer": "adamw", "weight_decay": 0.1, "max_grad_norm": 1.0},
    ],
)
def test_from_any_checkpoint_a_run_ends_bit_identical(
    settings: dict[str, Any], run_here: RunHere, resume_here: ResumeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "KEPT", 100)
    settings |= {"epochs": 2, "limit_train_images": 207, "checkpoint_every": 2, "log_every": 3}
    whole = run_here("whole", **settings)
    expected = end_of(whole)
    for number in range(0, len(checkpoints_of(whole)), 4):
        folder = whole.with_name(f"cut-{number}")
        shutil.copytree(whole, folder)
        for path in checkpoints_of(folder)[number + 1 :]:  # as if killed before it was written
            shutil.rmtree(path)
        resume_here(folder)
        assert end_of(folder) == expected


def test_arranging_gradients_before_the_first_step_changes_nothing(
    run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"model": "mobilenet_v3_small", "limit_train_images": 60, "batch_size": 20}
    expected = end_of(run_here("plain", **settings))  # BatchNorm and dropout
    epochs = Session.epochs

    def arrange_first(session: Session) -> Iterator[int]:
        session._arrange_gradients()
        return epochs(session)

    monkeypatch.setattr(Session, "epochs", arrange_first)
    assert end_of(run_here("arranged", **settings)) == expected


class Scaling(LeanAccelerator):
    """Scales the loss like fp16 on a GPU, and has the gradients overflow until the scale is down to 2 ** 13."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def backward(self, loss: Tensor, **settings: Any) -> None:
        super().backward(loss * (math.inf if self.scaler.get_scale() > 2**13 else 1), **settings)

    def unscale_gradients(self, optimizer: Any = None) -> None:  # Accelerate's does nothing on a CPU
        self.scaler.unscale_(self._optimizers[0].optimizer)


def test_steps_that_fp16_skips_are_logged_and_kept_in_checkpoints(
    run_here: RunHere, resume_here: ResumeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist.session.LeanAccelerator", Scaling)
    whole = run_here("whole", checkpoint_every=4, log_every=1, max_steps=12)
    counts = [line["optim/skipped_steps"] for line in metrics_of(whole) if "optim/skipped_steps" in line]
    assert counts == [1, 2, *[3] * 10]
    shutil.copytree(whole, cut := whole.with_name("cut"))
    shutil.rmtree(checkpoints_of(cut)[-1])
    resume_here(cut)
    assert end_of(cut) == end_of(whole)


@pytest.fixture
def begun(run_here: RunHere) -> Path:
    """A run killed in its first epoch, with two checkpoints."""
    folder = run_here("begun", checkpoint_every=3, max_steps=12)
    shutil.rmtree(checkpoints_of(folder)[-1])
    assert len(checkpoints_of(folder)) == 2
    return folder


def test_on_a_gpu_its_libraries_decide_whether_a_run_is_identical_not_the_threads() -> None:
    names = ("torch", "num_processes", "precision", "compiler", "cuda", "cudnn", "threads")
    environment = dict.fromkeys(names, 1) | {"device": "cuda (NVIDIA H100)"}
    assert bit_identity(environment).keys() == {*environment} - {"threads"}
    assert bit_identity(environment | {"device": "cpu (AMD EPYC)"}).keys() == {*environment} - {"cuda", "cudnn"}


@pytest.mark.parametrize(
    ("launch", "note"),
    [
        ({"cudnn": 90100}, ""),  # of another kind of device, which is noted itself
        ({"threads": 7}, "threads was 7, is 1"),
        ({"device": "cuda (H100)", "cuda": "13.0"}, r"device was cuda \(H100\), is cpu .*\)"),
    ],
)
def test_what_keeps_a_resumed_run_from_being_identical_is_noted(
    launch: dict[str, Any], note: str, begun: Path, resume_here: ResumeHere, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(checkpoints_of(begun)[-1], "state.json", lambda state: state["launch"].update(launch))
    resume_here(begun)
    notes = [line for line in capsys.readouterr().out.splitlines() if "no longer bit-identical: " in line]
    assert len(notes) == bool(note)
    assert all(re.search(f"bit-identical: {note}$", line) for line in notes)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit in the weights": lambda folder: flip(folder / "model.safetensors"),
    "a flipped bit in the optimizer": lambda folder: flip(folder / "optimizer.safetensors"),
    "a flipped bit in the manifest": lambda folder: flip(folder / "manifest.json"),
    "a truncated file": lambda folder: os.truncate(folder / "optimizer.safetensors", 1000),
    "an empty file": lambda folder: os.truncate(folder / "state.json", 0),
    "a missing file": lambda folder: (folder / "model.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty folder": empty,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_renamed_and_the_previous_one_is_used(
    damage: str, begun: Path, resume_here: ResumeHere, capsys: pytest.CaptureFixture[str]
) -> None:
    before, newest = checkpoints_of(begun)
    DAMAGES[damage](newest)
    resume_here(begun)
    output = capsys.readouterr().out
    assert f"{newest} is damaged (" in output
    assert f"resumed     from {before.name}" in output
    assert (begun / "checkpoints" / f"damaged-{newest.name}").is_dir()
    assert state_of(begun)["step"] == 12


def test_without_an_intact_checkpoint_a_run_ends_and_does_not_start_over(begun: Path, resume_here: ResumeHere) -> None:
    metrics = metrics_of(begun)
    for path in checkpoints_of(begun):
        flip(path / "model.safetensors")
    for _ in range(2):  # nor at the next try
        with pytest.raises(UserError, match="checkpoints: no intact checkpoint"):
            resume_here(begun)
        assert metrics_of(begun) == metrics
        assert state_of(begun)["status"] == "failed"
    shutil.rmtree(begun / "checkpoints")  # a disk that is not mounted
    with pytest.raises(UserError, match=r"no intact checkpoint \(the last one was saved at step 12\)\. Restore"):
        resume_here(begun)
    assert metrics_of(begun) == metrics


def enter(folder: Path, name: str) -> None:
    """Update a file's line in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = checksum((folder / name).read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change a file of a checkpoint and its line in the manifest."""
    path, tensors = folder / name, name.endswith(".safetensors")
    content = load_file(path) if tensors else json.loads(path.read_text())
    change(content)
    if tensors:
        save_file(content, path)
    else:
        path.write_text(json.dumps(content))
    enter(folder, name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("state.json", lambda it: it["progress"].update(step=-5), "step -5 in epoch"),
        ("state.json", lambda it: it["progress"].update(batch=10**9), "batch 1000000000 of 20"),
        ("state.json", lambda it: it["progress"].update(batch=-1), "batch -1 of 20"),
        ("state.json", lambda it: it["progress"].update(epoch=0), "epoch 0"),
        ("state.json", lambda it: it["progress"].update(step=10**6), "step 1000000 in epoch"),
        ("state.json", lambda it: it["progress"].update(seconds=math.nan), "NaN in state.json"),
        ("state.json", lambda it: it["progress"].update(step="x"), "step 'x' in epoch 1"),
        ("state.json", lambda it: it["tracking"].update(metrics_bytes=-1), "-1 bytes of metrics.jsonl"),
        ("state.json", lambda it: it["ranks"][0]["loss"].update(sum=math.inf), "Infinity in state.json"),
        ("model.safetensors", lambda it: it["fc1.weight"].fill_(math.nan), "fc1.weight holds NaN"),
        ("optimizer.safetensors", lambda it: it["0.exp_avg"].fill_(math.inf), "0.exp_avg holds NaN or infinity"),
        ("optimizer.safetensors", lambda it: it["0.step"].fill_(-3), "0.step is -3"),
    ],
)
def test_an_intact_checkpoint_with_impossible_values_is_refused(
    name: str, change: Callable[[Any], None], message: str, begun: Path, resume_here: ResumeHere
) -> None:
    newest = checkpoints_of(begun)[-1]
    rewrite(newest, name, change)
    with pytest.raises(UserError, match=f"{newest.name}: intact, but not a possible state of this run: .*({message})"):
        resume_here(begun)
    assert newest.exists()
    shutil.rmtree(newest)
    resume_here(begun)  # from the previous one
    assert state_of(begun)["status"] == "finished"


def test_a_pipe_in_the_place_of_a_manifest_is_damage_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(DamagedError, match=r"manifest\.json is not a regular file in the checkpoint"):
        read_whole(tmp_path)


@pytest.mark.parametrize("name", ["pipe", "../../config.yaml", "/dev/zero"])
def test_a_manifest_names_only_files_of_its_checkpoint(name: str, begun: Path, resume_here: ResumeHere) -> None:
    newest = checkpoints_of(begun)[-1]
    os.mkfifo(newest / "pipe")
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {name: {}}))
    resume_here(begun)
    assert (newest.parent / f"damaged-{newest.name}").is_dir()


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_an_unreadable_environment_json_is_named(content: str, begun: Path, resume_here: ResumeHere) -> None:
    (begun / "environment.json").write_text(content)
    with pytest.raises(UserError, match=r"environment\.json: cannot be read"):
        resume_here(begun)
    (begun / "state.json").write_text(content)
    (begun / "environment.json").unlink()
    resume_here(begun)
    assert state_of(begun)["status"] == "finished"


def test_writing_to_a_pipe_works_and_a_link_stays_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "link", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    (tmp_path / "other").symlink_to("file")
    write_file(tmp_path / "other", "here")
    assert (tmp_path / "file").read_text() == "here"
    assert (tmp_path / "other").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "other", "pipe"]


def test_missing_metrics_are_reported(begun: Path, resume_here: ResumeHere, capsys: pytest.CaptureFixture[str]) -> None:
    (begun / "metrics.jsonl").unlink()
    resume_here(begun)
    assert re.findall(r"(\w+) +metrics\.jsonl has 0 of the \d+ bytes it had", capsys.readouterr().out) == ["resumed"]
    assert state_of(begun)["status"] == "finished"


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.made,)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_malicious_pickle_in_any_file_is_refused_and_does_not_run(
    name: str, form: str, begun: Path, resume_here: ResumeHere, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    for folder in checkpoints_of(begun):
        payload = folder / name
        if form == "pickle":
            payload.write_bytes(pickle.dumps(Payload(made)))
        else:
            torch.save(Payload(made), payload)
        if name != "manifest.json":  # a careful attacker
            enter(folder, name)
    with pytest.raises(UserError, match="no intact checkpoint"):
        resume_here(begun)
    assert not made.exists()
    pickle.loads(pickle.dumps(Payload(made)))
    assert made.exists()  # it works


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "cnn"}, "--model cnn: the run in .* has mlp"),
        ({"dataset": "kmnist"}, "--dataset kmnist: the run in .* has mnist"),
        ({"batch_size": 20}, "--batch-size 20: the run in .* has 10"),
        ({"learning_rate": 0.5}, "--learning-rate 0.5: the run in .* has 0.001"),
        ({"seed": 3}, f"--seed 3: the run in .* has {TrainConfig().seed}"),
        ({"run_name": "other"}, "--run-name other: the run in .* has begun"),
    ],
)
def test_settings_that_differ_from_the_runs_are_refused_with_both_values(
    settings: dict[str, Any], message: str, begun: Path, resume_here: ResumeHere
) -> None:
    with pytest.raises(ConfigError, match=message):
        resume_here(begun, **settings)
    with pytest.raises(ConfigError, match=message):
        resume_here(begun / ".." / "begun", **settings)


def test_a_checkpoint_of_another_run_is_refused_with_both_values(
    begun: Path, run_here: RunHere, resume_here: ResumeHere
) -> None:
    other = run_here("other", model="cnn", checkpoint_every=3, max_steps=3)
    for path in checkpoints_of(other):
        shutil.rmtree(path)
    shutil.copytree(checkpoints_of(begun)[-1], other / "checkpoints" / "step-0000000009")
    with pytest.raises(ConfigError, match="step-0000000009: saved with model mlp, but this run has cnn"):
        resume_here(other, max_steps=20)


def test_a_run_resumes_that_was_started_when_augment_was_on_or_off(run_here: RunHere, resume_here: ResumeHere) -> None:
    folder = run_here("x", augment="light", limit_train_images=207, checkpoint_every=7, max_steps=20)
    expected = end_of(folder)
    first, *others = checkpoints_of(folder)
    for path in others:  # as if killed before they were written
        shutil.rmtree(path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("augment: light", "augment: true"))
    rewrite(first, "state.json", lambda state: state["essence"].update(augment=True))
    resume_here(folder)
    assert "augment: light" in (folder / "config.yaml").read_text()
    assert end_of(folder) == expected


def test_some_settings_may_change(begun: Path, resume_here: ResumeHere) -> None:
    before = [line["step"] for line in metrics_of(begun) if line["step"] < 12]
    resume_here(begun, max_steps=30, epochs=2, log_every=5, checkpoint_every=11, trackers="none")
    assert state_of(begun)["step"] == 30
    assert [line["step"] for line in metrics_of(begun)] == [*before, 12, 15, 20, 20, 25, 30, 30]
    saved = TrainConfig.load(begun / "config.yaml")
    assert (saved.max_steps, saved.epochs, saved.checkpoint_every) == (30, 2, 11)


def test_resuming_a_finished_run_changes_nothing_unless_there_are_more_epochs(
    run_here: RunHere, resume_here: ResumeHere
) -> None:
    folder = run_here("x", epochs=1, log_every=100)
    lines = metrics_of(folder)
    resume_here(folder)
    assert metrics_of(folder) == lines
    assert state_of(folder)["status"] == "finished"
    resume_here(folder, epochs=2)
    longer, whole = metrics_of(folder), metrics_of(run_here("whole", epochs=2, log_every=100))
    assert [line["step"] for line in longer] == [20, 40]
    assert longer[-1]["test/loss"] == whole[-1]["test/loss"]


def test_a_run_without_a_checkpoint_yet_starts_over_in_its_folder(run_here: RunHere, resume_here: ResumeHere) -> None:
    folder = run_here("x")
    lines = metrics_of(folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "state.json").write_text(
        json.dumps(state_of(folder) | {"checkpoint": None})
    )  # as if killed before the first
    resume_here(folder)
    assert [line.get("test/loss") for line in metrics_of(folder)] == [line.get("test/loss") for line in lines]


def test_a_temporary_read_error_damages_no_checkpoint(
    begun: Path, resume_here: ResumeHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "optimizer.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(path)

    before = checkpoints_of(begun)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)
        with pytest.raises((OSError, UserError), match="Input/output error"):
            resume_here(begun)
    assert checkpoints_of(begun) == before
    resume_here(begun)


def test_a_checkpoint_right_after_a_resume_knows_the_length_of_the_metrics(
    run_here: RunHere, resume_here: ResumeHere
) -> None:
    folder = run_here("x", checkpoint_every=5, max_steps=19, log_every=4)
    for path in checkpoints_of(folder)[1:]:  # 10 is left; lines of 12, 16 and 19 come after it
        shutil.rmtree(path)
    resume_here(folder, checkpoint_every=1, max_steps=11)
    resume_here(folder, max_steps=19)
    assert [line["step"] for line in metrics_of(folder)] == [4, 8, 11, 12, 16, 19]


def test_the_best_weights_have_the_lowest_validation_loss(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter((3.0, 1.0, 2.0))  # as if it overfits

    def evaluate_with_given_losses(*arguments: Any, **keywords: Any) -> Result:
        result = evaluate_split(*arguments, **keywords)
        return dataclasses.replace(result, loss=next(losses)) if result.images == 70 else result

    monkeypatch.setattr("mnist.training.evaluate.evaluate_split", evaluate_with_given_losses)
    folder = run_here("x", validation_size=70, epochs=3)
    monkeypatch.undo()
    assert [line["val/loss"] for line in metrics_of(folder) if "val/loss" in line] == [3.0, 1.0, 2.0]
    shorter = run_here("shorter", validation_size=70, epochs=2)
    weights = {it: (it / "model.safetensors").read_bytes() for it in (folder / "best", folder / "model")}
    assert weights[folder / "best"] == (shorter / "model" / "model.safetensors").read_bytes()
    assert weights[folder / "best"] != weights[folder / "model"]
    load_model(folder / "best")


def test_without_a_validation_split_no_weights_are_called_best(run_here: RunHere) -> None:
    assert not (run_here("x") / "best").exists()


def test_replacing_a_folder_is_atomic_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with new_folder(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(OSError, match="full"), new_folder(folder) as temporary:
        (temporary / "a").write_text("new")
        raise OSError(errno.ENOSPC, "full")
    assert (folder / "a").read_text() == "old"
    with new_folder(folder) as temporary:
        (temporary / "b").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [folder]


def die_at(deadly: int) -> None:
    """End this process at the `deadly`th call that changes or flushes the disk."""
    calls = itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **keywords: os._exit(9) if next(calls) == deadly else function(*args, **keywords)

    for name in ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_process_killed_between_any_two_writes_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    def write(path: Path, content: str) -> None:
        with new_folder(path) as temporary:
            for name in ("a", "b"):
                (temporary / name).write_text(content)

    def work(folder: Path) -> None:
        write(folder / "model", "new")  # replaces an old one
        write_file(folder / "state", "new")
        write(folder / "step-2", "new")
        remove_folder(folder / "step-1")

    outcomes = set()
    for deadly in itertools.count(1):
        folder = tmp_path / str(deadly)
        folder.mkdir()
        write(folder / "model", "old")
        write(folder / "step-1", "old")
        write_file(folder / "state", "old")
        child = os.fork()
        if child == 0:
            die_at(deadly)
            work(folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        remove_leftovers(folder)
        assert not list(folder.glob(".*"))
        kept = {path.name for path in folder.iterdir()}
        assert kept >= {"model", "state"}
        assert kept & {"step-1", "step-2"}
        for name in kept - {"state"}:
            contents = [path.read_text() for path in (folder / name).iterdir()]
            assert contents in (["old", "old"], ["new", "new"])
        outcomes.add(((folder / "model" / "a").read_text(), (folder / "state").read_text(), *sorted(kept)))
        if code == 0:
            break
    assert deadly > 20
    assert len(outcomes) >= 5  # from nothing written to everything


def test_random_generators_continue_where_they_were() -> None:
    state = RandomState(torch.device("cpu"))
    kept = json.loads(json.dumps(state.state_dict()))

    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.normal()), float(torch.randn(())), random.random()]

    first = draw()
    assert draw() != first
    state.load_state_dict(kept)
    assert draw() == first


def test_the_state_of_every_optimizer_survives_json_and_safetensors() -> None:
    for build in (torch.optim.Adam, torch.optim.RAdam, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)):
        parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
        optimizer = build(parameters, lr=0.1)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        tensors, rest = flatten(optimizer.state_dict())
        again = unflatten(tensors, json.loads(json.dumps(rest)))
        state = optimizer.state_dict()
        assert again["state"].keys() == state["state"].keys()
        for index, values in state["state"].items():
            torch.testing.assert_close(again["state"][index], values, rtol=0, atol=0)
