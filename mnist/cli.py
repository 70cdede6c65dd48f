"""The `mnist` command: inspect, apply and export finished runs.

mnist predict seven.png photos/               # what is written there
mnist draw                                    # a page in the browser, on which to draw a digit
mnist evaluate --model runs/latest            # the test images once more
mnist export --model runs/latest              # runs/latest/model.onnx, checked against the original
mnist runs                                    # a table of those in runs/
mnist report runs/latest                      # its report once more: runs/latest/report.html
mnist report runs/a runs/b --output ab.html   # two side by side
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist.errors import UserError
from mnist.launch.streams import keep_output, printable_lines

if TYPE_CHECKING:
    from mnist.data.splits import ImageData
    from mnist.inference.predict import Model, Prediction
    from mnist.runs.record import Record

FIGURES = (".png", ".jpg", ".pdf", ".svg")
MOST_LETTERS = 24  # of a class's name in a table
LONGEST_NAME = 240  # bytes of a file's name
MOST_DRAWN = 40  # images and answers in one figure
TRAINING = "Training starts in a checkout of the project: accelerate launch train.py"
CHECKED_IMAGES = 1000  # of the test images, on which an exported model is compared with its original


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each function below."""
    parser = argparse.ArgumentParser(
        prog="mnist", description="Inspect, apply and export finished runs.", epilog=TRAINING
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="what a trained model sees in images")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, or - for the standard input")
    _add_model(predict)
    predict.add_argument("--top", type=int, default=3, metavar="N", help="likeliest classes to show (default: 3)")
    predict.add_argument("--json", action="store_true", help="an array of objects instead of rows")
    predict.add_argument("--save", type=Path, metavar="FILE", help="draw images and answers into a picture")
    predict.add_argument(
        "--show-input", type=Path, metavar="FOLDER", help="write what the network saw of each image into a folder"
    )
    predict.set_defaults(do=predict_images)

    draw = commands.add_parser("draw", help="a page in the browser, on which to draw a digit")
    _add_model(draw)
    draw.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    draw.add_argument("--port", type=int, default=7860, help="default: 7860")
    draw.set_defaults(do=draw_digits)

    evaluate = commands.add_parser("evaluate", help="loss, accuracy and confusion of a model on test images")
    _add_model(evaluate)
    _add_dataset(evaluate)
    evaluate.set_defaults(do=evaluate_model)

    export = commands.add_parser("export", help="a model as a file for other programs, checked against the original")
    _add_model(export)
    export.add_argument("--format", choices=["onnx"], default="onnx", help="default: onnx")
    export.add_argument(
        "--output", type=Path, metavar="FILE", help="default: model.onnx in the run's folder, or here for other models"
    )
    _add_dataset(export)
    export.set_defaults(do=export_model)

    runs = commands.add_parser("runs", help="a table of the runs in a folder")
    runs.add_argument("folder", nargs="?", default="runs", type=Path, metavar="FOLDER", help="default: runs")
    runs.set_defaults(do=list_runs)

    report = commands.add_parser("report", help="the report of a run, or of several side by side")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, as runs/latest")
    report.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the file to write; default: report.html in the run's folder, or comparison.html here for several",
    )
    report.set_defaults(do=write_report)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 0, 1 for what failed, 2 for wrong usage."""
    keep_output(["stderr"])
    if sys.stdout is None:  # it was closed
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)
    options = build_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a letter of a name shows it as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        exit_code = int(options.do(options) or 0)
        sys.stdout.flush()
        return exit_code
    except UserError as error:
        print(printable_lines(f"mnist {options.command}: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere, and says nothing
        return 1
    except OSError as error:
        print(printable_lines(f"mnist {options.command}: {error}"), file=sys.stderr)
        return 1


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="runs/latest",
        help="a run, a model/ folder, or user/name on the Hugging Face Hub (default: runs/latest)",
    )


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", metavar="NAME", help="images to test on (default: what the model was trained on)")
    parser.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="default: that of the run for a folder of images, else data/"
    )


def predict_images(options: argparse.Namespace) -> int:
    """A row, or an object, an image; images that cannot be read are named, skipped, and make the exit code 1."""
    from mnist.data.images import MOST_BYTES, find_images, read_image
    from mnist.errors import ConfigError, ImageError
    from mnist.inference.predict import load
    from mnist.launch.streams import printable

    if options.top < 1:
        raise ConfigError(f"--top {options.top}: must be at least 1.")
    if "" in options.images:
        raise ConfigError("IMAGE '': an empty name.")
    if options.save and options.save.suffix.lower() not in FIGURES:
        raise ConfigError(f"--save {options.save}: no kind of picture. Its name may end in {', '.join(FIGURES)}.")
    if options.save and not options.save.parent.is_dir():
        raise ConfigError(f"--save {options.save}: the folder {options.save.parent} is not there.")
    if options.show_input and options.show_input.exists() and not options.show_input.is_dir():
        raise ConfigError(f"--show-input {options.show_input}: a file, where a folder is needed.")
    model = load(options.model)
    sources: dict[str, Path | bytes] = {}
    for path in find_images([Path(word) for word in options.images if word != "-"]):
        sources[str(path)] = path
    if "-" in options.images:
        if sys.stdin is None:
            raise ConfigError("IMAGE -: the standard input is closed.")
        sources["-"] = sys.stdin.buffer.read(MOST_BYTES + 1)  # which may never end
    if not sources:
        raise ConfigError(f"{', '.join(options.images)}: no images are in there.")
    width = max(len(printable(name)) for name in sources)
    rows: list[dict[str, Any]] = []
    drawn: list[tuple[str, Any, Prediction]] = []
    for name, source in sources.items():
        try:
            picture = read_image(source, name, model.config.scale)
            found = model.predict(picture)
        except ImageError as error:
            print(f"mnist predict: {error}", file=sys.stderr)
            continue
        top = [{"label": label, "probability": p} for label, p in list(found.probabilities.items())[: options.top]]
        rows.append({"file": name, "label": found.label, "probability": found.probability, "top": top})
        if not options.json:
            print(f"{printable(name):{width}}  {in_words(top)}")
        if options.show_input and found.seen is not None:
            write_input(options.show_input, f"{len(rows):03}-{'stdin' if name == '-' else Path(name).stem}", found)
        if options.save and len(drawn) < MOST_DRAWN:
            picture.thumbnail((400, 400))
            drawn.append((printable(name), picture, found))
    if options.json:
        print(json.dumps(rows, indent=2))
    if drawn:
        from mnist.reporting.plots import write_answers

        write_answers(drawn, options.save)
        if len(drawn) < len(rows):
            print(printable(f"{options.save}: the first {len(drawn)} of {len(rows):,} images"), file=sys.stderr)
    return 1 if len(rows) < len(sources) else 0


def in_words(top: Sequence[dict[str, Any]]) -> str:
    """`7   98.2 %  then 1 0.9 %, 9 0.4 %`, of the likeliest classes."""
    if not top:
        return "no digit found"
    words = f"{top[0]['label']}  {100 * top[0]['probability']:5.1f} %"
    others = ", ".join(f"{it['label']} {100 * it['probability']:.1f} %" for it in top[1:])
    return f"{words}  then {others}" if others else words


def write_input(folder: Path, name: str, found: "Prediction") -> None:
    """What the network saw, as a PNG."""
    from PIL import Image

    assert found.seen is not None
    folder.mkdir(parents=True, exist_ok=True)
    cut = name.encode(errors="surrogateescape")[:LONGEST_NAME].decode(errors="ignore")  # where a name ends at 255 bytes
    Image.fromarray(found.seen.numpy()).save(folder / f"{cut}.png")


def draw_digits(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C; its drawings are prepared and answered as images are by `mnist predict`."""
    from mnist.data.images import read_image
    from mnist.inference.draw import serve
    from mnist.inference.predict import load
    from mnist.reporting.snapshots import picture

    model = load(options.model)

    def answer(drawing: bytes) -> dict[str, Any]:
        found = model.predict(read_image(drawing, "the drawing", model.config.scale))
        return {
            "label": found.label,
            "probability": found.probability,
            "probabilities": [found.probabilities.get(name, 0.0) for name in model.class_names],
            "seen": "" if found.seen is None else picture(found.seen),
        }

    title = f"{model.config.architecture} on {model.config.dataset}"
    serve(answer, model.class_names, title, options.host, options.port)


