"""Where Engrain keeps what it makes and fetches."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from envs.errors import UsageError


def engrain_home() -> Path:
    """The folder for everything Engrain keeps: ENGRAIN_HOME, or `engrain` in the user's cache folder.

    Read from the environment at every call. The folder may not exist yet.

    Raises:
        UsageError: ENGRAIN_HOME begins with the name of a user whom this machine does not know.
    """
    configured = os.environ.get("ENGRAIN_HOME")
    if not configured:
        return user_cache_path("engrain")
    try:
        return Path(configured).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(f"ENGRAIN_HOME={configured!r}: there is no such user's home; name a folder") from error
