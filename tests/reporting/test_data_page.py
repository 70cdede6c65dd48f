"""The page about a folder of images, and `mnist inspect`."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist.cli import main
from tests.conftest import ResumeHere, RunHere
from tests.reporting.test_report import CHROMIUM, HOSTILE, Reading
from tests.support.shapes import make_shapes


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """12 classes of 5 images; one is in two classes, one repeated, one empty, one elongated, one tiny, one broken."""
    folder = make_shapes(tmp_path / "shapes", sizes=lambda place: 5)
    shutil.copy(folder / "ring" / "0.jpg", folder / "disc" / "wrong.jpg")
    shutil.copy(folder / "star" / "0.jpg", folder / "star" / "again.jpg")
    Image.new("RGB", (90, 90), "white").save(folder / "cross" / "empty.png")
    Image.open(folder / "bar" / "0.jpg").resize((300, 60)).save(folder / "bar" / "long.png")
    Image.open(folder / "half" / "0.jpg").resize((20, 21)).save(folder / "half" / "tiny.png")
    (folder / "square" / "broken.jpg").write_bytes(b"no image")
    return folder


def inspect(folder: Path, *flags: str) -> Reading:
    output = folder.parent / "data.html"
    assert main(["inspect", str(folder), "--output", str(output), "--data-dir", str(folder.parent), *flags]) == 0
    return Reading(output.read_text())


def test_inspect_names_what_is_wrong_with_a_folder(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = inspect(shapes)
    printed = capsys.readouterr().out
    assert "shapes at 64 x 64 in color, 53 training and 12 test images" in printed
    assert "1 image has duplicates in another class: disc/wrong.jpg is ring/0.jpg" in printed
    for title in ("The same image in several classes: 1", "Nearly empty: 1", "Elongated: 1", "Small: 1"):
        assert title in page.text
    first, second = "disc ?, (train|test) disc/wrong.jpg", "ring ?, (train|test) ring/0.jpg"
    assert re.search(f"The same image in several classes: 1 .*? {first} .*? {second}", page.text)
    assert "bar/long.png 300 x 60" in page.text
    assert re.search(r"Skipped files: 1 .* square/broken.jpg", page.text)
    assert "star/again.jpg" in page.text


def test_each_class_is_shown_with_its_counts_and_images(shapes: Path) -> None:
    page = inspect(shapes, "--fit", "pad", "--image-size", "32")
    assert "Images of a folder, at 32 x 32 in color" in page.text
    assert "ring 5 images, median " in page.text
    assert len({attributes["title"] for tag, attributes in page.tags if attributes.get("title")}) == 65  # all of them


def test_the_page_asks_for_nothing_and_escapes_names(shapes: Path) -> None:
    name = HOSTILE.replace("/", "")
    (shapes / "ring").rename(shapes / name)
    page = inspect(shapes)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert name in page.text


def test_a_run_on_a_folder_has_the_page_and_a_resumed_one_keeps_it(
    shapes: Path, run_here: RunHere, resume_here: ResumeHere
) -> None:
    folder = run_here("x", dataset=str(shapes), data_dir=str(shapes.parent), report=True, limit_train_images=20)
    page = folder / "data.html"
    assert "The same image in several classes" in page.read_text()
    assert 'href="data.html"' in (folder / "report.html").read_text()
    elsewhere = shapes.parent / "elsewhere.html"
    assert main(["report", str(folder), "--output", str(elsewhere)]) == 0
    assert "data.html" not in elsewhere.read_text()
    page.write_text("mine")
    resume_here(folder, epochs=2)
    assert page.read_text() == "mine"


def test_a_folder_of_one_image_per_class_in_each_split_has_a_page(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for number, name in enumerate(("a", "b")):
            (tmp_path / "few" / part / name).mkdir(parents=True)
            pixels = np.random.default_rng([number, len(part)]).integers(0, 256, (9, 9), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "few" / part / name / "0.png")
    assert "No duplicates" in inspect(tmp_path / "few").text


def test_inspect_refuses_what_is_not_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for name, error in (("mnist-images", "no such folder"), (tmp_path / "file", "a file, not a folder of images")):
        assert main(["inspect", str(name)]) == 2
        assert f"{name}: {error}." in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--output", str(tmp_path / "no" / "data.html")]) == 2
    assert "no/data.html: the folder" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="apt install chromium")
def test_in_a_browser_the_page_fits_phone_and_desktop(shapes: Path) -> None:
    from playwright.sync_api import sync_playwright

    inspect(shapes)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        for width in (360, 1400):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto((shapes.parent / "data.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
            assert page.evaluate(broken) == 0
        browser.close()
