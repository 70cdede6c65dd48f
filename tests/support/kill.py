"""Ends a job like a machine that loses its power."""

import contextlib

import psutil


def kill_all(pid: int) -> None:
    """SIGKILL a process and all its descendants, stopped first so that none can react."""
    family: dict[int, psutil.Process] = {}
    while new := [it for it in descendants(pid) if it.pid not in family]:
        for member in new:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
            family[member.pid] = member
    for member in family.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def descendants(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
