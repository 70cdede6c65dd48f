"""The `mnist` command: what is done with runs that there are.

mnist runs                                    # a table of those in runs/
mnist report runs/latest                      # its report once more: runs/latest/report.html
mnist report runs/a runs/b --output ab.html   # two side by side
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mnist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: 0, 1 for what failed, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="mnist", description="What is done with runs that there are.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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
        options.do(options)
    except UserError as error:
        print(f"mnist {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"mnist {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def list_runs(options: argparse.Namespace) -> None:
    """Name, recipe, epochs, test accuracy, time and state of each run, the newest last; the best is marked."""
    from mnist.errors import ConfigError
    from mnist.record import find_records
    from mnist.report import duration, percent

    records, problems = find_records(options.folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not records:
        raise ConfigError(f"{options.folder}: no runs are in this folder. `accelerate launch train.py` makes one.")
    best = max((it.last["test/accuracy"] for it in records if it.last), default=None)
    rows = [("run", "recipe", "epochs", "test accuracy", "time", "state")]
    for it in records:
        accuracy = it.last.get("test/accuracy")
        mark = " *" if accuracy is not None and accuracy == best and len(records) > 1 else "  "
        epochs = f"{it.last.get('epoch', 0)}/{it.config['epochs']}"
        rows.append((it.name, it.config["recipe"], epochs, percent(accuracy) + mark, duration(it.seconds), it.status))
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
