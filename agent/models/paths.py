"""Where Engrain keeps what it fetched."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def engrain_home() -> Path:
    """The folder for everything Engrain keeps: ENGRAIN_HOME, or `engrain` in the user's cache folder.

    Read from the environment at every call. The folder may not exist yet.
    """
    configured = os.environ.get("ENGRAIN_HOME")
    if configured:
        return Path(configured).expanduser().absolute()
    return platformdirs.user_cache_path("engrain")


def models_dir() -> Path:
    """The folder that holds one folder a fetched model. It may not exist yet."""
    return engrain_home() / "models"
