"""The report, its plots, and the commands `mnist runs` and `mnist report`."""

import base64
import contextlib
import copy
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mnist.cli import main
from mnist.config.settings import PROJECT_FOLDER, TrainConfig
from mnist.errors import ConfigError, DivergedError
from mnist.reporting import plots
from mnist.reporting.report import LiveReport, render, write_pictures, write_report
from mnist.reporting.snapshots import OTHERS, cut
from mnist.runs.record import Record, downsample, pixels
from tests.conftest import RunHere, user_environment
from tests.support.made_up import make_run

MEDIA_BYTES = 2_000_000  # for the report and the plots of a run
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title='owned'</script> & \"'$\\frac{"


class Reading(HTMLParser):
    """The tags and visible words of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def numbers_in(page: str) -> list[dict[str, Any]]:
    """The JSON in a report."""
    found = re.search(r'<script type="application/json" id="metrics">(.*?)</script>', page, re.DOTALL)
    assert found
    numbers: list[dict[str, Any]] = json.loads(found[1])
    return numbers


def test_a_large_confusion_matrix_keeps_the_most_confused_classes_and_its_sum() -> None:
    counts = torch.eye(1000, dtype=torch.long) * 5
    counts[7, 900] = 40
    counts[3, 4] = 2
    small = cut(counts, [f"class {number}" for number in range(1000)])
    assert len(small["names"]) == 20
    assert {"class 3", "class 4", "class 7", "class 900", OTHERS} <= set(small["names"])
    assert sum(map(sum, small["counts"])) == counts.sum()
    assert sum(small["counts"][number][number] for number in range(20)) == counts.trace() + small["within"]
    row, column = small["names"].index("class 7"), small["names"].index("class 900")
    assert small["counts"][row][column] == 40


@pytest.mark.parametrize(("classes", "epochs"), [(1000, 3), pytest.param(10, 100, marks=pytest.mark.slow)])
def test_the_report_and_the_plots_of_a_run_stay_small(classes: int, epochs: int, tmp_path: Path) -> None:
    record = make_run(tmp_path / "run", classes, epochs)
    LiveReport(record.folder).write()
    drawn = [*record.folder.glob("*.png"), record.folder / "report.html", record.folder / "evaluation.json"]
    assert len(drawn) == 6
    assert sum(path.stat().st_size for path in drawn) < MEDIA_BYTES


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A run with hostile names, and its report."""
    names = (HOSTILE, *(f"{HOSTILE} {number}" for number in range(9)))
    record = make_run(tmp_path_factory.mktemp("hostile") / HOSTILE.replace("/", "|"), names=names)
    LiveReport(record.folder).write()
    return record


def test_hostile_names_are_escaped_in_reports_and_harmless_in_plots(hostile: Record) -> None:
    report = (hostile.folder / "report.html").read_text()
    for page in (report, render([hostile, hostile])):
        tags = Reading(page).tags
        scripts = [attributes for tag, attributes in tags if tag == "script"]
        assert scripts == [{"type": "application/json", "id": "metrics"}]
        assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
        assert page.count("<script") == 1
        assert numbers_in(page)[0]["name"] == hostile.name
    assert HOSTILE.split()[0] in Reading(report).text


def test_a_comparison_shows_the_differences_and_marks_the_best(tmp_path: Path) -> None:
    records = [make_run(tmp_path / name, epochs=epochs) for name, epochs in (("short", 2), ("long", 4))]
    page = render(records)
    text = Reading(page).text
    assert "Comparison of 2 runs" in text
    assert "epochs 2 4" in text  # the one setting in which they differ
    assert "batch_size" not in text
    best = [attributes for tag, attributes in Reading(page).tags if "best" in (attributes.get("class") or "").split()]
    assert len(best) == 2  # test loss and test accuracy
    assert [it["name"] for it in numbers_in(page)] == ["short", "long"]


def test_a_run_that_has_just_started_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text(TrainConfig().to_yaml())
    record = Record.read(tmp_path / "new")
    write_report([record], tmp_path / "report.html")
    assert "new" in Reading((tmp_path / "report.html").read_text()).text


def test_during_training_the_report_is_rewritten_if_that_takes_little_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_run(tmp_path / "run")
    report = LiveReport(record.folder)
    report.after_epoch()
    assert not (record.folder / "report.html").exists()  # too early
    monkeypatch.setattr(report, "written_at", report.written_at - report.cost / report.SHARE_OF_TIME)
    report.after_epoch()
    assert (record.folder / "report.html").exists()


