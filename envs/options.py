"""Options of a world as the command line gives them, checked at the door."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from envs.errors import UsageError


def comma_list(value: Any) -> Any:
    """Split `"a, b"` into `("a", "b")`; leave anything that is not a string alone. For `BeforeValidator`."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def is_file(path: Path) -> bool:
    """Whether there is such a file; False also for what cannot be a path, such as a name that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def storable(text: str) -> bool:
    """Whether a text has a UTF-8 form; lone surrogates, as bytes that are no UTF-8 leave them, have none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Options(BaseModel):
    """Frozen options; a world subclasses it with its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, world: str, options: Mapping[str, Any]) -> Self:
        """Validate options whose values may be strings.

        Raises:
            UsageError: an option is unknown (the message lists the known ones) or its value does not fit.
        """
        unknown = sorted(set(options) - set(cls.model_fields))
        if unknown:
            known = ", ".join(cls.model_fields)
            raise UsageError(f"unknown option {unknown[0]!r} for env {world!r}; known options: {known}")
        for name, value in options.items():
            if isinstance(value, str) and not storable(value):
                raise UsageError(f"env {world!r}, option {name}={value!r}: not UTF-8 text")
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "options"
            reason = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"env {world!r}, option {name}={first['input']!r}: {reason}") from error
