"""The errors that a user can cause, as a tree of exceptions.

The command line turns a `UserError` into one line on stderr and exit code 2. Every other error is a fault of the
program or of the machine, and keeps its traceback. A message names the place (file, key, row) and the remedy.
"""


class UserError(Exception):
    """Wrong input of the user; the message is one line that names the place and the remedy."""


class ConfigError(UserError):
    """A key, a value or a combination of values in the config that cannot work."""


class DataError(UserError):
    """Rows that are missing or unreadable, or too many unusable rows."""


class ModelError(UserError):
    """A model or tokenizer that cannot be loaded, or that does not fit the other one."""


class HubUnreachableError(ModelError):
    """A model of the Hub that is not in the cache here, while the Hub cannot be reached."""


class StorageError(UserError):
    """A place that cannot be read or written, or a run directory that belongs to something else."""


class ResourceError(UserError):
    """A request for more devices, workers or disk space than the cluster has."""


class StalledError(UserError):
    """Work that repeatedly makes no progress: it hangs, or its time limit is too short."""


class GaveUpError(Exception):
    """A repeated failure, up to the allowed number, that is not the user's fault; the message is one line.

    It says what failed, how often, and why the last time. The last error is its `__cause__`. The exit code is 1.
    """


class DivergedError(GaveUpError):
    """A training whose loss or gradient is not finite in several consecutive steps; its last checkpoint is kept."""
