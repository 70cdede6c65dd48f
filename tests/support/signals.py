"""Signal handlers in a process that trains several runs."""

import signal

from mnist.launch.signals import EXIT_CODES


def hear_again() -> None:
    """Restore the default handlers: a run that ends ignores signals, because its process would end too."""
    for number in EXIT_CODES:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
