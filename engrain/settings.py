"""What the environment says: where Engrain keeps its things. Read at every call, so tests and shells may change it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from envs.errors import UsageError
from envs.home import engrain_home


class Settings(BaseSettings):
    """The settings that hold for every command; each is an environment variable ENGRAIN_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="ENGRAIN_", env_ignore_empty=True, frozen=True)

    home: Path = Field(default_factory=engrain_home)
    """Folder for models, games, runs and the default store; by default `engrain` in the user's cache folder."""

    store: str = ""
    """Database of episodes, items, rounds: a SQLite file or a postgresql:// URL; by default `<home>/engrain.db`."""

    store_password_file: Path | None = None
    """File that holds the password of a postgresql:// store whose URL has none, such as a container's secret."""

    debug: bool = False
    """Show tracebacks instead of one-line errors."""

    api_key: SecretStr = SecretStr("")
    """Sent to inference servers as a bearer token. Only read from the environment; never stored or logged."""

    coach_api_key: SecretStr = SecretStr("")
    """Sent to a coach's server, which may be somebody else's: it never gets `api_key`. Otherwise as that."""

    ui_token: SecretStr = SecretStr("")
    """What opens the pages of `engrain ui` and `engrain play --web`; by default each start draws one and prints it."""

    server_patience: float = Field(300.0, ge=0, allow_inf_nan=False)
    """Seconds that a request to an inference server is tried again, for instance while the server starts anew."""

    server_timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds that an inference server may take for one completion."""

    @field_validator("api_key", "coach_api_key")
    @classmethod
    def _in_a_header(cls, key: SecretStr, info: ValidationInfo) -> SecretStr:
        stripped = key.get_secret_value().strip()
        if not all("!" <= character <= "~" for character in stripped):
            variable = f"ENGRAIN_{str(info.field_name).upper()}"
            raise ValueError(f"a key is printable ASCII without spaces; put nothing else into {variable}")
        return SecretStr(stripped)

    @field_validator("ui_token")
    @classmethod
    def _hard_to_guess(cls, token: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[\w-]{16,}|", token.get_secret_value(), re.ASCII):
            raise ValueError("a token is 16 or more letters, digits, - and _; `openssl rand -hex 24` makes one")
        return token

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        try:
            return home.expanduser().absolute()
        except RuntimeError as error:
            raise ValueError("there is no such user's home; name a folder in ENGRAIN_HOME") from error


def home() -> Path:
    """The folder for everything Engrain keeps. It may not exist yet.

    Raises:
        pydantic.ValidationError: an ENGRAIN_ variable has an impossible value; so do the functions below.
    """
    return Settings().home


def default_store_url() -> str:
    """The store to open when the command line names none: ENGRAIN_STORE, or a SQLite file in `home()`."""
    settings = Settings()
    return settings.store or str(settings.home / "engrain.db")  # no URL: in one `?` and `%` would mean something


def with_password(url: str) -> str:
    """The store's URL, with the password from ENGRAIN_STORE_PASSWORD_FILE where it is PostgreSQL's and has none.

    Raises:
        UsageError: the file cannot be read.
    """
    file = Settings().store_password_file
    scheme, sign, rest = url.partition("://")
    if file is None or not sign or not scheme.startswith("postgres"):
        return url
    who, at, where = rest.rpartition("@")
    if not at or ":" in who:
        return url
    try:
        password = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"ENGRAIN_STORE_PASSWORD_FILE: {file} cannot be read: {error}") from error
    return f"{scheme}://{who}:{quote(password, safe='')}@{where}"


def round_dir(id_: str) -> Path:
    """The folder of a round. Whoever can write to a shared store names the round, so the name is looked at.

    Raises:
        UsageError: it would lie elsewhere than in `runs_dir()`.
    """
    if not re.fullmatch(r"[\w-]{1,80}", id_):
        raise UsageError(f"the store names a round {id_[:80]!r}, which no round is called; look at who writes to it")
    return runs_dir() / f"round-{id_}"


def runs_dir() -> Path:
    """The folder that holds one folder a run. It may not exist yet."""
    return home() / "runs"
