"""What a user can mend: errors that are shown as one message, without a traceback.

Everything else that goes wrong is a bug or a broken machine, and keeps its traceback.
"""


class UserError(Exception):
    """A run cannot start or go on; the message names the thing, the value and the way out."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A setting that cannot be: wrong usage, ended with 2 as by argparse."""

    exit_code = 2


class ImageError(UserError):
    """A file that should be an image, or a folder of them, and cannot be read."""


class DivergedError(UserError):
    """The loss is no number any more."""
