"""A plugin for pytest-xdist: keeps the tests of some modules in one worker, and gives each worker a port for torchrun.

`--dist=loadgroup` would do, but xdist 3.8 ignores its marks with pytest 9.2.
"""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# tests in these modules share slow fixtures: runs of several processes, compiled code, a browser
TOGETHER = {"test_capture", "test_draw", "test_own_images", "test_predict", "test_processes", "test_wheel"}


def pytest_configure(config: pytest.Config) -> None:
    """torchrun defaults to one fixed port, and torch 2.6 fails if it is taken."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ["PET_MASTER_PORT"] = str(server.getsockname()[1])


class Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return module if Path(module).stem in TOGETHER else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Scheduling(config, log)
