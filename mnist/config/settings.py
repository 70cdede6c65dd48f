"""The settings of a run: one frozen, validated dataclass. command_line.py generates the flags from it.

config = TrainConfig(epochs=2)          # ConfigError (a ValueError) for an invalid value
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
    "model": ("mlp", "cnn", "cnn-quick", "cnn-deep"),  # torchvision's models are accepted as well
    "fit": ("crop", "pad"),
    "augment": ("none", "light", "strong"),
    "pretrained": ("none", "head", "all"),
    "loss": ("nll", "nll-balanced", "mse"),
    "optimizer": ("adam", "radam", "adamw", "sgd"),
    "schedule": ("constant", "linear", "cosine", "one-cycle"),
    "trackers": tuple("wandb tensorboard aim clearml comet_ml dvclive mlflow swanlab trackio none".split()),
    "mixed_precision": ("no", "fp16", "bf16", "auto"),
}

KNOWN_TO_TORCHVISION = ("convnext_tiny", "resnet18")
"""Models that need not be looked up in torchvision, which takes a second to import."""

MAY_CHANGE = {
    *("epochs", "max_steps", "trackers", "log_every", "checkpoint_every", "profile", "timeout_seconds", "compile"),
    *("dataset", "data_dir"),  # only the path: runs/folder.py checks that the images are the same
}
"""Settings that may change when a run is resumed."""

NOT_IN_FINGERPRINT = MAY_CHANGE | {"recipe", "run_name", "output_dir", "resume", "batch_size", "mixed_precision"}
"""Settings that may differ between a checkpoint and the run that loads it."""

BOOLEANS = {"augment": {True: "light", False: "none"}, "pretrained": {True: "all", False: "none"}}
"""Settings that once were booleans, and what these mean now."""

AT_LEAST_1 = (
    *("epochs", "max_steps", "batch_size", "global_batch_size", "gradient_accumulation_steps"),
    *("log_every", "checkpoint_every", "limit_train_images", "limit_test_images"),
)
FEWEST_EPOCHS, FEWEST_STEPS = 5, 600  # if --epochs is open, as in the recipe for photographs
LABEL_SMOOTHING = 0.1  # with strong augmentation of photographs (Szegedy et al., 2016)
MAX_TIMEOUT = 30 * 24 * 3600  # seconds
MAX_INTEGER = 10**12
MAX_IMAGE_SIZE = 1024  # pixels per side
MAX_YAML = 64 << 10  # bytes of a config.yaml; parsing takes ten seconds per megabyte
TYPES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
DATA_FOLDER = PROJECT_FOLDER / "data" if (PROJECT_FOLDER / "train.py").is_file() else Path("data")
"""The checkout's data folder; for an installed package, one in the current folder."""


class BatchSizes(NamedTuple):
    batch_size: int  # per process
    global_batch_size: int  # across all processes


