"""The settings of a run: one frozen dataclass, checked when it is built, and the command line made from it.

python train.py --help
python train.py --recipe cnn --learning-rate 0.01 --epochs 2

config = TrainConfig(epochs=2)          # ConfigError (a ValueError) for what cannot be
config.save("config.yaml"); config == TrainConfig.load("config.yaml")
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from mnist.errors import ConfigError

CHOICES = {
    "dataset": ("mnist", "fashion-mnist", "kmnist"),
    "model": ("mlp", "cnn"),
    "loss": ("nll", "mse"),
    "optimizer": ("adam", "radam", "adamw", "sgd"),
    "schedule": ("constant", "linear", "cosine", "one-cycle"),
    "trackers": ("wandb", "none"),
    "mixed_precision": ("no", "fp16", "bf16"),
}
"""What may be named; data, models, optim and tracking hold what the names stand for."""

PROJECT_FOLDER = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run. The defaults are the PyTorch MNIST tutorial's recipe."""

    recipe: str = "tutorial"
    """Named settings to start from; every other flag changes one of them."""

    run_name: str | None = None
    """Name of the run's folder; by default the recipe and the time."""

    output_dir: str = "runs"
    """Folder in which the run's folder is made."""

    trackers: str = "wandb"
    """Where the metrics go besides metrics.jsonl, separated by commas."""

    log_every: int = 100
    """Optimizer steps between two values of the training loss."""

    seed: int = 0
    """Seed of the first weights and of the order of the images."""

    dataset: str = "mnist"
    """The images to learn from."""

    data_dir: str = str(PROJECT_FOLDER / "data")
    """Folder of the data sets, as torchvision lays it out: MNIST/raw/, FashionMNIST/raw/, KMNIST/raw/."""

    limit_train_images: int | None = None
    """Train on the first N images only."""

    limit_test_images: int | None = None
    """Test on the first N images only."""

    validation_size: int = 0
    """Cut the last N training images off and measure on them too: choose settings by these, not by the test images."""

    model: str = "mlp"
    """The network."""

    loss: str = "nll"
    """nll: cross-entropy, as negative log-likelihood of log-softmax; mse: squared error to one-hot targets."""

    optimizer: str = "adam"
    """The rule that changes the weights; radam is rectified Adam, sgd has momentum 0.9."""

    learning_rate: float = 1e-3
    """Size of the optimizer's steps; with a schedule, the highest one."""

    weight_decay: float = 0.0
    """Pull of the weights towards zero (decoupled in adamw, an L2 term in the others)."""

    schedule: str = "constant"
    """Course of the learning rate after the warm-up, over all optimizer steps."""

    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from zero (one-cycle: 0 means 30 % of all)."""

    max_grad_norm: float | None = None
    """Scale the gradient down to this length where it is longer."""

    epochs: int = 3
    """Passes over the training images."""

    max_steps: int | None = None
    """Stop after N optimizer steps, if the epochs are not over before."""

    batch_size: int = 10
    """Images that a process takes at a time."""

    global_batch_size: int | None = None
    """Images that all processes together take at a time, in place of --batch-size: the same on any number of them."""

    gradient_accumulation_steps: int = 1
    """Batches whose gradients are summed up for one optimizer step: 5 batches of 10 equal one of 50."""

    mixed_precision: str | None = None
    """What the layers compute in; by default what the launcher says, which is `no` (float32) unless told otherwise."""

    timeout_seconds: int = 600
    """How long a process waits for the others before it gives up, and with it the job."""

    def __post_init__(self) -> None:
        for name in ("log_every", "epochs", "batch_size", "gradient_accumulation_steps", "timeout_seconds"):
            self._require(name, getattr(self, name) >= 1, "a whole number of at least 1")
        for name in ("limit_train_images", "limit_test_images", "max_steps", "global_batch_size"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "a whole number of at least 1")
        for name in ("validation_size", "warmup_steps"):
            self._require(name, getattr(self, name) >= 0, "a whole number of at least 0")
        self._require("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "a finite number above 0")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0")
        norm = self.max_grad_norm
        self._require("max_grad_norm", norm is None or 0 < norm < math.inf, "a finite number above 0")
        if self.run_name is not None:
            well = re.fullmatch(r"\w[\w.+=@-]*", self.run_name, re.ASCII) and self.run_name != "latest"
            self._require("run_name", well, "letters, digits and _ . + = @ - without a folder, and not 'latest'")
        for name in ("dataset", "model", "loss", "optimizer", "schedule"):
            check_choice(name, getattr(self, name), CHOICES[name])
        if self.mixed_precision is not None:
            check_choice("mixed_precision", self.mixed_precision, CHOICES["mixed_precision"])
        for tracker in self.tracker_names:
            check_choice("trackers", tracker, CHOICES["trackers"])

    def _require(self, name: str, holds: object, accepted: str) -> None:
        if not holds:
            raise ConfigError(f"{flag(name)} {getattr(self, name)}: must be {accepted}.")

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The trackers asked for, each once; empty for `none`."""
        names = [name.strip() for name in self.trackers.split(",")]
        return tuple(dict.fromkeys(name for name in names if name != "none"))

    def share_batch(self, num_processes: int) -> "TrainConfig":
        """The settings with both batch sizes in them: a process's share, and that of all processes.

        Raises ConfigError for a --global-batch-size that does not divide by their number.
        """
        whole = self.global_batch_size or self.batch_size * num_processes
        if whole % num_processes:
            above = (whole // num_processes + 1) * num_processes
            raise ConfigError(
                f"--global-batch-size {whole}: does not divide by the {num_processes} processes of this job; {above}"
                " would."
            )
        return dataclasses.replace(self, batch_size=whole // num_processes, global_batch_size=whole)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every setting as YAML."""
        import yaml

        Path(path).write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TrainConfig":
        """Read what `save` wrote; ConfigError for settings that do not exist or cannot be."""
        import yaml

        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"{path}: unknown settings {', '.join(unknown)}; was it written by another version?")
        return cls(**settings)


HELP_GROUPS = {
    "run": "recipe run_name output_dir trackers log_every seed",
    "data": "dataset data_dir limit_train_images limit_test_images validation_size",
    "model": "model loss",
    "optimizer": "optimizer learning_rate weight_decay schedule warmup_steps max_grad_norm",
    "length": "epochs max_steps batch_size global_batch_size gradient_accumulation_steps",
    "processes": "mixed_precision timeout_seconds",
}
"""The groups of `--help`; every field of TrainConfig stands in one."""


def flag(name: str) -> str:
    """The flag of a field: `--learning-rate` for `learning_rate`."""
    return "--" + name.replace("_", "-")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError, with the nearest names, where `value` is none of the choices."""
    if value not in choices:
        near = difflib.get_close_matches(value.lower(), choices, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{flag(name)} {value}: unknown.{hint} Known: {', '.join(choices)}.")


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
    choices = CHOICES | {"recipe": tuple(recipes)}
    config: TrainConfig = parse_flags(recipes[recipe], HELP_GROUPS, choices, arguments)
    return config


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
    speaks = os.environ.get("RANK", "0") == "0"  # of many processes, the first says what is wrong
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
            time.sleep(2)  # the launcher ends all processes as soon as one has ended
        raise
    values = {k: v for section in vars(parsed).values() for k, v in vars(section).items()}
    return dataclasses.replace(defaults, **values)


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
