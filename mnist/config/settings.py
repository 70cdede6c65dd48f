"""The settings of a run: one frozen dataclass, checked when it is built. command_line.py makes the flags from it.

config = TrainConfig(epochs=2)          # ConfigError (a ValueError) for what cannot be
Path("config.yaml").write_text(config.to_yaml()); config == TrainConfig.load("config.yaml")
"""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from mnist.errors import ConfigError
from mnist.files import read_text

CHOICES = {
    "dataset": ("mnist", "fashion-mnist", "kmnist"),
    "model": ("mlp", "cnn", "cnn-quick", "cnn-deep"),
    "loss": ("nll", "mse"),
    "optimizer": ("adam", "radam", "adamw", "sgd"),
    "schedule": ("constant", "linear", "cosine", "one-cycle"),
    "trackers": (
        *("wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"),
        "none",
    ),
    "mixed_precision": ("no", "fp16", "bf16"),
}
"""What may be named; data, models, optim and tracking hold what the names stand for. A model may be torchvision's."""

MAY_CHANGE = {
    *("epochs", "max_steps", "trackers", "log_every", "checkpoint_every", "profile", "timeout_seconds", "compile"),
    *("dataset", "data_dir"),  # the images themselves may not: runs/folder.py compares them
}
"""Settings that a run may go on with otherwise than it began: how long it is, what it says, where and how it runs."""

SURROUNDINGS = {"recipe", "run_name", "output_dir", "resume", "batch_size", "mixed_precision"}
"""Settings of where, by how many processes and in which precision a checkpoint is used: its own may differ."""

LONGEST_WAIT = 30 * 24 * 3600  # seconds
LARGEST_SETTINGS = 64 << 10  # bytes of a config.yaml: reading YAML takes ten seconds a megabyte
LARGEST_NUMBER = 10**12
TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
DATA_FOLDER = PROJECT_FOLDER / "data" if (PROJECT_FOLDER / "train.py").is_file() else Path("data")
"""The checkout's; for an installed package, which is no place for data, one in the current folder, beside runs/."""


class BatchSizes(NamedTuple):
    """Training images per batch."""

    batch_size: int  # per process
    global_batch_size: int  # of all processes together


