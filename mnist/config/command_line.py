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

from mnist.config.recipes import WITHOUT_WEIGHTS
from mnist.config.settings import BOOLEANS, CHOICES, TrainConfig, check_choice, flag
from mnist.errors import ConfigError

MIN_COLUMNS = 40  # of the terminal: in a very narrow one, tyro's help never returns
HELP_GROUPS = {
    "run": "recipe run_name output_dir resume checkpoint_every trackers log_every profile seed",
    "data": "dataset data_dir image_size fit test_fraction limit_train_images limit_test_images validation_size"
    " augment",
    "model": "model pretrained loss",
    "optimizer": "optimizer learning_rate weight_decay schedule warmup_steps max_grad_norm",
    "training": "epochs max_steps batch_size global_batch_size gradient_accumulation_steps",
    "execution": "compile mixed_precision timeout_seconds",
}
"""The groups of `--help`: every field of TrainConfig is in one of them."""


def parse_command_line(recipes: Mapping[str, TrainConfig], arguments: Sequence[str] | None = None) -> TrainConfig:
    """The settings of a command line: those of its recipe, overridden by its flags.

    Accepts `--learning-rate=0.01` and `--learning_rate 0.01`, and for a boolean `--flag`, `--flag=True` or `--flag
    false`; W&B's sweep agents use `=`. `--augment` alone is `--augment light`. Exits with 2 and a message for arguments
    that cannot be parsed; raises ConfigError for invalid values.
    """
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    recipe_parser.add_argument("--recipe", nargs="?", default="tutorial")
    recipe_parser.add_argument("--pretrained", nargs="?")
    asked = recipe_parser.parse_known_args(spell_booleans(arguments))[0]
    recipe = asked.recipe or "tutorial"
    check_choice("recipe", recipe, tuple(recipes))
    if asked.pretrained == "none":
        recipe = WITHOUT_WEIGHTS.get(recipe, recipe)
    sizes = {"--batch-size", "--global-batch-size"} & {word.partition("=")[0].replace("_", "-") for word in arguments}
    if len(sizes) == 2:
        raise ConfigError("--batch-size and --global-batch-size: use only one of them.")
    if shutil.get_terminal_size().columns < MIN_COLUMNS:  # of COLUMNS, or of the terminal itself
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    is_first = is_first_process()  # only the first process prints errors
    try:
        parsed = tyro.cli(
            _grouped_settings(recipes, recipes[recipe]),
            prog="train.py",
            description=inspect.getdoc(TrainConfig),
            args=spell_booleans(arguments),
            config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
            console_outputs=is_first,
        )
    except SystemExit:
        if not is_first:
            time.sleep(2)  # usually the launcher ends this process meanwhile, because process 0 has failed too
            print(f"Process {os.environ['RANK']}: wrong usage. See the error of process 0.", file=sys.stderr)
        raise
    values = {name: value for group in vars(parsed).values() for name, value in vars(group).items()}
    if sizes == {"--batch-size"}:
        values["global_batch_size"] = None  # the recipe's
    return dataclasses.replace(recipes[recipe], **values | {"recipe": recipe})


def _grouped_settings(recipes: Mapping[str, TrainConfig], defaults: TrainConfig) -> Any:
    """A dataclass with one nested dataclass per group of the help, which is how tyro groups flags.

    TrainConfig itself is flat: `config.learning_rate` reads better than `config.optimizer.learning_rate`.
    """
    import tyro

    docstrings, types = field_docstrings(TrainConfig), get_type_hints(TrainConfig)
    open_ended = {name: (*CHOICES[name], "...") for name in ("dataset", "model")}
    choices = CHOICES | open_ended | {"recipe": tuple(recipes)}  # as the help shows them

    def argument(name: str) -> tuple[str, Any, Any]:
        (kind, *_) = get_args(types[name]) or (types[name],)
        metavar = "{" + ",".join(choices[name]) + "}" if name in choices else kind.__name__.upper()
        default = getattr(defaults, name)
        hint = "" if default is None else None  # the docstring says what None means
        note = tyro.conf.arg(help=docstrings[name], metavar=metavar, help_behavior_hint=hint)
        return name, Annotated[types[name], note], dataclasses.field(default=default)

    groups = []
    for title, names in HELP_GROUPS.items():
        group: Any = dataclasses.make_dataclass(title, [argument(name) for name in names.split()], frozen=True)
        group.__doc__ = " "
        groups.append((title, group, dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass("Settings", groups, frozen=True)


def explicit_settings(arguments: Sequence[str] | None = None) -> frozenset[str]:
    """Names of the settings that a command line sets explicitly."""
    words = sys.argv[1:] if arguments is None else arguments
    names = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    return frozenset(names & {field.name for field in dataclasses.fields(TrainConfig)})


def is_first_process() -> bool:
    """Whether this is the first or only process of its job. RANK without WORLD_SIZE is ignored."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or os.environ.get("RANK", "0") == "0"


def spell_booleans(arguments: Sequence[str]) -> list[str]:
    """Spell `--flag`, `--flag=true` and `--flag false` as `--flag True` and `--flag False`, which tyro reads.

    Also accepts --augment and --pretrained as booleans, which they once were.
    """
    kinds = get_type_hints(TrainConfig)
    words = {
        flag(name): {"true": "True", "false": "False"}
        for name, kind in kinds.items()
        if bool in (kind, *get_args(kind))
    }
    words |= {flag(name): {str(key).lower(): value for key, value in known.items()} for name, known in BOOLEANS.items()}
    spelled: list[str] = []
    pending: dict[str, str] = {}  # words of the flag before
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        name, equals, value = argument.partition("=")
        known = words.get(name.replace("_", "-"), {})
        if known and equals:
            spelled += [name, known.get(value.lower(), value)]
        elif known and following.startswith("--"):
            spelled += [argument, known["true"]]
        else:
            spelled.append(pending.get(argument.lower(), argument))
        pending = {} if equals else known
    return spelled


def field_docstrings(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass. Python keeps these in the source only."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docstrings = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docstrings[statement.target.id] = " ".join(str(following.value.value).split())
    return docstrings
