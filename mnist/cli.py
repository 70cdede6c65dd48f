"""The `mnist` command: inspect, apply and export finished runs, and check a machine.

mnist predict seven.png photos/               # classify images; several digits in an image are read as a number
mnist draw                                    # draw a digit or a number in the browser
mnist evaluate --model runs/latest            # test loss, accuracy and confusion matrix
mnist export --model runs/latest              # runs/latest/model.onnx
mnist inspect PetImages                       # data.html: classes, sizes, duplicates and unusual images of a folder
mnist runs                                    # a table of the runs in runs/
mnist report runs/latest                      # runs/latest/report.html
mnist report runs/a runs/b --output ab.html   # compare two runs
mnist verify --processes 2 --recipe cnn       # check that training works correctly on this machine
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist.errors import ConfigError, ImageError, UserError
from mnist.files import write_file
from mnist.launch.streams import keep_output, printable, printable_lines

if TYPE_CHECKING:
    from mnist.data.splits import ImageData
    from mnist.inference.predict import Model, Prediction
    from mnist.runs.record import Record
    from mnist.training.evaluate import Result

FIGURE_TYPES = (".png", ".jpg", ".pdf", ".svg")
MAX_CLASS_NAME = 24  # characters in a table
MAX_FILE_NAME = 240  # bytes; file systems allow 255
MAX_FIGURE_IMAGES = 40
CHECKED_IMAGES = 1000  # test images on which an exported model is compared with the original


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand per function below."""
    parser = argparse.ArgumentParser(
        prog="mnist",
        description="Inspect, apply and export finished runs, and check a machine.",
        epilog="To train, run `accelerate launch train.py` in a checkout of the project.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="classify images")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, or - for standard input")
    _add_model(predict, or_included=True)
    predict.add_argument("--top", type=int, default=3, metavar="N", help="show the N most likely classes (default: 3)")
    predict.add_argument("--json", action="store_true", help="print a JSON array instead of a table")
    predict.add_argument("--save", type=Path, metavar="FILE", help="save a figure of the images and predictions")
    predict.add_argument(
        "--show-input", type=Path, metavar="FOLDER", help="save each image as the network sees it to FOLDER"
    )
    predict.set_defaults(do=predict_images)

    draw = commands.add_parser("draw", help="draw a digit or a number in the browser and read it")
    _add_model(draw, or_included=True)
    draw.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    draw.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    draw.set_defaults(do=draw_digits)

    evaluate = commands.add_parser("evaluate", help="test loss, accuracy and other figures of a model")
    _add_model(evaluate)
    _add_dataset(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print a JSON object with all figures instead")
    evaluate.set_defaults(do=evaluate_model)

    _add_export(commands)
    _add_inspect(commands)

    runs = commands.add_parser("runs", help="list the runs in a folder")
    runs.add_argument(
        "folder", nargs="?", default="runs", type=Path, metavar="FOLDER", help="folder with runs (default: runs)"
    )
    runs.set_defaults(do=list_runs)

    report = commands.add_parser("report", help="write the HTML report of a run, or compare several runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, e.g. runs/latest")
    described = "output file (default: report.html in the run's folder; for several runs, comparison.html)"
    report.add_argument("--output", type=Path, metavar="FILE", help=described)
    report.set_defaults(do=write_report)
    _add_verify(commands)
    return parser


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="export a model to ONNX and check it against the original")
    _add_model(export)
    export.add_argument("--format", choices=["onnx"], default="onnx", help="file format (default: onnx)")
    export.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="output file (default: model.onnx in the run's folder, or in the current folder if --model is not a run)",
    )
    export.add_argument(
        "--prepared",
        action="store_true",
        help="for a folder's model: take prepared images (float32 in [0, 1], the network's size), not raw pixels",
    )
    _add_dataset(export)
    export.set_defaults(do=export_model)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="look at a folder of images before training on it")
    inspect.add_argument("folder", metavar="FOLDER", help="folder with one subfolder of images per class")
    output = Path("data.html")
    inspect.add_argument("--output", type=Path, default=output, metavar="FILE", help="output file (default: data.html)")
    inspect.add_argument("--image-size", type=int, metavar="N", help="pixels per side, as in training")
    inspect.add_argument("--fit", default="crop", metavar="FIT", help="crop or pad, as in training (default: crop)")
    inspect.add_argument("--data-dir", type=Path, metavar="FOLDER", help="folder of the cache (default: data/)")
    inspect.set_defaults(do=inspect_folder)


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="check that training works correctly on this machine",
        usage="mnist verify [-h] [--processes N] [--output FILE] [flags of train.py]",
        description="Train several short runs, for two to four minutes, and check that the same seed gives the same"
        " weights, that a killed run resumes bit-identically, that all devices and numbers of processes agree, and how"
        " fast training is. Exits with 1 if a check fails.",
        epilog="To check your own model and data, add flags of train.py: mnist verify --recipe cnn --dataset PetImages",
        allow_abbrev=False,
    )
    verify.add_argument("--processes", type=int, default=1, metavar="N", help="processes to train with (default: 1)")
    verify.add_argument("--output", type=Path, metavar="FILE", help="save the results as JSON")
    verify.set_defaults(do=verify_machine)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 after a failure, 2 for wrong usage."""
    keep_output(["stderr"])
    if sys.stdout is None:  # it was closed
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)
    parser = build_parser()
    options, flags = parser.parse_known_args(arguments)
    options.flags = flags  # of train.py
    if flags and options.do is not verify_machine:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        exit_code = int(options.do(options) or 0)
        sys.stdout.flush()
        return exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not raise again
        return 1
    except (UserError, OSError) as error:
        print(printable_lines(f"mnist {options.command}: {error}"), file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 1


def _add_model(parser: argparse.ArgumentParser, or_included: bool = False) -> None:
    otherwise = "; without a run, digits" if or_included else ""
    parser.add_argument(
        "--model",
        default=None if or_included else "runs/latest",
        help="run, model/ folder, user/name on the Hugging Face Hub, or digits, which is included"
        f" (default: runs/latest{otherwise})",
    )


def _load_model(options: argparse.Namespace) -> "Model":
    """The model of --model, by default that of runs/latest, or else the included one, which is then named."""
    from mnist.inference.predict import DIGITS, find_model, load

    if options.model is None:
        options.model = "runs/latest"
        if find_model(options.model) is None:
            options.model = DIGITS
            print("No model in runs/latest: using the included one (--model digits).", file=sys.stderr)
        else:
            print("Using the model of runs/latest; --model digits is the included one.", file=sys.stderr)
    return load(options.model)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", metavar="NAME", help="dataset to test on (default: the model's training dataset)")
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", help="data folder (default: the run's, or data/)")


def predict_images(options: argparse.Namespace) -> int:
    """Print one row or JSON object per image. Unreadable images are reported and skipped; the exit code is then 1."""
    from mnist.data.images import MAX_FILE_BYTES, find_images, read_image

    if options.top < 1:
        raise ConfigError(f"--top {options.top}: must be at least 1.")
    if "" in options.images:
        raise ConfigError("IMAGE '': must not be empty.")
    if options.save and options.save.suffix.lower() not in FIGURE_TYPES:
        raise ConfigError(f"--save {options.save}: unknown image type. Use one of {', '.join(FIGURE_TYPES)}.")
    if options.save and not options.save.parent.is_dir():
        raise ConfigError(f"--save {options.save}: the folder {options.save.parent} does not exist.")
    if options.show_input and options.show_input.exists() and not options.show_input.is_dir():
        raise ConfigError(f"--show-input {options.show_input}: not a folder.")
    model = _load_model(options)
    paths = find_images([Path(word) for word in options.images if word != "-"])
    sources: dict[str, Path | bytes] = {str(path): path for path in paths}
    if "-" in options.images:
        if sys.stdin is None:
            raise ConfigError("IMAGE -: standard input is closed.")
        sources["-"] = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)  # standard input may never end
    if not sources:
        raise ConfigError(f"{', '.join(options.images)}: no images found.")
    width = max(len(printable(name)) for name in sources)
    rows: list[dict[str, Any]] = []
    figure: list[tuple[str, Any, Prediction]] = []
    for name, source in sources.items():
        try:
            image = read_image(source, name, model.config.scale)
            prediction = model.predict(image)
        except ImageError as error:
            print(f"mnist predict: {error}", file=sys.stderr)
            continue
        rows.append({"file": name, **as_json(prediction, options.top)})
        if not options.json:
            print(f"{printable(name):{width}}  {format_prediction(prediction, options.top)}")
        if options.show_input:
            for number, digit in enumerate(prediction.digits, 1):
                which = f"{len(rows):03}" if prediction.label is not None else f"{len(rows):03}-{number:02}"
                stem = f"{which}-{'stdin' if name == '-' else Path(name).stem}"
                write_input(options.show_input, stem, digit)
        if options.save and len(figure) < MAX_FIGURE_IMAGES:
            image.thumbnail((400, 400))
            figure.append((printable(name), image, prediction))
    if options.json:
        print(json.dumps(rows, indent=2))
    if figure:
        from mnist.reporting.plots import write_answers

        write_answers(figure, options.save)
        if len(figure) < len(rows):
            print(printable(f"{options.save}: the first {len(figure)} of {len(rows):,} images"), file=sys.stderr)
    return 1 if len(rows) < len(sources) else 0


def as_json(prediction: "Prediction", most: int) -> dict[str, Any]:
    """The JSON object of an image; several digits have no label, but their text and boxes."""
    top = [{"label": label, "probability": share} for label, share in list(prediction.probabilities.items())[:most]]
    names = ("label", "probability", "confident")
    row = {name: getattr(prediction, name) for name in names} | {"top": top}
    if len(prediction.digits) > 1:
        digits = [{name: getattr(digit, name) for name in (*names, "box")} for digit in prediction.digits]
        row |= {"text": prediction.text, "digits": digits}
    return row | ({"reason": prediction.reason} if prediction.reason else {})


def format_prediction(prediction: "Prediction", most: int) -> str:
    """`7   98.2 %  then 1 0.9 %, 9 0.4 %`, or `2026   91.3 %  (the lowest of 4)`."""
    if prediction.reason:
        return prediction.reason
    unsure = "" if prediction.confident else "  (not sure)"
    text = prediction.text.replace("\n", " / ")
    share = f"{text}  {100 * prediction.probability:5.1f} %"
    if prediction.label is None:
        return f"{share}  (the lowest of {len(prediction.digits)}){unsure}"
    likely = list(prediction.probabilities.items())[1:most]
    others = ", ".join(f"{name} {100 * p:.1f} %" for name, p in likely if p >= 0.0005)
    return share + (f"  then {others}" if others else "") + unsure


def write_input(folder: Path, stem: str, prediction: "Prediction") -> None:
    """Save what the network sees as a PNG."""
    from PIL import Image

    assert prediction.network_input is not None
    folder.mkdir(parents=True, exist_ok=True)
    stem = stem.encode(errors="surrogateescape")[:MAX_FILE_NAME].decode(errors="ignore")
    Image.fromarray(prediction.network_input.numpy()).save(folder / f"{stem}.png")


def draw_digits(options: argparse.Namespace) -> None:
    """Serve the drawing page until Ctrl-C. Drawings are classified in the same way as images by `mnist predict`."""
    from mnist.data.images import read_image
    from mnist.inference.draw import serve
    from mnist.inference.predict import DIGITS, find_model
    from mnist.reporting.snapshots import picture

    model = _load_model(options)
    if model.config.preparation == "none":
        raise ConfigError(
            f"--model {options.model}: a {model.config.dataset} model takes only images of its own size, and a drawing"
            " is larger. Draw for a model of mnist or of a folder of images; `mnist predict` classifies images."
        )

    def described(prediction: "Prediction") -> dict[str, Any]:
        names = ("label", "probability", "confident", "box")
        image = "" if prediction.network_input is None else picture(prediction.network_input)
        return {name: getattr(prediction, name) for name in names} | {"network_input": image}

    def answer(drawing: bytes) -> dict[str, Any]:
        prediction = model.predict(read_image(drawing, "the drawing", model.config.scale))
        shares = prediction.probabilities
        return described(prediction) | {
            "probabilities": [shares[name] for name in model.class_names] if shares else [],
            "text": prediction.text,
            "digits": [described(digit) for digit in prediction.digits],
            "reason": prediction.reason,
        }

    title = f"{model.config.architecture} on {model.config.dataset}"
    if find_model(options.model) == DIGITS:
        title = "digits, the included model"
    numbers = model.config.preparation == "digit"
    serve(answer, model.class_names, title, options.host, options.port, numbers)


def _load_data(options: argparse.Namespace, model: "Model") -> "tuple[ImageData, Record | None]":
    """The dataset to test on, and the model's run, if any."""
    from mnist.config.settings import DataOptions, TrainConfig
    from mnist.data.datasets import SOURCES, load_dataset
    from mnist.data.folders import reasons
    from mnist.data.splits import FITS
    from mnist.runs.record import Record

    candidates = (Path(options.model), Path(options.model).parent)
    folder = next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)
    run = Record.read(folder) if folder else None
    if not options.dataset and not run and model.config.preparation in FITS:
        raise ConfigError(
            f"--model {options.model}: was trained on the folder {model.config.dataset}. Name a folder to test on with"
            " --dataset."
        )
    is_old = run is not None and "version" not in run.environment  # an early version, which read folders differently
    trained_on = run.config["dataset"] if run else model.config.dataset
    defaults = TrainConfig(dataset=options.dataset or trained_on)  # raises ConfigError for an unknown dataset
    dataset = defaults.dataset
    is_folder, is_same = dataset not in SOURCES, run is not None and dataset == trained_on
    data_dir, data_options, scale = defaults.data_dir, DataOptions(), None
    if run and (is_folder or is_same):
        data_dir = run.config["data_dir"]
    if run and is_same:
        kept = ("limit_test_images", "image_size", "fit", "test_fraction")
        data_options = DataOptions(**{name: run.config[name] for name in kept if name in run.config})
        if is_old and is_folder:  # the default size may have been different
            data_options = data_options._replace(image_size=model.config.image_size[0])
    elif is_folder:
        data_options = DataOptions(image_size=model.config.image_size[0], fit=model.config.fit, test_fraction=1)
        scale = model.config.scale
    # number a folder's classes as in the model, even if the folder has changed
    class_names, color = (model.class_names, model.config.channels == 3) if is_folder else (None, None)
    data = load_dataset(dataset, options.data_dir or data_dir, data_options, class_names, scale, color)
    shape, expected = tuple(data.test.images.shape[1:]), model.config.pixels
    if (len(data.class_names), shape) != (len(model.class_names), expected):
        raise ConfigError(
            f"--dataset {dataset}: has {len(data.class_names)} classes and images of {describe_shape(shape)}; the model"
            f" has {len(model.class_names)}, for images of {describe_shape(expected)}."
        )
    if data.skipped:
        print(f"{len(data.skipped):,} files skipped: {reasons(data.skipped)}", file=sys.stderr)
    if run and is_same and not is_old and data.checksum != run.environment.get("dataset_md5", data.checksum):
        print(printable_lines(f"{dataset}: its images have changed since the run."), file=sys.stderr)
    return data, run


