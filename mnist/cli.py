"""The `mnist` command: what is done with runs that there are.

mnist predict seven.png photos/               # what is written there
mnist draw                                    # a page in the browser, on which to draw a digit
mnist evaluate --model runs/latest            # the test images once more
mnist runs                                    # a table of those in runs/
mnist report runs/latest                      # its report once more: runs/latest/report.html
mnist report runs/a runs/b --output ab.html   # two side by side
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 0, 1 for what failed, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="mnist", description="What is done with runs that there are.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="what a trained model sees in images")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, or - for the standard input")
    _add_model(predict)
    predict.add_argument("--top", type=int, default=3, metavar="N", help="likeliest classes to show (default: 3)")
    predict.add_argument("--json", action="store_true", help="an array of objects instead of rows")
    predict.add_argument("--save", type=Path, metavar="FILE", help="draw images and answers into a PNG")
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
    evaluate.add_argument("--dataset", metavar="NAME", help="default: what the model was trained on")
    evaluate.add_argument("--data-dir", type=Path, metavar="FOLDER", help="default: that of the run, or data/")
    evaluate.set_defaults(do=evaluate_model)

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

    options = parser.parse_args(arguments)
    try:
        return int(options.do(options) or 0)
    except UserError as error:
        print(f"mnist {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"mnist {options.command}: {error}", file=sys.stderr)
        return 1


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="runs/latest",
        help="a run, a model/ folder, or user/name on the Hugging Face Hub (default: runs/latest)",
    )


def predict_images(options: argparse.Namespace) -> int:
    """A row, or an object, an image; images that cannot be read are named, skipped, and make the exit code 1."""
    from PIL import Image

    from mnist.errors import ConfigError, ImageError
    from mnist.images import find_images, read_image
    from mnist.predict import load

    model = load(options.model)
    paths = [Path(word) for word in options.images if word != "-"]
    sources: list[tuple[str, Any]] = [(str(path), path) for path in find_images(paths)]
    if not sources and "-" not in options.images:
        raise ConfigError(f"{', '.join(options.images)}: no images are in there.")
    if "-" in options.images:
        sources.append(("-", sys.stdin.buffer.read()))
    names, pictures, failed = [], [], 0
    for name, source in sources:
        try:
            pictures.append(read_image(source, name))
            names.append(name)
        except ImageError as error:
            print(f"mnist predict: {error}", file=sys.stderr)
            failed += 1
    answers = model.predict(pictures)
    if options.json:
        rows = [
            {
                "file": name,
                "label": it.label,
                "probability": it.probability,
                "top": [{"label": k, "probability": v} for k, v in list(it.probabilities.items())[: options.top]],
            }
            for name, it in zip(names, answers, strict=True)
        ]
        print(json.dumps(rows, indent=2))
    else:
        width = max((len(name) for name in names), default=0)
        for name, it in zip(names, answers, strict=True):
            others = [
                f"{label} {100 * value:.1f} %" for label, value in list(it.probabilities.items())[1 : options.top]
            ]
            found = f"{it.label}  {100 * it.probability:5.1f} %" if it.label is not None else "no digit found"
            print("  ".join([name.ljust(width), found, *([f"then {', '.join(others)}"] if others else [])]))
    if options.show_input:
        options.show_input.mkdir(parents=True, exist_ok=True)
        for number, (name, it) in enumerate(zip(names, answers, strict=True), start=1):
            if it.seen is not None:
                Image.fromarray(it.seen.numpy()).save(
                    options.show_input / f"{number:03}-{'stdin' if name == '-' else Path(name).stem}.png"
                )
    if options.save:
        from mnist.pictures import answers as draw_answers
        from mnist.pictures import drawing

        with drawing():
            draw_answers(names, pictures, answers).savefig(options.save)
    return 1 if failed else 0


def draw_digits(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C; its drawings are prepared and answered as images are by `mnist predict`."""
    from mnist.draw import serve
    from mnist.evaluation import picture
    from mnist.images import read_image
    from mnist.predict import load

    model = load(options.model)

    def answer(drawing: bytes) -> dict[str, Any]:
        found = model.predict(read_image(drawing, "the drawing"))
        return {
            "label": found.label,
            "probability": found.probability,
            "probabilities": [found.probabilities.get(name, 0.0) for name in model.class_names],
            "seen": "" if found.seen is None else picture(found.seen),
        }

    title = f"{model.config.architecture} on {model.config.dataset}"
    serve(answer, model.class_names, title, options.host, options.port)


