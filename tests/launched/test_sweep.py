"""sweep.yaml: the command lines that W&B's agents make from it are valid and train."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from mnist.config.command_line import parse_command_line
from mnist.config.recipes import RECIPES
from mnist.config.settings import PROJECT_FOLDER, TrainConfig
from tests.conftest import MainHere, metrics_of

SWEEP: dict[str, Any] = yaml.safe_load((PROJECT_FOLDER / "sweep.yaml").read_text())


def agents_command(values: dict[str, Any]) -> list[str]:
    """The command that an agent runs for these values, built with the functions of wandb/wandb_agent.py."""
    arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    words: list[str] = []
    for word in create_sweep_command(list(SWEEP["command"])):
        words += arguments["args"] if word == "${args}" else [word.replace("${program}", SWEEP["program"])]
    return words


def extremes(choose: Any) -> dict[str, Any]:
    """The first or the last possible value of each parameter."""
    return {
        name: each["value"] if "value" in each else choose(each.get("values") or [each["min"], each["max"]])
        for name, each in SWEEP["parameters"].items()
    }


@pytest.mark.parametrize("choose", [lambda values: values[0], lambda values: values[-1]])
def test_the_extremes_of_the_sweep_are_valid_command_lines(choose: Any) -> None:
    values = extremes(choose)
    assert {"learning_rate", "batch_size", "optimizer", "schedule"} <= values.keys()
    *start, _ = shlex.join(agents_command(values)).partition("train.py")
    assert start[0] == "accelerate launch "
    config = parse_command_line(RECIPES, agents_command(values)[3:])
    assert {name: getattr(config, name) for name in values} == values


def test_the_sweep_optimizes_the_loss_on_held_out_validation_images() -> None:
    assert SWEEP["metric"]["name"] == "val/loss"
    assert SWEEP["parameters"]["validation_size"]["value"] > 0


def test_a_run_started_by_an_agent_trains_with_its_settings(main_here: MainHere, tmp_path: Path) -> None:
    values = extremes(lambda values: values[-1]) | {"validation_size": 100, "epochs": 1}
    small = ("--limit-train-images=500", "--limit-test-images=100", f"--output-dir={tmp_path}", "--run-name=swept")
    # as set by an agent, except for the mode
    variables = {"WANDB_SWEEP_ID": "abc123", "WANDB_RUN_ID": "run1", "WANDB_MODE": "offline"}
    done = main_here(*agents_command(values)[3:], *small, **variables)
    assert done.returncode == 0, done.stderr
    assert SWEEP["metric"]["name"] in metrics_of(tmp_path / "swept")[-1]
    config = TrainConfig.load(tmp_path / "swept" / "config.yaml")
    assert {name: getattr(config, name) for name in values} == values
    assert len(list((tmp_path / "swept" / "wandb").glob("offline-run-*-run1"))) == 1