def describe_shape(pixels: Sequence[int]) -> str:
    """`64 x 64 pixels in color`, from (height, width) or (height, width, 3)."""
    return f"{pixels[1]} x {pixels[0]} pixels in {'color' if len(pixels) == 3 else 'gray'}"


def evaluate_model(options: argparse.Namespace) -> None:
    """Print loss, accuracy, other figures and confusion matrix, computed as during the run."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from mnist.config.settings import TrainConfig
    from mnist.data.loader import build_loader
    from mnist.data.transforms import eval_batch_size, scale_pixels
    from mnist.inference.predict import load
    from mnist.launch.hardware import choose_kernels, choose_threads, eval_memory
    from mnist.reporting.snapshots import cut
    from mnist.training.evaluate import evaluate_split
    from mnist.training.losses import LOSSES

    model = load(options.model)
    with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):  # a line about decoding
        data, run = _load_data(options, model)
    settings = run.config if run else dataclasses.asdict(TrainConfig())
    precision = run.environment.get("precision", "float32") if run else "float32"
    accelerator = Accelerator(
        mixed_precision="no" if str(precision).startswith("float32") else precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    choose_kernels()
    choose_threads(model.net, scale_pixels(data.test.images[: settings["batch_size"]]))
    batch_size = eval_batch_size(data.test.images.shape[1:], eval_memory(accelerator.device))
    loader = accelerator.prepare(build_loader(data.test, batch_size))
    net = accelerator.prepare_model(model.net, evaluation_mode=True)
    result = evaluate_split(net, loader, LOSSES[settings["loss"]], accelerator)
    if options.json:
        print(json.dumps(_all_figures(result, data.name, data.class_names), indent=2))
        return
    figures = f"loss {result.loss:.4f}, accuracy {100 * result.accuracy:.2f} %"
    print(f"{printable(data.name)}, {result.images:,} test images: {figures}")
    spelled = {"macro_f1": "macro F1", "top5_accuracy": "top-5 accuracy"}
    others = {spelled.get(name, name.replace("_", " ")): 100 * value for name, value in result.figures().items()}
    print(", ".join(f"{name} {value:.2f} %" for name, value in others.items()))
    if run and (run.folder / "best").exists() and Path(options.model).resolve() == run.folder:
        print(printable(f"(weights with the lowest validation loss; for the last: --model {options.model}/model)"))
    table = cut(result.confusion, data.class_names)
    names = [printable(name)[:MAX_CLASS_NAME] for name in table["names"]]
    width, largest = max(len(name) for name in names), max(max(row) for row in table["counts"])
    cell = max(len(f"{largest}"), 4, min(width, 10))
    print(f"\n{'class':{width}}  accuracy  predicted as " + " ".join(f"{name[:cell]:>{cell}}" for name in names))
    for number, (name, row) in enumerate(zip(names, table["counts"], strict=True)):
        correct = row[number] - (table["within"] if number == len(names) - 1 else 0)
        share = f"{100 * correct / sum(row):.2f} %" if sum(row) else "-"
        print(f"{name:{width}}  {share:>8}               " + " ".join(f"{count:>{cell}}" for count in row))


def _all_figures(result: "Result", dataset: str, class_names: Sequence[str]) -> dict[str, Any]:
    """The content of `mnist evaluate --json`; a figure that is not defined is null."""
    from mnist.training.figures import per_class

    columns = per_class(result.confusion)
    values = [[value if value == value else None for value in column.tolist()] for column in columns]
    rows = zip(class_names, result.confusion.sum(dim=1).tolist(), *values, strict=True)
    return {
        "dataset": dataset,
        "images": result.images,
        "loss": result.loss,
        "accuracy": result.accuracy,
        **result.figures(),
        "classes": [dict(zip(("name", "images", *columns._fields), row, strict=True)) for row in rows],
        "confusion": result.confusion.tolist(),
    }


def export_model(options: argparse.Namespace) -> None:
    """Export the model and print how much its probabilities differ from the original's."""
    from mnist.inference.export import export_onnx
    from mnist.inference.predict import load

    model = load(options.model)
    with _written_to(options.output):
        data, run = _load_data(options, model)
        images = data.test.images[:CHECKED_IMAGES]
        path = options.output or (run.folder if run else Path()) / "model.onnx"
        found = export_onnx(model, path, images, options.prepared)
        size = f"  {path.stat().st_size / 1e6:.1f} MB" if path.is_file() else ""
        print(f"{printable_lines(str(path))}{size}, checked against the model on {len(images):,} test images:")
        print(f"  probabilities differ by at most {found.same_size:.1e}")
        if found.other_sizes is not None:
            print(f"  raw pixels of other sizes, on a few of them: by at most {found.other_sizes:.1e}")
        if model.config.scale is not None:
            low, high = model.config.scale
            print(f"  more than 8 bits per pixel: scale {low:,g} to 0 and {high:,g} to 255 before")


