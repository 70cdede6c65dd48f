"""The command line of a run, made from the fields of TrainConfig.

python train.py --help
python train.py --recipe cnn --learning-rate 0.01 --epochs 2
"""

import argparse
import ast
import dataclasses
import inspect
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_type_hints

from mnist.config.settings import CHOICES, TrainConfig, check_choice, flag
from mnist.errors import ConfigError

NARROWEST = 40  # columns of a terminal
HELP_GROUPS = {
    "run": "recipe run_name output_dir resume checkpoint_every trackers log_every profile seed",
    "data": "dataset data_dir image_size test_fraction limit_train_images limit_test_images validation_size augment",
    "model": "model pretrained loss",
    "optimizer": "optimizer learning_rate weight_decay schedule warmup_steps max_grad_norm",
    "length": "epochs max_steps batch_size global_batch_size gradient_accumulation_steps",
    "processes": "compile mixed_precision timeout_seconds",
}
"""The groups of `--help`; every field of TrainConfig stands in one."""


def parse_command_line(recipes: Mapping[str, TrainConfig], arguments: Sequence[str] | None = None) -> TrainConfig:
    """The settings that a command line asks for, starting from the recipe that it names.

    Both `--learning-rate=0.01` and `--learning_rate 0.01` are understood, and a boolean as `--flag`, `--flag=True` or
    `--flag false`: W&B's sweep agents send the forms with `=`. Ends with 2 and a message for what it cannot read;
    raises ConfigError for what it can read but cannot be.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--recipe", nargs="?", default="tutorial")
    recipe = first_look.parse_known_args(arguments)[0].recipe or "tutorial"
    check_choice("recipe", recipe, tuple(recipes))
    if {"--batch-size", "--global-batch-size"} <= {word.partition("=")[0].replace("_", "-") for word in arguments}:
        raise ConfigError("--batch-size and --global-batch-size: give one of them, for the other follows from it.")
    open_ended = {name: (*CHOICES[name], "...") for name in ("dataset", "model")}
    choices = CHOICES | open_ended | {"recipe": tuple(recipes)}  # as --help shows them
    config: TrainConfig = parse_flags(recipes[recipe], HELP_GROUPS, choices, arguments)
    return config


def explicit_settings(arguments: Sequence[str] | None = None) -> frozenset[str]:
    """Names of the settings that a command line names, as opposed to those that have their default."""
    words = sys.argv[1:] if arguments is None else arguments
    names = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    return frozenset(names & {field.name for field in dataclasses.fields(TrainConfig)})


def parse_flags(
    defaults: Any, groups: Mapping[str, str], choices: Mapping[str, Sequence[str]], arguments: Sequence[str]
) -> Any:
    """A copy of the dataclass `defaults` with what the arguments change.

    tyro groups the help by nested dataclass. Ours is flat, for `config.learning_rate` reads better than
    `config.optimizer.learning_rate`: so the groups are made here, for the command line only.
    """
    import tyro

    cls = type(defaults)
    help_of, types = field_docstrings(cls), get_type_hints(cls)

    def argument(name: str) -> tuple[str, Any, Any]:
        kinds = [kind for kind in get_args(types[name]) or (types[name],) if kind is not type(None)]
        metavar = "{" + ",".join(choices[name]) + "}" if name in choices else kinds[0].__name__.upper()
        note = tyro.conf.arg(help=help_of[name], metavar=metavar)
        return name, Annotated[types[name], note], dataclasses.field(default=getattr(defaults, name))

    sections = []
    for title, names in groups.items():
        section: Any = dataclasses.make_dataclass(title, [argument(name) for name in names.split()], frozen=True)
        section.__doc__ = " "
        sections.append((title, section, dataclasses.field(default_factory=section)))
    nested: Any = dataclasses.make_dataclass("Settings", sections, frozen=True)
    booleans = [name for name, kind in types.items() if kind is bool]
    if shutil.get_terminal_size().columns < NARROWEST:  # of COLUMNS, or of the terminal itself
        os.environ["COLUMNS"] = str(NARROWEST)  # tyro's help never ends in one column
    speaks = is_first_process()  # of many processes, the first says what is wrong
    try:
        parsed = tyro.cli(
            nested,
            prog="train.py",
            description=(inspect.getdoc(cls) or ""),
            args=spell_booleans(arguments, booleans),
            config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
            console_outputs=speaks,
        )
    except SystemExit:
        if not speaks:
            time.sleep(2)  # the launcher ends all processes as soon as one has ended; else nobody has spoken
            print(f"Process {os.environ['RANK']}: wrong usage. Process 0 says why.", file=sys.stderr)
        raise
    values = {k: v for section in vars(parsed).values() for k, v in vars(section).items()}
    return dataclasses.replace(defaults, **values)


def is_first_process() -> bool:
    """Whether this is the first process of its job, or the only one, whatever number was left in the environment."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or os.environ.get("RANK", "0") == "0"


def spell_booleans(arguments: Sequence[str], booleans: Sequence[str]) -> list[str]:
    """`--flag` alone, `--flag=true` and `--flag false` as the `--flag True` and `--flag False` that tyro reads."""
    spelled: list[str] = []
    flags = {flag(name) for name in booleans}
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        after_flag = bool(spelled) and spelled[-1].replace("_", "-") in flags
        if name.replace("_", "-") in flags and not equals and following.startswith("--"):
            spelled += [argument, "True"]
        elif name.replace("_", "-") in flags and equals:
            spelled += [name, value.capitalize()]
        else:
            spelled.append(argument.capitalize() if after_flag else argument)
    return spelled


def field_docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass: Python keeps it in the source only."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docstrings = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docstrings[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docstrings