class DataOptions(NamedTuple):
    """What of a data set is used, and how: the settings of the same names."""

    limit_train_images: int | None = None
    limit_test_images: int | None = None
    validation_size: int = 0
    image_size: int | None = None
    test_fraction: float | None = None  # 1 for a folder on which a model is only tested


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run. The defaults are the PyTorch MNIST tutorial's recipe."""

    recipe: str = "tutorial"
    """Named settings to start from; every other flag changes one of them."""

    run_name: str | None = None
    """Name of the run's folder; by default the recipe and the time."""

    output_dir: str = "runs"
    """Folder in which the run's folder is made."""

    resume: str | None = None
    """Go on with the run in this folder; `auto`: with the one called --run-name, or start it where there is none."""

    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints; by default one an epoch, if that costs at most 5 % of the time."""

    trackers: str = "wandb"
    """Where the metrics go besides metrics.jsonl, separated by commas."""

    log_every: int | None = None
    """Optimizer steps between two values of the training loss; by default 100, or ten an epoch where it is shorter."""

    profile: bool = False
    """Say where the time of a training step goes, and leave a trace of some in the run's folder."""

    seed: int = 0
    """Seed of the first weights and of the order of the images."""

    dataset: str = "mnist"
    """The images to learn from: mnist, fashion-mnist, kmnist, or a folder with one folder of images per class."""

    data_dir: str = str(DATA_FOLDER)
    """Folder of the data sets, as torchvision lays it out (MNIST/raw/ ...), and of decoded pictures (cache/)."""

    image_size: int | None = None
    """Width and height of a folder's images; by default 64, or 28 where all are grey and about that small."""

    test_fraction: float | None = None
    """Share of a folder's pictures to test on, by default 0.2; not where it holds train/ and test/ (or val/)."""

    limit_train_images: int | None = None
    """Train on the first N images only."""

    limit_test_images: int | None = None
    """Test on the first N images only."""

    validation_size: int = 0
    """Cut the last N training images off and measure on them too: choose settings by these, not by the test images."""

    augment: bool = False
    """Turn, zoom and shift the training images a little, anew in each epoch; mirror them where they are not writing."""

    model: str = "mlp"
    """The network: mlp, cnn, cnn-quick, cnn-deep, or a classification model of torchvision's, as resnet18."""

    pretrained: bool = False
    """Start from torchvision's weights, made with ImageNet, for all but the last layer; only for its models."""

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

    compile: bool = False
    """Compile forward and backward pass into one graph, which takes seconds and needs a C++ compiler."""

    mixed_precision: str | None = None
    """What the layers compute in; by default what the launcher says, which is `no` (float32) unless told otherwise."""

    timeout_seconds: int = 600
    """How long a process waits for the others before it gives up, and with it the job."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._require_type(field.name, get_args(field.type) or (field.type,))
        for name in ("epochs", "batch_size", "gradient_accumulation_steps"):
            self._require(name, getattr(self, name) >= 1, "a whole number of at least 1")
        self._require("timeout_seconds", 1 <= self.timeout_seconds <= LONGEST_WAIT, "from 1 to 2,592,000, a month")
        for name in (
            *("log_every", "checkpoint_every", "limit_train_images", "limit_test_images", "max_steps"),
            "global_batch_size",
        ):
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
        size, share = self.image_size, self.test_fraction
        self._require("image_size", size is None or 8 <= size <= 1024, "a whole number from 8 to 1024")
        self._require("test_fraction", share is None or 0 < share < 1, "a share between 0 and 1, as 0.2")
        for name in ("loss", "optimizer", "schedule"):
            check_choice(name, getattr(self, name), CHOICES[name])
        # paths are kept whole: a run may be resumed from another folder
        for name in ("data_dir", "dataset", "output_dir"):
            self._require(name, "\0" not in getattr(self, name), "a path, without a zero byte")
        self._keep_whole("data_dir", Path.absolute)
        if is_path(self.dataset):
            self._keep_whole("dataset", Path.resolve)
        else:
            check_choice("dataset", self.dataset, CHOICES["dataset"], f"{', '.join(CHOICES['dataset'])}, and folders")
        if self.model not in CHOICES["model"]:
            from torchvision import models  # takes a second, which the others can do without

            theirs = models.list_models(module=models)
            known = f"{', '.join(CHOICES['model'])}, and {len(theirs)} of torchvision's, as resnet18"
            check_choice("model", self.model, (*CHOICES["model"], *theirs), known)
        elif self.pretrained:
            raise ConfigError(
                f"--pretrained: there are no such weights for --model {self.model}. Choose a model of torchvision's, as"
                " --model resnet18."
            )
        if self.mixed_precision is not None:
            check_choice("mixed_precision", self.mixed_precision, CHOICES["mixed_precision"])
        for tracker in self.tracker_names:
            check_choice("trackers", tracker, CHOICES["trackers"])

    def _keep_whole(self, name: str, whole: Callable[[Path], Path]) -> None:
        value = getattr(self, name)
        try:
            path = whole(Path(value).expanduser())
        except (RuntimeError, OSError) as error:  # no such user, links in a circle
            raise ConfigError(f"{flag(name)} {value}: no path: {error}") from error
        object.__setattr__(self, name, str(path))

    def _require_type(self, name: str, kinds: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        accepted = {*kinds, *((int,) if float in kinds else ())}
        words = " or ".join(TYPES[kind] for kind in kinds if kind is not type(None))
        if type(value) not in accepted:
            raise ConfigError(f"{flag(name)} {value!r:.100}: must be {words}.")
        too_many = type(value) is int and abs(value) > LARGEST_NUMBER
        self._require(name, not too_many, f"at most {LARGEST_NUMBER:,}")

    def _require(self, name: str, holds: object, accepted: str) -> None:
        if not holds:
            raise ConfigError(f"{flag(name)} {getattr(self, name)}: must be {accepted}.")

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The trackers asked for, each once; empty for `none`."""
        names = [name.strip() for name in self.trackers.split(",")]
        return tuple(dict.fromkeys(name for name in names if name != "none"))

    @property
    def data_options(self) -> DataOptions:
        """Those of the settings that say what of the data set is used."""
        return DataOptions(*(getattr(self, name) for name in DataOptions._fields))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint and the run that it is loaded into must have in common."""
        return {
            name: value for name, value in dataclasses.asdict(self).items() if name not in MAY_CHANGE | SURROUNDINGS
        }

    @property
    def shared(self) -> dict[str, Any]:
        """What all processes of a job must be told alike, by flag: all but where things are on a machine."""
        places = {"data_dir", "output_dir", "run_name", "resume", *(["dataset"] if is_path(self.dataset) else [])}
        return {flag(name): value for name, value in dataclasses.asdict(self).items() if name not in places}

    def with_place(self, asked: "TrainConfig") -> "TrainConfig":
        """These settings, of the main process, with the folder of images as this machine has it."""
        return dataclasses.replace(self, dataset=asked.dataset) if is_path(asked.dataset) else self

    def resumed(self, asked: "TrainConfig", given: Collection[str], folder: Path) -> "TrainConfig":
        """These settings, of the run in `folder`, with what the command line `asked` may change of them.

        `given` are the settings that the command line names. Raises ConfigError for one that may not change and
        differs, with both values.
        """
        for name in given:
            there, here = getattr(self, name), getattr(asked, name)
            if name == "output_dir":
                there, here = folder.resolve().parent, Path(here).resolve()
            if name == "run_name":
                there = folder.resolve().name
            may_change = name in MAY_CHANGE | {"resume"}
            if name == "dataset":  # a folder may have been moved
                may_change = is_path(there) and is_path(here)
            if here != there and not may_change:
                raise ConfigError(
                    f"{flag(name)} {here}: the run in {folder} has {there}, and goes on with that. Leave the flag away,"
                    f" or start another run. What may change: {', '.join(sorted(map(flag, MAY_CHANGE)))}."
                )
        # what was asked for is in effect: the processes have met by now
        changes = {name: getattr(asked, name) for name in (MAY_CHANGE & set(given)) | {"timeout_seconds"}}
        return dataclasses.replace(
            self, **changes, output_dir=str(folder.parent), run_name=folder.name, resume=str(folder)
        )

    def batch_sizes(self, num_processes: int) -> "BatchSizes":
        """The two batch sizes of a job: per process, rounded up, and of all processes together.

        Raises ConfigError for a --global-batch-size that the processes cannot share evenly. A resumed run keeps its
        global batch size on any number of processes.
        """
        global_batch_size = self.global_batch_size or self.batch_size * num_processes
        batch_size = -(-global_batch_size // num_processes)
        if batch_size * num_processes != global_batch_size and self.resume is None:
            raise ConfigError(
                f"--global-batch-size {global_batch_size}: does not divide by the {num_processes} processes of this"
                f" job; {batch_size * num_processes} would."
            )
        return BatchSizes(batch_size, global_batch_size)

    def total_steps(self, batches_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        steps = self.epochs * -(-batches_per_epoch // self.gradient_accumulation_steps)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def to_yaml(self) -> str:
        """Every setting, as `load` reads it."""
        import yaml

        settings = dataclasses.asdict(self) | {"resume": None}  # the file is what is resumed
        return yaml.safe_dump(settings, sort_keys=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TrainConfig":
        """Read a file of what `to_yaml` gave; ConfigError for settings that do not exist or cannot be."""
        settings = read_settings(Path(path))
        unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"{path}: unknown settings {', '.join(unknown)}; was it written by another version?")
        try:
            return cls(**settings)
        except ConfigError as error:
            hint = " (YAML takes 1e-3 for text: write 1.0e-3.)" if re.search(r"'[\d.]+e", str(error)) else ""
            raise ConfigError(f"{path}: {error}{hint}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a config.yaml, by name; ConfigError for what is no flat mapping of plain values."""
    import yaml

    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no file.")
        settings = yaml.safe_load(read_text(path, LARGEST_SETTINGS))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{path}: no YAML that can be read: {problem}") from error
    plain = (str, int, float, bool, type(None))
    if not isinstance(settings, dict) or not all(
        isinstance(name, str) and isinstance(value, plain) for name, value in settings.items()
    ):
        raise ConfigError(f"{path}: holds no settings, a name and a value each.")
    for name, value in settings.items():
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:  # perhaps in hexadecimal, too long to be shown
            raise ConfigError(f"{path}: {name}: must be at most {LARGEST_NUMBER:,}.")
    return settings


def flag(name: str) -> str:
    """The flag of a field: `--learning-rate` for `learning_rate`."""
    return "--" + name.replace("_", "-")


def is_path(dataset: str) -> bool:
    """Whether --dataset means a folder: it has a separator, or a folder of that name is here and no data set is."""
    return dataset not in ("", *CHOICES["dataset"]) and (Path(dataset).name != dataset or Path(dataset).is_dir())


def check_choice(name: str, value: str, choices: Sequence[str], known: str = "") -> None:
    """Raise ConfigError, with the nearest names, where `value` is no choice; `known` is a shorter list of them."""
    if value not in choices:
        near = difflib.get_close_matches(value.lower(), choices, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{flag(name)} {value}: unknown.{hint} Known: {known or ', '.join(choices)}.")
