"""The plugins of the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from mnist.config.settings import PROJECT_FOLDER
from tests.conftest import user_environment

TESTS = """
import os, subprocess, sys
import pytest

def test_unmarked():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(ValueError, match="must hold CUDA_VISIBLE_DEVICES"):
        subprocess.run([sys.executable, "--version"], env={})

@pytest.mark.gpu
def test_marked():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
"""


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("-m", "not gpu"), 0, "1 passed"),
        (("-m", "gpu"), 0, "1 passed"),
        ((), 1, "1 passed, 1 error"),
        (("-m", "gpu or not gpu"), 1, "Tests marked gpu need a session of their own. Run: pytest -m gpu"),
    ],
)
def test_only_tests_marked_gpu_see_gpus(flags: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    variables = {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(PROJECT_FOLDER), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.support.gpus", *flags],
        cwd=tmp_path,
        env=user_environment(tmp_path, **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