def evaluate_model(options: argparse.Namespace) -> None:
    """The figures of a model on test images, as a run has them."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from mnist.config import CHOICES, PROJECT_FOLDER, check_choice
    from mnist.data import build_batches, load_dataset
    from mnist.errors import ConfigError
    from mnist.hardware import choose_threads
    from mnist.metrics import evaluate
    from mnist.optim import LOSSES
    from mnist.predict import load
    from mnist.record import Record
    from mnist.transforms import scale_pixels

    model = load(options.model)
    run = next((it for it in (Path(options.model), Path(options.model).parent) if (it / "config.yaml").is_file()), None)
    settings: dict[str, Any] = (
        Record.read(run).config if run else {"loss": "nll", "limit_test_images": None, "batch_size": 10}
    )
    dataset = options.dataset or model.config.dataset
    check_choice("dataset", dataset, CHOICES["dataset"])
    data_dir = options.data_dir or settings.get("data_dir", PROJECT_FOLDER / "data")
    same = run is not None and dataset == settings["dataset"]
    data = load_dataset(dataset, data_dir, limit_test_images=settings["limit_test_images"] if same else None)
    if len(data.class_names) != len(model.class_names):
        raise ConfigError(
            f"--dataset {dataset}: has {len(data.class_names)} classes, the model {len(model.class_names)}."
        )
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    choose_threads(model.net, scale_pixels(data.test.images[: settings["batch_size"]]))
    batches = accelerator.prepare(build_batches(data.test, 500))
    net = accelerator.prepare_model(model.net, evaluation_mode=True)
    result = evaluate(net, batches, LOSSES[settings["loss"]], accelerator)
    print(f"{dataset}, {result.images:,} test images: loss {result.loss:.4f}, accuracy {100 * result.accuracy:.2f} %\n")
    width = max(len(name) for name in data.class_names)
    cell = max(len(f"{int(result.confusion.max())}"), 4)
    print(f"{'class':{width}}  accuracy  taken for " + " ".join(f"{name[:cell]:>{cell}}" for name in data.class_names))
    for number, name in enumerate(data.class_names):
        row = result.confusion[number]
        share = f"{100 * int(row[number]) / max(1, int(row.sum())):.2f} %"
        print(f"{name:{width}}  {share:>8}            " + " ".join(f"{int(count):>{cell}}" for count in row))


def list_runs(options: argparse.Namespace) -> None:
    """Name, recipe, epochs, test accuracy, time and state of each run, the newest last."""
    from mnist.errors import ConfigError
    from mnist.record import find_records
    from mnist.report import duration, percent

    records, problems = find_records(options.folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not records:
        raise ConfigError(f"{options.folder}: no runs are in this folder. `accelerate launch train.py` makes one.")
    rows = [("run", "recipe", "epochs", "test accuracy", "time", "state")]
    for it in records:
        accuracy = percent(it.last.get("test/accuracy"))
        epochs = f"{it.last.get('epoch', 0)}/{it.config['epochs']}"
        rows.append((it.name, it.config["recipe"], epochs, accuracy, duration(it.seconds), it.status))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, recipe, epochs, accuracy, seconds, status in rows:
        cells = (name.ljust(widths[0]), recipe.ljust(widths[1]), epochs.rjust(widths[2]))
        print("  ".join((*cells, accuracy.rjust(widths[3]), seconds.rjust(widths[4]), status)))


def write_report(options: argparse.Namespace) -> None:
    """Write the report, with its pictures beside it where it is that of one run in its folder."""
    from mnist import report
    from mnist.record import Record

    records = [Record.read(folder) for folder in options.runs]
    output = options.output
    if len(records) == 1 and output is None:
        output = options.runs[0] / "report.html"
        report.write_pictures(records[0])
    output = output or Path("comparison.html")
    report.write_report(records, output)
    print(output)


if __name__ == "__main__":
    sys.exit(main())