def test_plots_depend_on_the_metrics_alone(tmp_path: Path) -> None:
    drawn = []
    for place, epochs in (("a", 3), ("b", 3), ("c", 4)):
        record = make_run(tmp_path / place / "run", epochs=epochs)
        write_pictures(record)
        drawn.append({path.name: path.read_bytes() for path in record.folder.glob("*.png")})
    same, again, other = drawn
    assert same.keys() == {f"{name}.png" for name in ("curves", "confusion", "mistakes", "prediction")}
    for name in same:
        assert same[name] == again[name]
        if name != "mistakes.png":  # the same images in all
            assert same[name] != other[name], name
        with Image.open(io.BytesIO(same[name])) as picture:
            assert min(picture.size) > 400


def test_a_report_that_fails_is_a_warning(
    run_here: RunHere, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down(_: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(plots, "curves", break_down)
    folder = run_here("x", report=True)
    assert Record.read(folder).status == "finished"
    assert "report.html could not be written (RuntimeError: no ink)." in capsys.readouterr().out


def test_a_failed_run_has_a_report_with_the_error(run_here: RunHere, tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        run_here("x", report=True, optimizer="sgd", learning_rate=1e30, log_every=5)
    text = Reading((tmp_path / "runs" / "x" / "report.html").read_text()).text
    assert " failed" in text
    assert "training has diverged" in text


def test_mnist_runs_lists_the_runs_with_their_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = make_run(tmp_path / "good")
    make_run(tmp_path / "gone")
    (tmp_path / "gone" / "state.json").write_text(json.dumps({"status": "running", "process": "999999999 on nowhere"}))
    (tmp_path / "latest").symlink_to("good")
    (tmp_path / "no run").mkdir()
    make_run(tmp_path / "broken")
    (tmp_path / "broken" / "state.json").write_text("{")
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert f"{tmp_path}/broken: a file of this run is invalid" in printed.err
    lines = printed.out.splitlines()
    assert len(lines) == 1 + 2
    assert lines[0].split() == ["run", "recipe", "epochs", "test", "accuracy", "time", "state"]
    (line,) = (line for line in lines if line.startswith("good"))
    assert f"{100 * record.last['test/accuracy']:.2f} %" in line
    assert line.split()[1:3] == ["tutorial", "3/3"]
    assert line.split()[-1] == "finished"


ODD: tuple[Any, ...] = (None, -1, 10**30, 10**400, math.nan, math.inf, "\x1b[2J", ["x"], {"a": 1})


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values in `value`, itself first; of lists only the first element."""
    yield place
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, it in inner:
        yield from places(it, (*place, key))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a path; without it, if that is `...`."""
    if not place:
        return new
    copied = container = copy.deepcopy(value)
    for key in place[:-1]:
        container = container[key]
    if new is ...:
        del container[place[-1]]
    else:
        container[place[-1]] = new
    return copied


FILES = ("config.yaml", "state.json", "environment.json", "evaluation.json", "metrics.jsonl")


def odd_contents(path: Path) -> list[str]:
    """Broken contents of a file of a run, each with one change."""
    if path.name == "environment.json":
        path.write_text(json.dumps({"device": "cpu", "parameters": 5, "threads": 1, "torch": "2"}))
    text = path.read_text()
    is_lines = path.name == "metrics.jsonl"
    known = [json.loads(line) for line in text.splitlines()] if is_lines else yaml.safe_load(text)
    contents = ["", "\0", "[" * 100_000, "\x1b[2J", text[: len(text) // 2]]
    for place in places(known):
        for new in (*ODD, ...):
            if place or new is not ...:
                value = changed(known, place, new)
                lines = value if is_lines and isinstance(value, list) else [value]
                text = "".join(json.dumps(line) + "\n" for line in lines)
                contents.append(text.replace("Infinity", "1e999") if new == math.inf else text)  # which JSON has
    assert len(contents) > 30
    return contents


@pytest.mark.parametrize("name", FILES)
def test_a_broken_run_file_hides_no_other_run_and_prints_no_control_characters(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "good", classes=3, epochs=1)
    (tmp_path / "good" / "config.yaml").write_text("recipe: tutorial\nepochs: 1\ndataset: mnist\nmodel: mlp\n")
    path = make_run(tmp_path / "odd", classes=3, epochs=1).folder / name
    for content in odd_contents(path):
        path.write_text(content)
        assert main(["runs", str(tmp_path)]) == 0, content
        printed = capsys.readouterr()
        assert sum(line.startswith("good ") for line in printed.out.splitlines()) == 1
        assert any(line.startswith("odd ") for line in printed.out.splitlines()) or "odd" in printed.err, content
        assert "\x1b" not in printed.out + printed.err
        assert len(printed.err.splitlines()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_broken_run_file_is_refused_or_its_report_written(name: str, tmp_path: Path) -> None:
    path = make_run(tmp_path / "odd", classes=3, epochs=2).folder / name
    drawn = 0
    for content in odd_contents(path):
        path.write_text(content)
        with contextlib.suppress(ConfigError):
            assert "</html>" in render([Record.read(tmp_path / "odd")])
            drawn += 1
    assert drawn > 5


def test_an_image_in_a_run_that_cannot_be_one_is_refused_before_it_is_unpacked() -> None:
    content = io.BytesIO()
    Image.new("L", (2000, 2000)).save(content, format="png")  # few bytes, and could be many more pixels
    for image in ("AAAAA", "AAAA", base64.b64encode(content.getvalue()).decode()):
        with pytest.raises(ConfigError, match=r"evaluation\.json: an image in it cannot be read"):
            pixels(f"data:image/png;base64,{image}")


def test_the_name_of_a_runs_folder_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "\x1b[2Jx")
    assert main(["report", str(tmp_path / "\x1b[2Jx"), "--output", str(tmp_path / "\x1b[2J.html")]) == 0
    assert main(["runs", str(tmp_path)]) == 0
    assert "\x1b" not in "".join(capsys.readouterr())


def test_a_run_whose_process_is_gone_has_status_killed(tmp_path: Path) -> None:
    make_run(tmp_path / "x")
    state = tmp_path / "x" / "state.json"
    ended = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    processes = ((ended, "killed"), (str(os.getpid()), "running"), ("9" * 20, "killed"), ("9" * 5000, "killed"))
    for process, status in processes:
        state.write_text(json.dumps({"status": "running", "process": f"{process} on {socket.gethostname()}"}))
        assert Record.read(tmp_path / "x").status == status


def test_mnist_report_writes_one_report_or_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", epochs=2)
    assert main(["report", "a"]) == 0
    assert (tmp_path / "a" / "report.html").exists()
    assert (tmp_path / "a" / "confusion.png").exists()
    assert main(["report", "a", "b"]) == 0
    assert "Comparison of 2 runs" in Reading((tmp_path / "comparison.html").read_text()).text
    assert main(["report", "b", "--output", "else.html"]) == 0
    assert (tmp_path / "else.html").exists()
    assert not (tmp_path / "b" / "report.html").exists()
    assert capsys.readouterr().out.splitlines() == ["a/report.html", "comparison.html", "else.html"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["report", "nowhere"], 2, "nowhere: no run there"),
        (["runs", "nowhere"], 2, "nowhere: no runs in this folder"),
        (["report", "run", "--output", "/proc/nowhere/x.html"], 1, "/proc/nowhere"),
    ],
)
def test_mnist_commands_fail_with_a_message_and_no_traceback(
    arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "mnist", *arguments],
        cwd=tmp_path,
        env=user_environment(tmp_path, PYTHONPATH=str(PROJECT_FOLDER)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_evenly_spaced_items_include_the_first_and_the_last() -> None:
    assert downsample(range(100), 4) == [0, 33, 66, 99]
    assert downsample(range(3), 12) == [0, 1, 2]
    assert downsample([], 12) == []
    assert downsample([5], 12) == [5]


PROBE = """<!doctype html><iframe id="page" width="{width}" height="900" src="report.html"></iframe><pre id="out"></pre>
<script>
document.getElementById("page").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const clipped = [...page.querySelectorAll(".tile b, h1, h2")].filter(it => it.scrollWidth > it.clientWidth + 1);
  document.getElementById("out").textContent = JSON.stringify({{
    title: page.title, width: root.scrollWidth, clipped: clipped.length, metrics: JSON.parse(
      page.getElementById("metrics").textContent).length, asked: event.target.contentWindow.performance
      .getEntriesByType("resource").map(it => it.name).filter(it => !it.startsWith("data:")),
  }});
}};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="apt install chromium")
@pytest.mark.parametrize("width", [360, 1400])
def test_in_a_browser_the_report_fits_phone_and_desktop_and_runs_nothing(
    width: int, hostile: Record, tmp_path: Path
) -> None:
    shutil.copy(hostile.folder / "report.html", tmp_path)
    (tmp_path / "probe.html").write_text(PROBE.format(width=width))
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
        + [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000", str(tmp_path / "probe.html")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    seen = json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert seen["title"] == hostile.name
    assert seen["width"] <= width
    assert seen["clipped"] == 0
    assert seen["metrics"] == 1
    assert seen["asked"] == []


def test_reports_are_written_without_torch() -> None:
    """It takes two seconds to load; mnist runs and mnist report need none of it."""
    script = "import sys, mnist.reporting.report, mnist.runs.record; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=PROJECT_FOLDER, check=True)
