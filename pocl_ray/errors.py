"""What a user can get wrong, as an exception tree.

The command line turns a `UserError` into one line on stderr and exit code 2; everything else is a fault of
ours or of the machine and keeps its traceback. A message names the place (file, key, row) and the remedy.
"""


class UserError(Exception):
    """The user's input is wrong; the message is one line that names the place and what would be right."""


class ConfigError(UserError):
    """A key, a value or a combination of values in the config that cannot work."""


class DataError(UserError):
    """Rows that are missing, unreadable, or too often unusable."""


class ModelError(UserError):
    """A model or tokenizer that cannot be loaded, or that does not fit the other one."""


class StorageError(UserError):
    """A place that cannot be read or written, or a run directory that belongs to something else."""


class ResourceError(UserError):
    """More devices, workers or disk than the cluster has."""


class StalledError(UserError):
    """Work that stood still, again and again: something in it hangs, or its time is too short."""


class GaveUpError(Exception):
    """Something failed as often as it may, and not through the user's input; the message is one line.

    It says what failed, how often, and why the last time; what was raised then is its `__cause__`. Exit code 1.
    """