def _load_data(options: argparse.Namespace, model: "Model") -> "tuple[ImageData, Record | None]":
    """The data set to test on, and the run of the model, if there is one."""
    from mnist.config.settings import DataOptions, TrainConfig
    from mnist.data.datasets import SOURCES, load_dataset
    from mnist.errors import ConfigError
    from mnist.runs.record import Record

    folder = next((it for it in (Path(options.model), Path(options.model).parent) if is_run(it)), None)
    run = Record.read(folder) if folder else None
    if not options.dataset and not run and model.config.preparation == "fit":
        raise ConfigError(
            f"--model {options.model}: was trained on the folder {model.config.dataset}. Name one to test on: --dataset"
        )
    is_old = run is not None and "version" not in run.environment  # made before folders were read as they are now
    of_run = run.config["dataset"] if run else model.config.dataset
    defaults = TrainConfig(dataset=options.dataset or of_run)  # raises ConfigError for what is none
    dataset, of_model = defaults.dataset, model.config
    is_folder = dataset not in SOURCES
    data_dir, data_options, scale = defaults.data_dir, DataOptions(), None
    if run and (is_folder or dataset == of_run):
        data_dir = run.config["data_dir"]
    if run and dataset == of_run:
        kept = ("limit_test_images", "image_size", "test_fraction")
        data_options = DataOptions(**{name: run.config[name] for name in kept})
        if is_old and is_folder:  # it may have had another default size
            data_options = data_options._replace(image_size=of_model.image_size[0])
    elif is_folder:
        data_options, scale = DataOptions(image_size=of_model.image_size[0], test_fraction=1), of_model.scale
    # the classes of a folder have the numbers that the model gave them, whatever is there now
    class_names = model.class_names if is_folder else None
    data = load_dataset(dataset, options.data_dir or data_dir, data_options, class_names, scale)
    shape, wanted = tuple(data.test.images.shape[1:]), model.config.pixels
    if (len(data.class_names), shape) != (len(model.class_names), wanted):
        raise ConfigError(
            f"--dataset {dataset}: has {len(data.class_names)} classes and images of {shape_in_words(shape)}; the model"
            f" has {len(model.class_names)}, for images of {shape_in_words(wanted)}."
        )
    if run and dataset == of_run and not is_old and data.checksum != run.environment.get("dataset_md5", data.checksum):
        print(printable_lines(f"{dataset}: its images are others than when the run was made."), file=sys.stderr)
    return data, run


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def shape_in_words(pixels: Sequence[int]) -> str:
    """`64 x 64 pixels in colour`, for height, width and, in colour, 3."""
    return f"{pixels[1]} x {pixels[0]} pixels in {'colour' if len(pixels) == 3 else 'grey'}"


