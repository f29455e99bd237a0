"""Errors of the application."""

from envs.errors import EngrainError, UsageError


class EngineCannotTrainError(UsageError):
    """The settings ask for a way of training that this engine cannot do."""


class RoundConflictError(UsageError):
    """An unfinished round stands in the way."""


class NothingLearnedError(UsageError):
    """No usable experience came out of the episodes."""


class LoopAtWorkError(UsageError):
    """Another process improves this model in this store."""


class LoopReplacedError(EngrainError):
    """This process lost its lease: another one improves the model now."""


class NothingToRollBackError(UsageError):
    """There is no checkpoint to go back to, or none to go back from."""


class MetricsPortError(UsageError):
    """The port for metrics cannot be opened."""


class NothingToCompareError(UsageError):
    """There is no knowledge and no checkpoint that a game could be compared with."""


class NothingSampledError(UsageError):
    """An episode has no token whose probability could be asked for."""
