"""Settings and the command line."""

import dataclasses
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mnist.config.command_line import HELP_GROUPS, field_docstrings, parse_command_line
from mnist.config.command_line import parse_flags as parse_any_flags
from mnist.config.recipes import RECIPES
from mnist.config.settings import CHOICES, PROJECT_FOLDER, TrainConfig, flag
from mnist.errors import ConfigError
from tests.conftest import Launch

FLAGS = """
    --recipe --run-name --output-dir --resume --checkpoint-every --trackers --log-every --profile --seed
    --dataset --data-dir --image-size --test-fraction
    --limit-train-images --limit-test-images --validation-size --augment
    --model --pretrained --loss
    --optimizer --learning-rate --weight-decay --schedule --warmup-steps --max-grad-norm
    --epochs --max-steps --batch-size --global-batch-size --gradient-accumulation-steps
    --compile --mixed-precision --timeout-seconds
""".split()


def test_the_flags_are_frozen_and_at_most_35() -> None:
    assert [flag(field.name) for field in dataclasses.fields(TrainConfig)] == FLAGS
    assert len(FLAGS) <= 35


def test_every_setting_is_explained_and_stands_in_one_group_of_the_help() -> None:
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    assert list(field_docstrings(TrainConfig)) == names
    assert [name for group in HELP_GROUPS.values() for name in group.split()] == names


def test_the_default_recipe_is_the_tutorials() -> None:
    config = parse_command_line(RECIPES, [])
    assert config == TrainConfig()
    assert (config.model, config.loss, config.optimizer, config.learning_rate) == ("mlp", "nll", "adam", 1e-3)
    assert (config.batch_size, config.epochs, config.schedule) == (10, 3, "constant")


@pytest.mark.parametrize(
    "arguments",
    [["--learning-rate=0.01"], ["--learning_rate=0.01"], ["--learning-rate", "0.01"], ["--learning_rate", "0.01"]],
)
def test_flags_may_have_hyphens_or_underscores_and_an_equals_sign_or_none(arguments: list[str]) -> None:
    assert parse_command_line(RECIPES, arguments).learning_rate == 0.01


def test_a_flag_changes_one_setting_of_the_recipe() -> None:
    config = parse_command_line(RECIPES, ["--epochs", "9", "--recipe", "cnn"])
    assert config == dataclasses.replace(RECIPES["cnn"], epochs=9)


def test_every_recipe_carries_its_own_name() -> None:
    assert all(config.recipe == name for name, config in RECIPES.items())


@dataclass(frozen=True)
class WithBoolean:
    """A stand-in with a boolean."""

    augment: bool = False
    """Change the images a little."""

    batch_size: int = 10
    """Images."""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--augment"], True),
        (["--augment", "--batch-size", "5"], True),
        (["--augment=True"], True),  # as W&B's sweep agents send it
        (["--augment=false"], False),
        (["--augment", "true"], True),
        (["--augment", "False"], False),
        ([], False),
    ],
)
def test_a_boolean_may_stand_alone_or_with_a_value(arguments: list[str], expected: bool) -> None:
    assert parse_any_flags(WithBoolean(), {"all": "augment batch_size"}, {}, arguments).augment is expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dataset": "mnits"}, ["--dataset mnits", "Did you mean", "mnist"]),
        ({"model": "cmn"}, ["--model cmn", "Did you mean cnn", "mlp"]),
        ({"model": "resnet81"}, ["--model resnet81", "Did you mean resnet18", "mlp, cnn, cnn-quick", "torchvision"]),
        ({"model": "raft_large"}, ["--model raft_large", "unknown"]),  # torchvision's, but for pairs of pictures
        ({"pretrained": True}, ["--pretrained", "--model mlp", "--model resnet18"]),
        ({"optimizer": "Adamw"}, ["--optimizer Adamw", "Did you mean adamw"]),
        ({"schedule": "onecycle"}, ["--schedule onecycle", "Did you mean one-cycle"]),
        ({"loss": "crossentropy"}, ["--loss crossentropy", "nll, mse"]),
        ({"trackers": "wandb,wandbb"}, ["--trackers wandbb", "Did you mean wandb"]),
        ({"learning_rate": 0.0}, ["--learning-rate 0.0", "above 0"]),
        ({"learning_rate": math.nan}, ["--learning-rate nan", "finite"]),
        ({"learning_rate": math.inf}, ["--learning-rate inf", "finite"]),
        ({"learning_rate": -1.0}, ["--learning-rate -1.0"]),
        ({"weight_decay": -0.1}, ["--weight-decay -0.1"]),
        ({"weight_decay": math.inf}, ["--weight-decay inf"]),
        ({"max_grad_norm": 0.0}, ["--max-grad-norm 0.0"]),
        ({"epochs": 0}, ["--epochs 0", "at least 1"]),
        ({"batch_size": -3}, ["--batch-size -3"]),
        ({"gradient_accumulation_steps": 0}, ["--gradient-accumulation-steps 0"]),
        ({"log_every": 0}, ["--log-every 0"]),
        ({"max_steps": 0}, ["--max-steps 0"]),
        ({"limit_train_images": 0}, ["--limit-train-images 0"]),
        ({"limit_test_images": -1}, ["--limit-test-images -1"]),
        ({"validation_size": -1}, ["--validation-size -1"]),
        ({"warmup_steps": -1}, ["--warmup-steps -1"]),
        ({"seed": -1}, ["--seed -1"]),
        ({"seed": 2**32}, ["--seed 4294967296"]),
        ({"run_name": "a/b"}, ["--run-name a/b"]),
        ({"run_name": ".."}, ["--run-name .."]),
        ({"run_name": ""}, ["--run-name"]),
        ({"run_name": "latest"}, ["--run-name latest"]),
    ],
)
def test_what_cannot_be_is_refused_with_flag_value_and_way_out(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**settings)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match=r"--recipe tutorail: unknown. Did you mean tutorial\? Known: tutorial, cnn, fast, best"
    ):
        parse_command_line(RECIPES, ["--recipe", "tutorail"])