def evaluate_model(options: argparse.Namespace) -> None:
    """The figures of a model on test images, as a run has them."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from mnist.config.settings import TrainConfig
    from mnist.data.loader import build_loader
    from mnist.data.transforms import eval_batch_size, scale_pixels
    from mnist.inference.predict import load
    from mnist.launch.hardware import choose_threads
    from mnist.launch.streams import printable
    from mnist.reporting.snapshots import cut
    from mnist.training.evaluate import evaluate_split
    from mnist.training.losses import LOSSES

    model = load(options.model)
    data, run = _load_data(options, model)
    settings = run.config if run else dataclasses.asdict(TrainConfig())
    precision = run.environment.get("precision", "float32") if run else "float32"
    accelerator = Accelerator(
        mixed_precision="no" if precision == "float32" else precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    choose_threads(model.net, scale_pixels(data.test.images[: settings["batch_size"]]))
    loader = accelerator.prepare(build_loader(data.test, eval_batch_size(data.test.images.shape[1:])))
    net = accelerator.prepare_model(model.net, evaluation_mode=True)
    result = evaluate_split(net, loader, LOSSES[settings["loss"]], accelerator)
    figures = f"loss {result.loss:.4f}, accuracy {100 * result.accuracy:.2f} %"
    print(f"{printable(data.name)}, {result.images:,} test images: {figures}")
    if run and (run.folder / "best").exists() and Path(options.model).resolve() == run.folder:
        print(printable(f"(the best weights by validation loss; the last ones: --model {options.model}/model)"))
    table = cut(result.confusion, data.class_names)
    names = [printable(name)[:MOST_LETTERS] for name in table["names"]]
    width, most = max(len(name) for name in names), max(max(row) for row in table["counts"])
    cell = max(len(f"{most}"), 4, min(width, 10))
    print(f"\n{'class':{width}}  accuracy  taken for " + " ".join(f"{name[:cell]:>{cell}}" for name in names))
    for number, (name, row) in enumerate(zip(names, table["counts"], strict=True)):
        right = row[number] - (table["within"] if number == len(names) - 1 else 0)
        share = f"{100 * right / sum(row):.2f} %" if sum(row) else "-"
        print(f"{name:{width}}  {share:>8}            " + " ".join(f"{count:>{cell}}" for count in row))


def export_model(options: argparse.Namespace) -> None:
    """Write the file, and say how far its answers to the first test images are from the original's."""
    from mnist.inference.export import export_onnx
    from mnist.inference.predict import load

    model = load(options.model)
    with _written_to(options.output):
        data, run = _load_data(options, model)
        images = data.test.images[:CHECKED_IMAGES]
        path = options.output or (run.folder if run else Path()) / "model.onnx"
        difference = export_onnx(model, path, images)
        size = f"  {path.stat().st_size / 1e6:.1f} MB" if path.is_file() else ""
        print(f"{printable_lines(str(path))}{size}, checked against the model on {len(images):,} test images:")
        print(f"  probabilities differ by {difference:.1e} at most")


