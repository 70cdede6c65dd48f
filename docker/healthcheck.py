"""Health check of a container: the training loop must keep updating the run's state.json.

    python docker/healthcheck.py            # 0: healthy; 1: no update for ten minutes
    python docker/healthcheck.py 60 runs    # limit in seconds, and folder of the runs

A container that is not training is healthy. Only runs of this host name count, because the folder may be shared.
"""

import json
import socket
import sys
import time
from datetime import datetime
from pathlib import Path

SECONDS = 600.0  # compiling and large checkpoints take minutes; processes wait ten minutes for each other
MAX_TEXT = 16 << 20  # bytes, as in mnist/files.py


def verdict(folder: Path, host: str, now: float, limit: float) -> tuple[bool, str]:
    """Whether the container is healthy at `now` (seconds since 1970), and why."""
    running = {}
    for path in folder.glob("*/state.json"):
        if not path.is_file():  # a pipe would never end
            continue
        try:
            if path.stat().st_size > MAX_TEXT:
                continue
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["status"] == "running" and state["process"].endswith(f" on {host}"):
                updated = datetime.strptime(state["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
                running[path.resolve().parent.name] = updated, int(state["step"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            continue  # not a run
    if not running:
        return True, "not training"
    name = max(running, key=lambda name: running[name])  # the newest: killed runs stay `running`
    updated, step = running[name]
    return now - updated <= limit, f"{name}: step {step}, {now - updated:.0f} s ago"


def main() -> int:
    limit = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    healthy, reason = verdict(Path(*sys.argv[2:] or ["/runs"]), socket.gethostname(), time.time(), limit)
    print(reason)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
