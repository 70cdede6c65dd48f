"""A training process from its start to its exit code; the signals are in tests/launched/test_signals.py."""

import subprocess
import sys

from mnist.config.settings import PROJECT_FOLDER

ABORTS_WHEN_TAKEN_DOWN = """
import atexit, os
from mnist.launch.main import end_process

class Thread:
    abort = staticmethod(os.abort)
    def __del__(self):
        self.abort()

thread = Thread()
atexit.register(print, "registered")
print("printed", end=" ")
end_process({code})
"""


def test_the_exit_code_is_kept_whatever_would_happen_while_the_interpreter_is_taken_down() -> None:
    for code in (0, 3):
        done = subprocess.run(
            [sys.executable, "-c", ABORTS_WHEN_TAKEN_DOWN.format(code=code)],
            cwd=PROJECT_FOLDER,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (code, "printed registered\n", "")