@contextlib.contextmanager
def _written_to(output: Path | None) -> Iterator[None]:
    """While a file is made that --output names: what is said goes elsewhere if it is the standard output itself."""
    from mnist.errors import ConfigError

    if output is None:
        yield
        return
    if output.is_dir():
        raise ConfigError(f"--output {output}: a folder, where a file is needed.")
    is_stdout = output.exists() and _is_stdout(output)
    with contextlib.redirect_stdout(sys.stderr) if is_stdout else contextlib.nullcontext():
        try:
            yield
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written: {error.strerror}.") from error


def _is_stdout(path: Path) -> bool:
    """Whether a path leads to the standard output."""
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False


def list_runs(options: argparse.Namespace) -> None:
    """Name, recipe, epochs, test accuracy, time and state of each run, the newest last."""
    from mnist.errors import ConfigError
    from mnist.launch.streams import printable
    from mnist.reporting.report import duration, percent
    from mnist.runs.record import find_records

    records, problems = find_records(options.folder)
    for problem in problems:
        print(printable(problem), file=sys.stderr)
    if not records:
        raise ConfigError(f"{options.folder}: no runs are in this folder. `accelerate launch train.py` makes one.")
    rows = [("run", "recipe", "epochs", "test accuracy", "time", "state")]
    for it in records:
        accuracy = percent(it.last.get("test/accuracy"))
        epochs = f"{it.last.get('epoch', 0)}/{it.config['epochs']}"
        rows.append(
            (printable(it.name), printable(it.config["recipe"]), epochs, accuracy, duration(it.seconds), it.status)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, recipe, epochs, accuracy, seconds, status in rows:
        cells = (name.ljust(widths[0]), recipe.ljust(widths[1]), epochs.rjust(widths[2]))
        print("  ".join((*cells, accuracy.rjust(widths[3]), seconds.rjust(widths[4]), status)))


def write_report(options: argparse.Namespace) -> None:
    """Write the report, with its pictures beside it where it is that of one run in its folder."""
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
