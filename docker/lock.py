"""Write the image's lock file: exact versions and SHA-256 of the wheels, without host names.

python docker/lock.py > docker/requirements-cuda.lock                # from the default index: torch with CUDA
python docker/lock.py --extra-index-url https://download.pytorch.org/whl/cpu > docker/requirements-cpu.lock

Run it with the image's Python (3.11 on x86_64 Linux), because pip resolves for the machine that it runs on. Flags are
passed to pip. Nothing is installed.
"""

import json
import subprocess
import sys
from pathlib import Path

PROJECT_FOLDER = Path(__file__).resolve().parent.parent
INIT = "dumb-init"  # process 1 of the container


def lock(report: dict[str, object], note: str) -> str:
    """The lock file for pip's installation report."""
    lines = [f"# Made by `{note}`: torch and all that the image installs. Do not edit.\n"]
    packages = report["install"]
    assert isinstance(packages, list)
    for package in sorted(packages, key=lambda package: str(package["metadata"]["name"]).lower()):
        if "dir_info" in package["download_info"]:  # the project itself
            continue
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        checksum = package["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name.lower()}=={version} --hash=sha256:{checksum}\n")
    return "".join(lines)


def main() -> None:
    flags = "--dry-run", "--ignore-installed", "--quiet", "--only-binary=:all:", "--report=-"
    command = [sys.executable, "-m", "pip", "install", *flags, *sys.argv[1:], str(PROJECT_FOLDER), INIT]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    words = [word for word in sys.argv[1:] if "://" not in word]
    note = " ".join(["python docker/lock.py", *words])
    print(lock(json.loads(answer.stdout), note), end="")


if __name__ == "__main__":
    main()
