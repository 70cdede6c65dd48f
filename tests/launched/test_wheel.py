"""The package installed from a wheel applies models and reads runs without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import urllib.request
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mnist.config.settings import PROJECT_FOLDER
from mnist.data.splits import ImageData
from mnist.models.networks import Net
from mnist.models.saved import ModelConfig, save_model
from tests.conftest import RunHere

pytestmark = pytest.mark.slow  # it makes an environment
Installed = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which finds its requirements in the present one."""
    folder = tmp_path_factory.mktemp("wheel")
    sources, place = folder / "sources", folder / "environment"
    shutil.copytree(PROJECT_FOLDER / "mnist", sources / "mnist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT_FOLDER / name, sources)
    venv.create(place)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "requirements.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--quiet"]
    wheel = [*pip, "wheel", *options, "--no-build-isolation", f"--wheel-dir={folder}", str(sources)]
    subprocess.run(wheel, cwd=folder, check=True)
    (file,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(place / "bin" / "python"), "install", *options, str(file)], check=True)
    return place


@pytest.fixture
def installed(environment: Path, tmp_path: Path) -> Installed:
    """Run a program of that environment in tmp_path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [str(environment / "bin" / program), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)

    return run


@pytest.fixture
def seven(tmp_path: Path, digits: ImageData) -> None:
    """An untrained model and an image, in tmp_path."""
    save_model(Net(), tmp_path / "model", ModelConfig("mlp", digits.class_names, (28, 28), "mnist", 1, "digit"))
    Image.fromarray(digits.test.images[0].numpy()).save(tmp_path / "seven.png")


def test_a_wheel_applies_models_from_its_command_a_module_and_python(
    installed: Installed, environment: Path, seven: None
) -> None:
    by_command, as_module = installed("mnist", "--help"), installed("python", "-m", "mnist", "--help")
    assert by_command.stdout == as_module.stdout
    assert "in a checkout of the project" in by_command.stdout
    answer = installed("mnist", "predict", "seven.png", "--model", "model").stdout
    script = "import mnist; print(mnist.__file__, mnist.load('model').predict('seven.png').label)"
    file, label = installed("python", "-c", script).stdout.split()
    assert environment in Path(file).parents
    assert re.match(rf"seven\.png  {label} +\d", answer)
    assert installed("mnist", "predict", "seven.png").stdout.startswith("seven.png  7 ")  # by the included model


def test_a_wheel_has_its_data_in_the_current_folder_not_in_site_packages(
    installed: Installed, environment: Path, seven: None, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(PROJECT_FOLDER / "data")
    assert "10,000 test images" in installed("mnist", "evaluate", "--model", "model").stdout
    assert not list(environment.glob("lib/python*/site-packages/data"))


def test_a_wheel_includes_the_report_and_drawing_pages(
    installed: Installed, environment: Path, run_here: RunHere, seven: None, tmp_path: Path
) -> None:
    installed("mnist", "report", str(run_here("x")), "--output", "page.html")
    assert "</html>" in (tmp_path / "page.html").read_text()
    command = [str(environment / "bin" / "mnist"), "draw", "--model", "model", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address is not None
        with urllib.request.urlopen(address[0]) as page:
            assert b"</html>" in page.read()
        process.terminate()
