"""A plugin of pytest-xdist: which tests may run in different workers, and a port for what torchrun starts in each.

`--dist=loadgroup` would be the way to say it, but with pytest 9.2 xdist 3.8 does not see its marks.
"""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# the tests of each of these modules share what takes long to make: runs of several processes, compiled code, a browser
TOGETHER = {"test_capture", "test_draw", "test_own_images", "test_predict", "test_processes", "test_wheel"}


def pytest_configure(config: pytest.Config) -> None:
    """torchrun's own default is one port for all, which torch 2.6 does not change where it is taken."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ["PET_MASTER_PORT"] = str(server.getsockname()[1])


class Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return module if Path(module).stem in TOGETHER else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Scheduling(config, log)
