"""Errors that a user can act on: every package's own errors derive from these two.

The command line prints the message in one line, without a traceback, and exits with `exit_code`.
A message names the bad value and the fix.
"""


class EngrainError(Exception):
    """A fault of the world (no network, full disk, dead server): one line, exit code 1."""

    exit_code = 1


class UsageError(EngrainError):
    """A fault of the input (unknown name, bad value): one line naming the value and the fix, exit code 2."""

    exit_code = 2


class UnknownEnvError(UsageError):
    """No env of that name is registered."""


class BadTaskError(UsageError):
    """A task or an env option does not describe a playable episode."""


class EnvFailedError(EngrainError):
    """An env crashed or hung while it was played; costs one episode."""


class BadPluginError(EngrainError):
    """Something that another distribution registers does not import, or is not what it is registered as."""
