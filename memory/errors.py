"""What can go wrong with a store, split into faults of the input (exit 2) and faults of the world (exit 1)."""

from __future__ import annotations

from envs.errors import EngrainError, UsageError


class StoreError(EngrainError):
    """The database stopped working under us: disk full, server gone, locked for too long."""


class BadStoreError(UsageError):
    """The URL or file given does not name a database that this version can use."""


class UnknownIdError(UsageError):
    """The store holds nothing, or more than one thing, under that id."""


class ConflictError(UsageError):
    """What is to be written contradicts what the store holds already."""
