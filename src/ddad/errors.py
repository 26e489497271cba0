"""Errors a user can cause and mend. Each message is one sentence or two: expected, found, what to do.

The command line prints them in one line and exits with 1. Anything else that is raised is our bug and keeps its
traceback.
"""


class DDADError(Exception):
    """Base of every error that is the user's to mend."""


class ConfigError(DDADError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(DDADError):
    """Images, masks or folders that cannot be used as they are."""


class ModelError(DDADError):
    """A model folder or a checkpoint that cannot be loaded, or does not fit what is asked of it."""


class Interrupted(Exception):
    """Somebody asked a run to stop; its state is saved, and the same command goes on from there. Not an error."""
