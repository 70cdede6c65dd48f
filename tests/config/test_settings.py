"""Settings and the command line."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mnist.config.command_line import HELP_GROUPS, field_docstrings, parse_command_line
from mnist.config.recipes import RECIPES
from mnist.config.settings import CHOICES, PROJECT_FOLDER, TrainConfig, flag
from mnist.errors import ConfigError
from tests.conftest import Launch

FLAGS = """
    --recipe --run-name --output-dir --resume --checkpoint-every --trackers --log-every --profile --seed
    --dataset --data-dir --image-size --fit --test-fraction --limit-train-images --limit-test-images --validation-size
    --augment --model --pretrained --loss --optimizer --learning-rate --weight-decay --schedule --warmup-steps
    --max-grad-norm --epochs --max-steps --batch-size --global-batch-size --gradient-accumulation-steps
    --compile --mixed-precision --timeout-seconds
""".split()


def test_photographs_have_a_recipe_with_and_one_without_pretrained_weights() -> None:
    with_weights = parse_command_line(RECIPES, ["--recipe", "photos"])
    without = parse_command_line(RECIPES, ["--recipe=photos", "--pretrained", "none", "--image-size", "96"])
    assert (with_weights.recipe, with_weights.model, with_weights.image_size) == ("photos", "convnext_tiny", 224)
    assert (without.recipe, without.model, without.image_size) == ("photos-scratch", "cnn-deep", 96)
    for flags in ("--recipe photos-scratch", "--recipe photos --pretrained=False"):
        assert parse_command_line(RECIPES, [*flags.split(), "--image-size", "96"]) == without
    assert parse_command_line(RECIPES, ["--pretrained", "none"]) == RECIPES["tutorial"]
    for batches, epochs in ((1, 600), (33, 19), (120, 5), (400, 5)):
        assert with_weights.total_epochs(batches) == epochs
        assert with_weights.total_steps(batches) == epochs * batches >= 600


def test_a_batch_size_replaces_the_recipes_global_one() -> None:
    config = parse_command_line(RECIPES, ["--recipe", "photos", "--batch-size", "8"])
    assert config.batch_sizes(3) == (8, 24)
    assert parse_command_line(RECIPES, ["--recipe", "photos"]).batch_sizes(2) == (32, 64)


def test_the_at_most_35_flags_are_frozen_documented_and_in_one_help_group_each() -> None:
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    assert [flag(name) for name in names] == FLAGS
    assert len(FLAGS) <= 35
    assert list(field_docstrings(TrainConfig)) == names
    assert [name for group in HELP_GROUPS.values() for name in group.split()] == names


def test_the_default_recipe_is_that_of_the_tutorial() -> None:
    config = parse_command_line(RECIPES, [])
    assert config == TrainConfig()
    assert (config.model, config.loss, config.optimizer, config.learning_rate) == ("mlp", "nll", "adam", 1e-3)
    assert (config.batch_size, config.epochs, config.schedule) == (10, 3, "constant")


@pytest.mark.parametrize(
    "arguments",
    [["--learning-rate=0.01"], ["--learning_rate=0.01"], ["--learning-rate", "0.01"], ["--learning_rate", "0.01"]],
)
def test_flags_accept_hyphens_underscores_and_an_equals_sign(arguments: list[str]) -> None:
    assert parse_command_line(RECIPES, arguments).learning_rate == 0.01


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_flag_overrides_one_setting_of_the_recipe(recipe: str) -> None:
    config = parse_command_line(RECIPES, ["--epochs", "9", "--recipe", recipe])
    assert config == dataclasses.replace(RECIPES[recipe], epochs=9)
    assert config.recipe == recipe


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--augment"], "light"),
        (["--augment", "--batch-size", "5"], "light"),
        (["--augment=True"], "light"),  # sent by W&B's sweep agents
        (["--augment=false"], "none"),
        (["--augment", "true"], "light"),
        (["--augment", "False"], "none"),
        (["--augment", "strong"], "strong"),
        ([], "none"),
    ],
)
def test_augment_takes_a_level_a_boolean_or_nothing(arguments: list[str], expected: str) -> None:
    assert parse_command_line(RECIPES, arguments).augment == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--pretrained"], "all"), (["--pretrained", "head"], "head"), (["--pretrained=False"], "none"), ([], "none")],
)
def test_pretrained_takes_what_is_trained_a_boolean_or_nothing(arguments: list[str], expected: str) -> None:
    assert parse_command_line(RECIPES, ["--model=resnet18", *arguments]).pretrained == expected
    assert TrainConfig(model="resnet18", pretrained=True).pretrained == "all"  # type: ignore[arg-type] # of older runs


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--compile"], True),
        (["--compile", "--batch-size", "5"], True),
        (["--compile=True"], True),  # sent by W&B's sweep agents
        (["--compile=false"], False),
        (["--compile", "true"], True),
        (["--compile", "False"], False),
        ([], None),  # depends on the device
    ],
)
def test_a_boolean_flag_takes_a_value_or_none(arguments: list[str], expected: bool | None) -> None:
    assert parse_command_line(RECIPES, arguments).compile is expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dataset": "mnits"}, ["--dataset mnits", "Did you mean", "mnist"]),
        ({"model": "cmn"}, ["--model cmn", "Did you mean cnn", "mlp"]),
        ({"model": "resnet81"}, ["--model resnet81", "Did you mean resnet18", "mlp, cnn, cnn-quick", "torchvision"]),
        ({"model": "raft_large"}, ["--model raft_large", "unknown"]),  # torchvision's, but not a classifier
        ({"augment": "strong", "dataset": "kmnist"}, ["--augment strong", "mnist and folders", "light"]),
        ({"pretrained": "head"}, ["--pretrained", "--model mlp", "such as resnet18"]),
        ({"optimizer": "Adamw"}, ["--optimizer Adamw", "Did you mean adamw"]),
        ({"schedule": "onecycle"}, ["--schedule onecycle", "Did you mean one-cycle"]),
        ({"loss": "crossentropy"}, ["--loss crossentropy", "nll, nll-balanced, mse"]),
        ({"trackers": "wandb,wandbb"}, ["--trackers wandbb", "Did you mean wandb"]),
        ({"learning_rate": 0.0}, ["--learning-rate 0.0", "above 0"]),
        ({"learning_rate": math.nan}, ["--learning-rate nan", "finite"]),
        ({"learning_rate": math.inf}, ["--learning-rate inf", "finite"]),
        ({"learning_rate": -1.0}, ["--learning-rate -1.0"]),
        ({"epochs": 0}, ["--epochs 0", "at least 1"]),
        ({"validation_size": -1}, ["--validation-size -1", "at least 0"]),
        *(
            ({name: value}, [f"{flag(name)} {value}"])
            for name, values in {
                "weight_decay": (-0.1, math.inf),
                "max_grad_norm": (0.0,),
                "batch_size": (-3,),
                "gradient_accumulation_steps": (0, 10**21),
                "log_every": (0,),
                "max_steps": (0,),
                "limit_train_images": (0,),
                "limit_test_images": (-1,),
                "warmup_steps": (-1,),
                "seed": (-1, 2**32),
                "run_name": ("a/b", "..", "", "latest"),
                "timeout_seconds": (99999999999999,),
                "dataset": ("~nosuchuser/x", "a/\0b"),
                "data_dir": ("~nosuchuser/x", "a/\0b"),
                "output_dir": ("a/\0b",),
            }.items()
            for value in values
        ),
    ],
)
def test_an_invalid_setting_is_refused_with_flag_value_and_choices(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**settings)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_recipe_is_refused_with_the_closest_name() -> None:
    message = r"--recipe tutorail: unknown. Did you mean tutorial\? Known: tutorial, cnn, fast, best"
    with pytest.raises(ConfigError, match=message):
        parse_command_line(RECIPES, ["--recipe", "tutorail"])


@pytest.mark.parametrize("arguments", [["--optimizer", "adan"], ["--no-such-flag"], ["--epochs", "two"], ["--recipe"]])
def test_wrong_usage_exits_with_2_and_a_message_without_traceback(arguments: list[str], launch: Launch) -> None:
    done = launch(*arguments, command=("train.py",))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert arguments[0] in done.stderr


def test_settings_are_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    config = TrainConfig(recipe="cnn", max_grad_norm=0.5, run_name="x", learning_rate=1e-5)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.load(tmp_path / "config.yaml") == config


def test_help_lists_every_flag_with_its_default_without_importing_torch() -> None:
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


def test_every_choice_is_implemented() -> None:
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
        (
            "learning_rate: 1e-3",
            "--learning-rate '1e-3': must be a number. (YAML reads 1e-3 as a string",
        ),
        ("epochs: '3'", "--epochs '3': must be an integer."),
        ("epochs: true", "--epochs True: must be an integer."),
        ("epochs: 1.5", "--epochs 1.5: must be an integer."),
        ("epochs: [3]", "must map setting names to plain values."),
        ("augment: 1", "--augment 1: must be a string."),
        ("dataset: 5", "--dataset 5: must be a string."),
        ("3: 4", "must map setting names"),
        ("5", "must map setting names"),
        ("", "must map setting names"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "must map setting names"),
        ("[" * 3000, "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("epochs: 1\nmomentum: 0.9", "unknown settings momentum"),
    ],
)
def test_an_invalid_config_yaml_is_refused_with_name_and_value(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        TrainConfig.load(tmp_path / "config.yaml")
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path))


@pytest.mark.parametrize(("columns", "shown"), [(1, "40"), (39, "40"), (80, None)])
def test_a_terminal_too_narrow_for_the_help_is_treated_as_a_wider_one(
    columns: int, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "9" * 5000)  # not a number that Python reads: the terminal's own counts
    monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((columns, 24)))
    parse_command_line(RECIPES, [])
    assert os.environ["COLUMNS"] == (shown or "9" * 5000)


def test_help_terminates_in_a_terminal_of_one_column(launch: Launch) -> None:
    assert "--learning-rate" in launch("--help", command=("train.py",), COLUMNS="1").stdout
