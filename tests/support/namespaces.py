"""Whether tests can use mount namespaces on this system."""

import shutil
import subprocess

MOUNT = "unshare --map-root-user --mount true".split()
NAMESPACES = shutil.which("unshare") is not None and subprocess.run(MOUNT, check=False).returncode == 0
