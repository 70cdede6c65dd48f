"""sweep.yaml: the command lines that W&B's agents make of it, run."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from mnist.command_line import parse_command_line
from mnist.config import PROJECT_FOLDER, TrainConfig
from mnist.recipes import RECIPES
from tests.conftest import metrics_of

SWEEP: dict[str, Any] = yaml.safe_load((PROJECT_FOLDER / "sweep.yaml").read_text())


def agents_command(values: dict[str, Any]) -> list[str]:
    """What an agent runs for the values that the server has chosen: what wandb/wandb_agent.py does, with its parts."""
    arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    words: list[str] = []
    for word in create_sweep_command(list(SWEEP["command"])):
        words += arguments["args"] if word == "${args}" else [word.replace("${program}", SWEEP["program"])]
    return words


def extremes(choose: Any) -> dict[str, Any]:
    """The first or the last of what each parameter may be."""
    chosen = {}
    for name, it in SWEEP["parameters"].items():
        chosen[name] = (
            it["value"] if "value" in it else choose(it["values"] if "values" in it else [it["min"], it["max"]])
        )
    return chosen


@pytest.mark.parametrize("choose", [lambda values: values[0], lambda values: values[-1]])
def test_every_end_of_the_sweep_is_a_command_line_that_is_understood(choose: Any) -> None:
    values = extremes(choose)
    assert {"learning_rate", "batch_size", "optimizer", "schedule"} <= values.keys()
    *start, _ = shlex.join(agents_command(values)).partition("train.py")
    assert start[0] == "accelerate launch "
    config = parse_command_line(RECIPES, agents_command(values)[3:])
    assert {name: getattr(config, name) for name in values} == values


def test_it_chooses_by_the_validation_images_that_it_cuts_off() -> None:
    assert SWEEP["metric"]["name"] == "val/loss"
    assert SWEEP["parameters"]["validation_size"]["value"] > 0


def test_the_agents_own_command_trains(tmp_path: Path) -> None:
    values = extremes(lambda values: values[-1]) | {"validation_size": 100, "epochs": 1}
    command = [
        *agents_command(values),
        "--limit-train-images=500",
        "--limit-test-images=100",
        f"--output-dir={tmp_path}",
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    bin_folder = str(Path(sys.executable).parent)
    done = subprocess.run(
        [*command, "--run-name=swept"],
        cwd=PROJECT_FOLDER,
        # as an agent sets them, apart from the mode: there is no server
        env=clean
        | {"WANDB_SWEEP_ID": "abc123", "WANDB_RUN_ID": "run1", "WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}
        | {"PATH": f"{bin_folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SWEEP["metric"]["name"] in metrics_of(tmp_path / "swept")[-1]
    config = TrainConfig.load(tmp_path / "swept" / "config.yaml")
    assert {name: getattr(config, name) for name in values} == values
    assert len(list((tmp_path / "swept" / "wandb").glob("offline-run-*-run1"))) == 1
