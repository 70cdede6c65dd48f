"""Every line of docs/your-data.md, from a folder to a deployed model; training takes one step on 4 images (SHORT)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mnist.config.command_line import parse_command_line
from mnist.config.recipes import RECIPES
from mnist.config.settings import PROJECT_FOLDER
from tests.conftest import user_environment
from tests.launched.test_photos import convnext_weights  # noqa: F401 (a fixture)
from tests.support.shapes import OUTLINES, draw

PAGE = (PROJECT_FOLDER / "docs" / "your-data.md").read_text(encoding="utf-8")
SHORT = "--max-steps 1 --batch-size 4 --limit-test-images 4 --trackers none"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with what the page names: PetImages, other_pets, my_cat.jpg and holiday/."""
    rng, folder = np.random.default_rng(0), tmp_path / "here"
    for pets in ("PetImages", "other_pets"):
        for name, outline in (("Cat", OUTLINES["star"]), ("Dog", OUTLINES["disc"])):
            (folder / pets / name).mkdir(parents=True)
            for number in range(12):
                draw(outline, rng).save(folder / pets / name / f"{number}.jpg")
            (folder / pets / name / "Thumbs.db").write_bytes(b"x")
    (folder / "PetImages" / "Cat" / "666.jpg").touch()
    (folder / "holiday").mkdir()
    draw(OUTLINES["star"], rng).save(folder / "my_cat.jpg")
    draw(OUTLINES["disc"], rng).save(folder / "holiday" / "beach.png")
    return folder


def run(line: str, here: Path, weights: Path) -> str:
    """The output of a command line, with fewer steps and images for training, and data in the folder `here`."""
    command = line.split("#")[0].strip()
    if "train.py" in command:
        command = f"{command} {SHORT}".replace("train.py", str(PROJECT_FOLDER / "train.py"))
    if re.search(r"train\.py|mnist inspect", command):
        command += " --data-dir data"
    environment = user_environment(here, TORCH_HOME=str(weights))
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=here, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_each_line_of_the_page_works_and_the_program_gives_the_models_answer(
    here: Path,
    convnext_weights: Path,  # noqa: F811
) -> None:
    outputs = {line: run(line, here, convnext_weights) for block in blocks("sh") for line in block.splitlines()}
    assert len(outputs) >= 8
    (inspected,) = (output for line, output in outputs.items() if line.startswith("mnist inspect"))
    assert "PetImages at 224 x 224 in color, 20 training and 4 test images" in inspected
    recipe = "accelerate launch train.py --recipe photos --dataset PetImages"
    assert "model       convnext_tiny" in outputs[recipe]
    assert "at 224 x 224 in color" in outputs[recipe]
    assert "Decoding" not in outputs[recipe]
    (here / "program.py").write_text(blocks("python")[0])
    answer = run("python program.py runs/latest/model.onnx my_cat.jpg holiday/beach.png", here, convnext_weights)
    rows = json.loads(run("mnist predict my_cat.jpg holiday/beach.png --json", here, convnext_weights))
    labels = [row["label"] for row in rows]
    assert re.findall(r": (\w+), [\d.]+%", answer) == labels
    command = 'python -c \'from mnist import load; print(load("runs/latest").predict("my_cat.jpg").label)\''
    assert run(command, here, convnext_weights).strip() == labels[0]
    assert 'load("runs/latest").predict("my_cat.jpg").label' in PAGE
    assert (here / "data.html").is_file()


def test_each_setting_in_the_table_can_be_added_to_the_recipe() -> None:
    settings = re.findall(r"^\| `(--\S+ \S+)` \|", PAGE, re.MULTILINE)
    assert len(settings) >= 6
    for setting in settings:
        name, value = setting.replace("\\|", "|").split(" ")
        for choice in value.split("|"):
            parse_command_line(RECIPES, ["--recipe", "photos", name, choice])


def test_the_pages_pictures_are_there() -> None:
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE)
    assert len(names) >= 2
    assert all((PROJECT_FOLDER / "docs" / name).is_file() for name in names)