@contextlib.contextmanager
def _written_to(output: Path | None) -> Iterator[None]:
    """Turn write errors into messages about --output; if that is standard output, print to standard error instead."""
    if output is None:
        yield
        return
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder, not a file.")
    with contextlib.redirect_stdout(sys.stderr) if _is_stdout(output) else contextlib.nullcontext():
        try:
            yield
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written: {error.strerror}.") from error


def _is_stdout(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False


def inspect_folder(options: argparse.Namespace) -> None:
    """Print what the header of a run says about a folder, and write data.html."""
    from mnist.config.settings import TrainConfig
    from mnist.data.datasets import load_dataset
    from mnist.reporting.data_page import write_data_page

    folder = Path(options.folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: {'a file, not a folder of images' if folder.exists() else 'no such folder'}.")
    if not options.output.parent.is_dir():
        raise ConfigError(f"--output {options.output}: the folder {options.output.parent} does not exist.")
    config = TrainConfig(dataset=str(folder.resolve()), image_size=options.image_size, fit=options.fit)
    if options.data_dir:
        config = dataclasses.replace(config, data_dir=str(options.data_dir))
    with _written_to(options.output):
        data = load_dataset(config.dataset, config.data_dir, config.data_options)
        print(f"{printable(data.title)}, {len(data.train):,} training and {len(data.test):,} test images")
        for note in (*data.notes, *data.advice(config)):
            print(f"  {printable(note)}")
        write_data_page(data, options.output)
        print(printable_lines(str(options.output)))


def list_runs(options: argparse.Namespace) -> None:
    """Print name, recipe, epochs, test accuracy, time and state of each run, the newest last."""
    from mnist.reporting.report import duration, percent
    from mnist.runs.record import find_records

    records, problems = find_records(options.folder)
    for problem in problems:
        print(printable(problem), file=sys.stderr)
    if not records:
        raise ConfigError(f"{options.folder}: no runs in this folder. Start one: accelerate launch train.py")
    rows = [("run", "recipe", "epochs", "test accuracy", "time", "state")]
    for run in records:
        name, recipe, accuracy = printable(run.name), printable(run.config["recipe"]), run.last.get("test/accuracy")
        epochs = f"{run.last.get('epoch', 0)}/{run.epochs}"
        rows.append((name, recipe, epochs, percent(accuracy), duration(run.seconds), run.status))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, recipe, epochs, accuracy, seconds, status in rows:
        cells = (name.ljust(widths[0]), recipe.ljust(widths[1]), epochs.rjust(widths[2]))
        print("  ".join((*cells, accuracy.rjust(widths[3]), seconds.rjust(widths[4]), status)))


def write_report(options: argparse.Namespace) -> None:
    """Write the HTML report of one run or several. A single run's default report also updates its figures."""
    from mnist.reporting import report
    from mnist.runs.record import Record

    records = [Record.read(folder) for folder in options.runs]
    output = options.output
    if len(records) == 1 and output is None:
        output = options.runs[0] / "report.html"
        report.write_pictures(records[0])
    output = output or Path("comparison.html")
    with _written_to(output):
        report.write_report(records, output)
        print(printable_lines(str(output)))


def verify_machine(options: argparse.Namespace) -> int:
    """Print a row per check, and save them as JSON. Returns 1 if a check failed."""
    import tempfile
    import time

    from mnist.config.command_line import parse_command_line
    from mnist.config.recipes import RECIPES
    from mnist.config.settings import PROJECT_FOLDER
    from mnist.launch.environment import describe_code

    config = parse_command_line(RECIPES, options.flags)
    if not (PROJECT_FOLDER / "train.py").is_file():
        raise ConfigError("mnist verify needs train.py. Run it in a clone of the repository.")
    if options.processes < 1:
        raise ConfigError(f"--processes {options.processes}: must be at least 1.")
    from mnist.runs.launched import LaunchedRuns
    from mnist.verify import verify

    parent, rows, started = Path(config.output_dir), [], time.time()
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        at_sigterm = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so the runs end and their folder goes
        stack.callback(signal.signal, signal.SIGTERM, at_sigterm)
        stack.enter_context(_written_to(options.output))
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".verify-"))
        print(f"{shlex.join(['train.py', *options.flags])}, processes: {options.processes}. Takes two to four minutes.")
        for title, group in verify(LaunchedRuns(config, options.processes, Path(folder))):
            print(f"\n{title}", flush=True)
            for row in group:
                rows.append(row)
                figure = f"{row.figure} (limit {row.limit})" if row.limit else row.figure
                print(f"  {row.result.upper() if row.result == 'fail' else row.result:<12}  {row.check:<48}  {figure}")
                if row.note:
                    print(f"  {'':<12}  {row.note}")
        if options.output:
            result = describe_code() | {"time": started, "flags": options.flags, "processes": options.processes}
            result |= {"rows": [row._asdict() for row in rows]}
            write_file(options.output, json.dumps(result, indent=2) + "\n")
    counts = Counter(row.result for row in rows)
    print(f"\n{counts['pass']} passed, {counts['fail']} failed, {counts['not possible']} not possible here")
    return int(counts["fail"] > 0)
