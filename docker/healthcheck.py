"""Whether the run of this container advances: state.json, which the training loop itself renews, must not grow old.

    python docker/healthcheck.py            # 0 for healthy, 1 for a run that has not moved for ten minutes
    python docker/healthcheck.py 60 runs    # a minute, and the folder of the runs

A container that does not train, or not yet, is healthy: there is nothing that could hang unseen. Only runs of this
container's host name count, for the folder may hold others.
"""

import json
import socket
import sys
import time
from datetime import datetime
from pathlib import Path

SECONDS = 600.0  # a first step that is compiled and a large checkpoint take minutes; processes wait ten for each other
LARGEST = 16 << 20  # bytes, as in mnist/files.py


def verdict(folder: Path, host: str, now: float, limit: float) -> tuple[bool, str]:
    """Whether all is well at the time `now`, in seconds since 1970, and why."""
    running = {}
    for path in folder.glob("*/state.json"):
        if not path.is_file():  # a pipe would never end
            continue
        try:
            if path.stat().st_size > LARGEST:
                continue
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["status"] == "running" and state["process"].endswith(f" on {host}"):
                beaten = datetime.strptime(state["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
                running[path.resolve().parent.name] = beaten, int(state["step"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            continue  # not a run's
    if not running:
        return True, "nothing is being trained"
    name = max(running, key=lambda name: running[name])  # one that was killed before may still say that it is running
    beaten, step = running[name]
    return now - beaten <= limit, f"{name}: step {step}, {now - beaten:.0f} s ago"


def main() -> int:
    limit = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    healthy, reason = verdict(Path(*sys.argv[2:] or ["/runs"]), socket.gethostname(), time.time(), limit)
    print(reason)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