@pytest.mark.parametrize("arguments", [["--optimizer", "adan"], ["--no-such-flag"], ["--epochs", "two"], ["--recipe"]])
def test_wrong_usage_ends_with_2_and_a_message_without_traceback(arguments: list[str], launch: Launch) -> None:
    done = launch(*arguments, command=("train.py",))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert arguments[0] in done.stderr


def test_settings_survive_their_file(tmp_path: Path) -> None:
    config = TrainConfig(recipe="cnn", max_grad_norm=0.5, run_name="x", learning_rate=1e-5)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.load(tmp_path / "config.yaml") == config


def test_a_settings_file_with_an_unknown_setting_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("epochs: 1\nmomentum: 0.9\n")
    with pytest.raises(ConfigError, match="momentum"):
        TrainConfig.load(tmp_path / "config.yaml")


def test_help_names_every_flag_with_its_default_and_loads_no_torch() -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', '--help', '--recipe', 'cnn']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'accelerate', 'wandb', 'matplotlib', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in FLAGS)
    assert f"default: {RECIPES['cnn'].epochs}" in done.stdout


def test_importing_the_library_loads_nothing_heavy() -> None:
    script = "import mnist, sys; assert not {'torch', 'numpy', 'tyro', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=PROJECT_FOLDER, check=True)


def test_every_name_that_may_be_chosen_is_there() -> None:
    from mnist.data.datasets import SOURCES
    from mnist.models.networks import MODELS
    from mnist.training.losses import LOSSES
    from mnist.training.optimizers import OPTIMIZERS, schedule_factor

    assert tuple(SOURCES) == CHOICES["dataset"]
    assert tuple(MODELS) == CHOICES["model"]
    assert tuple(LOSSES) == CHOICES["loss"]
    assert tuple(OPTIMIZERS) == CHOICES["optimizer"]
    for name in CHOICES["schedule"]:
        assert schedule_factor(name, 0, warmup_steps=0, total_steps=10) > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1e-3", "--learning-rate '1e-3': must be a number. (YAML takes 1e-3 for text: write 1.0e-3.)"),
        ("epochs: '3'", "--epochs '3': must be a whole number."),
        ("epochs: null", "--epochs None: must be a whole number."),
        ("epochs: true", "--epochs True: must be a whole number."),
        ("epochs: 1.5", "--epochs 1.5: must be a whole number."),
        ("epochs: [3]", "holds no settings, a name and a value each."),
        ("augment: 1", "--augment 1: must be true or false."),
        ("dataset: 5", "--dataset 5: must be text."),
        ("3: 4", "holds no settings"),
        ("5", "holds no settings"),
        ("", "holds no settings"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "holds no settings"),
        ("[" * 3000, "no YAML that can be read"),
        ("\x00", "no YAML that can be read"),
        ("no_such: 1", "unknown settings no_such"),
    ],
)
def test_a_config_yaml_by_hand_is_read_or_refused_with_the_name_and_the_value(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        TrainConfig.load(tmp_path / "config.yaml")
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_seconds": 99999999999999},
        {"gradient_accumulation_steps": 10**21},
        {"seed": -1},
        {"dataset": "~nosuchuser/x"},
        {"dataset": "a/\0b"},
        {"data_dir": "~nosuchuser/x"},
        {"data_dir": "a/\0b"},
        {"output_dir": "a/\0b"},
    ],
)
def test_values_beyond_all_bounds_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(settings)).replace("_", "-")):
        TrainConfig(**settings)


@pytest.mark.parametrize(("columns", "told"), [(1, "40"), (39, "40"), (80, None)])
def test_a_terminal_that_is_too_narrow_for_the_help_is_taken_for_a_wider_one(
    columns: int, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "9" * 5000)  # no number that Python reads: the terminal's own is what counts
    monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((columns, 24)))
    parse_command_line(RECIPES, [])
    assert os.environ["COLUMNS"] == (told or "9" * 5000)


def test_help_ends_in_a_terminal_of_one_column() -> None:
    environment = os.environ | {"COLUMNS": "1"}
    command = [sys.executable, "train.py", "--help"]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, env=environment, capture_output=True, timeout=20, check=True)
    assert b"--learning-rate" in done.stdout