class DataOptions(NamedTuple):
    """Settings that choose and prepare the images of a dataset, with the names of TrainConfig."""

    limit_train_images: int | None = None
    limit_test_images: int | None = None
    validation_size: int = 0
    image_size: int | None = None
    fit: str = "crop"
    test_fraction: float | None = None  # 1 for a folder used only for testing


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. The defaults are those of the PyTorch MNIST tutorial."""

    recipe: str = "tutorial"
    """Preset to start from; other flags override its settings."""

    run_name: str | None = None
    """Folder name of the run. Default: recipe and time."""

    output_dir: str = "runs"
    """Folder in which the run's folder is created."""

    resume: str | None = None
    """Resume the run in this folder. `auto` resumes the run named by --run-name, or starts it if it does not exist."""

    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints. Default: one epoch, or more if saving would take over 5 % of the time."""

    trackers: str = "wandb"
    """Comma-separated trackers to log to, in addition to metrics.jsonl."""

    log_every: int | None = None
    """Optimizer steps between logged training losses. Default: 100, or a tenth of an epoch if that is less."""

    profile: bool = False
    """Print how long each part of a training step takes, and save a trace of a few steps in the run's folder."""

    seed: int = 0
    """Random seed for initial weights, shuffling and augmentation."""

    dataset: str = "mnist"
    """Dataset to train on: mnist, fashion-mnist, kmnist, or a folder with one subfolder of images per class."""

    data_dir: str = str(DATA_FOLDER)
    """Folder with the datasets, in torchvision's layout (MNIST/raw/ ...), and the cache of decoded images (cache/)."""

    image_size: int | None = None
    """Side in pixels to which a folder's images are resized. Default: 28 if all are gray and small, otherwise 64."""

    fit: str = "crop"
    """How images of a folder are made square. crop: center crop. pad: keep the whole image and repeat its edges."""

    test_fraction: float | None = None
    """Fraction of images held out for testing, for a folder without test/ or val/. Default: 0.2."""

    limit_train_images: int | None = None
    """Train on the first N images only."""

    limit_test_images: int | None = None
    """Test on the first N images only."""

    validation_size: int = 0
    """Hold out the last N training images for validation. Tune settings on these, not on the test images."""

    augment: str = "none"
    """light: rotate, zoom, shift, and mirror images (not MNIST's and KMNIST's). strong: for a folder, random crops,
    flips, color jitter and (with nll) label smoothing; for MNIST, other handwriting styles."""

    model: str = "mlp"
    """Network: mlp, cnn, cnn-quick, cnn-deep, or a torchvision classification model such as resnet18."""

    pretrained: str = "none"
    """Start from torchvision's ImageNet weights, except in the last layer, and train all layers or the last one (head);
    for torchvision models only. Without a value: all."""

    loss: str = "nll"
    """nll: negative log-likelihood of log-softmax (cross-entropy). nll-balanced: every class has the same weight in
    training, however many images it has. mse: squared error against one-hot targets."""

    optimizer: str = "adam"
    """Optimizer; radam is rectified Adam, sgd has momentum 0.9."""

    learning_rate: float = 1e-3
    """Learning rate; with a schedule, its peak."""

    weight_decay: float = 0.0
    """Weight decay: decoupled in adamw, an L2 penalty in the others."""

    schedule: str = "constant"
    """Learning rate schedule over the optimizer steps after the warm-up."""

    warmup_steps: int = 0
    """Optimizer steps of linear warm-up (one-cycle: along a cosine; 0 means 30 % of all steps)."""

    max_grad_norm: float | None = None
    """Clip the gradient norm to this value. Default: no clipping."""

    epochs: int | None = 3
    """Number of passes over the training images. With --recipe photos: 5, or as many as 600 optimizer steps take."""

    max_steps: int | None = None
    """Stop after N optimizer steps, even before the last epoch ends."""

    batch_size: int = 10
    """Images per batch in each process."""

    global_batch_size: int | None = None
    """Images per batch over all processes together; replaces --batch-size."""

    gradient_accumulation_steps: int = 1
    """Batches per optimizer step: 5 batches of 10 give the gradient of one batch of 50."""

    compile: bool | None = None
    """Run forward and backward pass as one graph. Default: on an NVIDIA or AMD GPU, for this project's own networks.
    On a CPU the graph is compiled, which takes seconds and needs a C++ compiler."""

    mixed_precision: str | None = None
    """Precision of the layers' computations. Default: the launcher's, which is `no` (float32) unless configured.
    auto: if the launcher's is no, bf16 on an NVIDIA or AMD GPU that has it."""

    timeout_seconds: int = 600
    """Seconds that a process waits for the others before the job fails."""

    def __post_init__(self) -> None:
        for name in BOOLEANS:
            object.__setattr__(self, name, without_booleans(name, getattr(self, name)))
        for field in dataclasses.fields(self):
            self._require_type(field.name, get_args(field.type) or (field.type,))
        for name in AT_LEAST_1:
            self._require(name, lambda value: value >= 1, "at least 1")
        for name in ("validation_size", "warmup_steps"):
            self._require(name, lambda value: value >= 0, "at least 0")
        self._require("timeout_seconds", lambda seconds: 1 <= seconds <= MAX_TIMEOUT, "from 1 to 2,592,000 (30 days)")
        self._require("seed", lambda seed: 0 <= seed < 2**32, "from 0 to 2^32 - 1")
        self._require("learning_rate", lambda rate: 0 < rate < math.inf, "finite and above 0")
        self._require("weight_decay", lambda decay: 0 <= decay < math.inf, "finite and at least 0")
        self._require("max_grad_norm", lambda norm: 0 < norm < math.inf, "finite and above 0")
        self._require("image_size", lambda size: 8 <= size <= MAX_IMAGE_SIZE, f"from 8 to {MAX_IMAGE_SIZE}")
        self._require("test_fraction", lambda fraction: 0 < fraction < 1, "between 0 and 1, e.g. 0.2")
        self._require(
            "run_name",
            lambda name: re.fullmatch(r"\w[\w.+=@-]*", name, re.ASCII) and name != "latest",
            "letters, digits and _ . + = @ - only, and not 'latest'",
        )
        for name in ("fit", "augment", "pretrained", "loss", "optimizer", "schedule"):
            check_choice(name, getattr(self, name), CHOICES[name])
        for name in ("data_dir", "dataset", "output_dir"):
            self._require(name, lambda path: "\0" not in path, "a path without a zero byte")
        # absolute paths: a run may be resumed from another folder
        self._make_absolute("data_dir", Path.absolute)
        if is_path(self.dataset):
            self._make_absolute("dataset", Path.resolve)
        else:
            check_choice("dataset", self.dataset, CHOICES["dataset"], f"{', '.join(CHOICES['dataset'])}, or a folder")
            if self.augment == "strong" and self.dataset != "mnist":
                raise ConfigError(
                    f"--augment strong: for mnist and folders of images, not for {self.dataset}. Use --augment light."
                )
        if self.model not in (*CHOICES["model"], *KNOWN_TO_TORCHVISION):
            from torchvision import models  # takes a second to import

            theirs = models.list_models(module=models)
            known = f"{', '.join(CHOICES['model'])}, and {len(theirs)} torchvision models such as resnet18"
            check_choice("model", self.model, (*CHOICES["model"], *theirs), known)
        elif self.pretrained != "none" and self.model in CHOICES["model"]:
            raise ConfigError(
                f"--model {self.model}: has no pretrained weights. Add --pretrained none, or choose a model of"
                " torchvision such as resnet18."
            )
        if self.mixed_precision is not None:
            check_choice("mixed_precision", self.mixed_precision, CHOICES["mixed_precision"])
        for tracker in self.tracker_names:
            check_choice("trackers", tracker, CHOICES["trackers"])

    def _make_absolute(self, name: str, absolute: Callable[[Path], Path]) -> None:
        value = getattr(self, name)
        try:
            path = absolute(Path(value).expanduser())
        except (RuntimeError, OSError) as error:  # no such user, or circular links
            raise ConfigError(f"{flag(name)} {value}: not a valid path: {error}") from error
        object.__setattr__(self, name, str(path))

    def _require_type(self, name: str, kinds: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if type(value) not in {*kinds, *((int,) if float in kinds else ())}:
            accepted = " or ".join(TYPES[kind] for kind in kinds if kind is not type(None))
            raise ConfigError(f"{flag(name)} {value!r:.100}: must be {accepted}.")
        if type(value) is int:
            self._require(name, lambda value: abs(value) <= MAX_INTEGER, f"at most {MAX_INTEGER:,}")

    def _require(self, name: str, holds: Callable[[Any], object], accepted: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise ConfigError(f"{flag(name)} {value}: must be {accepted}.")

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The requested trackers without duplicates; empty for `none`."""
        names = [name.strip() for name in self.trackers.split(",")]
        return tuple(dict.fromkeys(name for name in names if name != "none"))

    @property
    def data_options(self) -> DataOptions:
        """The settings of DataOptions."""
        return DataOptions(*(getattr(self, name) for name in DataOptions._fields))

    @property
    def label_smoothing(self) -> float:
        """The share of the loss of a training image that is spread over all classes; only of nll."""
        smooths = self.augment == "strong" and is_path(self.dataset) and self.loss != "mse"
        return LABEL_SMOOTHING if smooths else 0.0

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that must be the same in a checkpoint and the run that loads it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_IN_FINGERPRINT}

    @property
    def job_settings(self) -> dict[str, Any]:
        """The settings that must be the same in all processes of a job, by flag: all except paths."""
        paths = {"data_dir", "output_dir", "run_name", "resume", *(["dataset"] if is_path(self.dataset) else [])}
        return {flag(name): value for name, value in dataclasses.asdict(self).items() if name not in paths}

    def with_local_dataset(self, local: "TrainConfig") -> "TrainConfig":
        """The main process's settings (self) with this machine's own path to a folder of images."""
        return dataclasses.replace(self, dataset=local.dataset) if is_path(local.dataset) else self

    def resumed(self, asked: "TrainConfig", explicit_settings: Collection[str], folder: Path) -> "TrainConfig":
        """The settings of the run in `folder` (self), updated from the command line (`asked`) where that is allowed.

        `explicit_settings` are those named on the command line. Raises ConfigError if one differs that must not change.
        """
        for name in explicit_settings:
            saved, new = getattr(self, name), getattr(asked, name)
            if name == "output_dir":
                saved, new = folder.resolve().parent, Path(new).resolve()
            if name == "run_name":
                saved = folder.resolve().name
            may_change = name in MAY_CHANGE | {"resume"}
            if name == "dataset":  # a folder may have been moved
                may_change = is_path(saved) and is_path(new)
            if new != saved and not may_change:
                raise ConfigError(
                    f"{flag(name)} {new}: the run in {folder} has {saved}. Omit the flag to resume it, or"
                    f" start a new run. Flags that may change: {', '.join(sorted(map(flag, MAY_CHANGE)))}."
                )
        # the new timeout is already in effect: the processes have joined with it
        changes = {name: getattr(asked, name) for name in MAY_CHANGE & set(explicit_settings) | {"timeout_seconds"}}
        return dataclasses.replace(
            self, **changes, output_dir=str(folder.parent), run_name=folder.name, resume=str(folder)
        )

    def batch_sizes(self, num_processes: int) -> BatchSizes:
        """Images per batch: per process, rounded up, and across all processes.

        A resumed run keeps its global batch size on any number of processes. Otherwise raises ConfigError if
        --global-batch-size is not divisible by the number of processes.
        """
        global_batch_size = self.global_batch_size or self.batch_size * num_processes
        batch_size = -(-global_batch_size // num_processes)
        if batch_size * num_processes != global_batch_size and self.resume is None:
            raise ConfigError(
                f"--global-batch-size {global_batch_size}: not divisible by the {num_processes} processes of this job."
                f" Use e.g. {batch_size * num_processes}."
            )
        return BatchSizes(batch_size, global_batch_size)

    def total_steps(self, batches_per_epoch: int) -> int:
        """Optimizer steps in the whole run."""
        steps = self.total_epochs(batches_per_epoch) * self._steps(batches_per_epoch)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def total_epochs(self, batches_per_epoch: int) -> int:
        """--epochs, or what it comes to if it is open."""
        return self.epochs or max(FEWEST_EPOCHS, -(-FEWEST_STEPS // self._steps(batches_per_epoch)))

    def _steps(self, batches: int) -> int:
        """Optimizer steps in this many batches of an epoch; the last may accumulate fewer."""
        return -(-batches // self.gradient_accumulation_steps)

    def to_yaml(self) -> str:
        """All settings, in the format that `load` reads."""
        import yaml

        settings = dataclasses.asdict(self) | {"resume": None}  # a run does not resume itself
        return yaml.safe_dump(settings, sort_keys=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TrainConfig":
        """Read a file written with `to_yaml`. Raises ConfigError for unknown settings and invalid values."""
        settings = read_settings(Path(path))
        unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"{path}: unknown settings {', '.join(unknown)}. Was it written by another version?")
        try:
            return cls(**settings)
        except ConfigError as error:
            hint = " (YAML reads 1e-3 as a string: write 1.0e-3.)" if re.search(r"'[\d.]+e", str(error)) else ""
            raise ConfigError(f"{path}: {error}{hint}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a config.yaml, by name. Raises ConfigError if it is not a flat mapping of plain values."""
    import yaml

    try:
        if not path.is_file():
            raise ConfigError(f"{path}: not a file.")
        settings = yaml.safe_load(read_text(path, MAX_YAML))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{path}: not valid YAML: {problem}") from error
    plain = (str, int, float, bool, type(None))
    if not isinstance(settings, dict) or not all(
        isinstance(name, str) and isinstance(value, plain) for name, value in settings.items()
    ):
        raise ConfigError(f"{path}: must map setting names to plain values.")
    for name, value in settings.items():
        if isinstance(value, int) and abs(value) > MAX_INTEGER:  # may be too long to show, e.g. in hexadecimal
            raise ConfigError(f"{path}: {name}: must be at most {MAX_INTEGER:,}.")
    return settings


def without_booleans(name: str, value: Any) -> Any:
    """The value of a setting that once was a boolean, in older runs too: see BOOLEANS."""
    return BOOLEANS[name][value] if name in BOOLEANS and isinstance(value, bool) else value


def flag(name: str) -> str:
    """The flag of a field: `--learning-rate` for `learning_rate`."""
    return "--" + name.replace("_", "-")


def is_path(dataset: str) -> bool:
    """Whether --dataset is a folder: it contains a path separator, or names a folder here and no known dataset."""
    return dataset not in ("", *CHOICES["dataset"]) and (Path(dataset).name != dataset or Path(dataset).is_dir())


def check_choice(name: str, value: str, choices: Sequence[str], known: str = "") -> None:
    """Raise ConfigError with the closest names if `value` is not in `choices`; `known` sums them up."""
    if value not in choices:
        near = difflib.get_close_matches(value.lower(), choices, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{flag(name)} {value}: unknown.{hint} Known: {known or ', '.join(choices)}.")
