"""Signals of a process in which several runs train."""

import signal

from mnist.launch.signals import EXIT_CODES


def hear_again() -> None:
    """Undo that a run which has ended leaves signals without effect, as its process would be about to end."""
    for number in EXIT_CODES:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
