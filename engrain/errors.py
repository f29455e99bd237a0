"""Errors of the application."""

from envs.errors import UsageError


class EngineCannotTrainError(UsageError):
    """The settings ask for a way of training that this engine cannot do."""


class RoundConflictError(UsageError):
    """An unfinished round stands in the way."""


class NothingLearnedError(UsageError):
    """No usable experience came out of the episodes."""
