"""A pytest plugin that hides GPUs from all tests except those marked `gpu`.

pytest           # like on a machine without GPUs
pytest -m gpu    # on the GPUs, in its own session: CUDA reads the variable once per process
"""

import os
import sys
from typing import Any

import pytest

VARIABLE = "CUDA_VISIBLE_DEVICES"


def pytest_configure(config: pytest.Config) -> None:
    if not selects_gpu_tests(config):
        os.environ[VARIABLE] = ""
        sys.addaudithook(refuse_to_show_gpus)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (item.get_closest_marker("gpu") is not None) != selects_gpu_tests(item.config):
        pytest.fail("Tests marked gpu need a session of their own. Run: pytest -m gpu", pytrace=False)


def selects_gpu_tests(config: pytest.Config) -> bool:
    return "gpu" in config.option.markexpr.replace("not gpu", "")


def refuse_to_show_gpus(event: str, arguments: tuple[Any, ...]) -> None:
    """Child processes inherit the variable, unless a test passes an environment without it."""
    if event == "subprocess.Popen" and (environment := arguments[3]) is not None and VARIABLE not in environment:
        if sys.executable in {*map(str, arguments[1]), *map(str, environment.values())}:
            raise ValueError(f"{arguments[1]}: the environment of a test's process must hold {VARIABLE}.")
