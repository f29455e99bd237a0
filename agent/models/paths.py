"""Where Engrain keeps the models it fetched."""

from __future__ import annotations

from pathlib import Path

from envs.home import engrain_home


def models_dir() -> Path:
    """The folder that holds one folder a fetched model. It may not exist yet."""
    return engrain_home() / "models"
