"""Errors that a user can fix, shown as one message without a traceback. All other errors keep their traceback."""


class UserError(Exception):
    """A run cannot start or continue. The message says what is wrong, the value and what to do."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """An invalid setting. Its exit code is that of argparse for wrong usage."""

    exit_code = 2


class ImageError(UserError):
    """A file that is not a readable image, or a folder without any."""


class DivergedError(UserError):
    """The loss is no longer finite."""
