"""What can go wrong with a model's files; each message is one line that says what to do."""

from envs.errors import EngrainError, UsageError


class UnknownModelError(UsageError):
    """Neither a short name, a model folder nor a Hugging Face id."""


class ModelNotCachedError(UsageError):
    """The model is known but not on this machine, and fetching was not allowed."""


class FetchError(EngrainError):
    """The model could not be had: no network, no such package, no such repository."""


class WrongHashError(EngrainError):
    """What arrived is not what was pinned; it is thrown away."""


class DiskFullError(EngrainError):
    """The disk does not hold the model."""


class ConversionError(EngrainError):
    """The fetched file could not be turned into a model folder."""
